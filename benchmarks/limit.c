/* What group normalization takes at least.  limit.py compiles it.

   `copy` moves the bytes, with no arithmetic on the way.  The others are the practical limit: the two sweeps, sums then
   apply, without any care for accuracy (mean(x * x) - mean * mean), bits, options or strides.  Most can be done in
   several ways, of which the fastest counts: with non-temporal stores (`streamed`), or each slab by all threads
   (`together`).  Every number that Python hands over is a size_t. */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define STREAM(p, v) _mm512_stream_ps(p, v)
#define WIDEN(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (p)))
#define NARROW(p, v) _mm256_storeu_si256((__m256i *) (p), _mm512_cvtps_ph(v, 0))
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define STREAM(p, v) _mm256_stream_ps(p, v)
#define WIDEN(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p)))
#define NARROW(p, v) _mm_storeu_si128((__m128i *) (p), _mm256_cvtps_ph(v, 0))
#else /* no non-temporal stores: both ways are plain */
#define LANES 4
#define STREAM(p, v) (*(floats *) (p) = (v))
#define WIDEN(p) __builtin_convertvector(*(const halves *) (p), floats)
#define NARROW(p, v) (*(halves *) (p) = __builtin_convertvector(v, halves))
#define _mm_sfence() ((void) 0)
typedef _Float16 halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

static inline void put(void *p, floats v, int streamed)
{
    if (streamed) STREAM(p, v);
    else *(floats *) p = v;
}

/* How many of n values come before the first place that can be streamed to. */
static inline size_t before(const void *y, size_t value, size_t n, int streamed)
{
    size_t head = streamed ? -(uintptr_t) y % sizeof(floats) / value : 0;
    return head < n ? head : n;
}

/* ---- copy ---------------------------------------------------------------------------------------------------- */

enum { BLOCK = 1 << 18 }; /* bytes swept in one go */

static volatile char seen;

static void look(const char *a, size_t bytes)
{
    bits all = {0};
    for (size_t i = 0; i + sizeof all <= bytes; i += sizeof all) all ^= *(const bits *) (a + i);
    seen = *(char *) &all;
}

/* Not memcpy: on some processors its `rep movsb` takes ten times as long where the addresses are badly aligned. */
static void move(char *out, const char *x, const char *dy, size_t bytes, int streamed)
{
    size_t i = 0, head = before(out, 1, bytes, streamed);
    for (; i < head; i++) out[i] = dy ? x[i] ^ dy[i] : x[i];
    for (; i + sizeof(bits) <= bytes; i += sizeof(bits)) {
        bits v = *(const bits *) (x + i);
        if (dy) v ^= *(const bits *) (dy + i);
        put(out + i, (floats) v, streamed);
        __asm__ volatile("" ::: "memory"); /* or the compiler would call memcpy */
    }
    for (; i < bytes; i++) out[i] = dy ? x[i] ^ dy[i] : x[i];
}

/* out = x, or x ^ dy, by equal shares of the threads.  With `twice` everything is read a first time, slab by slab,
   and moved from its end, which is then still in a cache. */
void copy(char *out, const char *x, const char *dy, size_t slab, size_t slabs, size_t twice, size_t streamed,
          size_t threads)
{
#pragma omp parallel num_threads(threads)
    {
        size_t n = omp_get_num_threads(), t = omp_get_thread_num();
        size_t first = t * slab / n, last = (t + 1) * slab / n; /* this thread's bytes of a slab */
        for (size_t s = 0; s < slabs; s++) {
            size_t start = s * slab + first, end = s * slab + last;
            if (twice) {
                look(x + start, end - start);
                if (dy) look(dy + start, end - start);
            }
            size_t blocks = (end - start + BLOCK - 1) / BLOCK;
            for (size_t b = 0; b < blocks; b++) {
                size_t at = start + (twice ? blocks - 1 - b : b) * BLOCK;
                move(out + at, x + at, dy ? dy + at : NULL, end - at < BLOCK ? end - at : BLOCK, streamed);
            }
        }
        _mm_sfence();
    }
}

/* ---- the two sweeps ------------------------------------------------------------------------------------------ */

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { BUFFER = 1024 }; /* values converted in one go */

typedef struct { float v, vx; } sums; /* the sums of v and of v * x */

static inline sums sum(const float *restrict v, const float *restrict x, size_t n)
{
    sums all = {0, 0};
    size_t i = 0;
    if (n >= 256) {
        float a[4 * LANES] = {0}, b[4 * LANES] = {0};
        for (; i + 4 * LANES <= n; i += 4 * LANES)
            for (int j = 0; j < 4 * LANES; j++) { a[j] += v[i + j]; b[j] += v[i + j] * x[i + j]; }
        for (int j = 0; j < 4 * LANES; j++) { all.v += a[j]; all.vx += b[j]; }
    }
    for (; i < n; i++) { all.v += v[i]; all.vx += v[i] * x[i]; }
    return all;
}

static inline void moments(sums all, size_t n, float *mean, float *rstd)
{
    *mean = all.v / n;
    *rstd = 1 / sqrtf(all.vx / n - *mean * *mean + 1e-5f);
}

/* z * sigmoid(z); 2^t is 2^round(t), made of bits, times a polynomial. */
static inline float swish(float z)
{
    float t = -1.442695041f * z;
    t = t < -126 ? -126 : t > 126 ? 126 : t;
    float whole = rintf(t), f = t - whole;
    union { int32_t bits; float value; } power = {((int32_t) whole + 127) << 23};
    float series = 1 + f * (0.6931472f + f * (0.2402265f + f * (0.0555041f + f * (0.0096181f + f * 0.0013333f))));
    return z / (1 + power.value * series);
}

/* y = v * a + x * b + c, or v * a + c without x, or SiLU of that */
static inline void apply(float *restrict y, const float *restrict v, const float *restrict x, size_t n, float a,
                         float b, float c, int silu, int streamed)
{
    size_t i = 0, head = before(y, sizeof *y, n, streamed);
    if (silu) {
        for (; i < n; i++) y[i] = swish(v[i] * a + c);
        return;
    }
    for (; i < head; i++) y[i] = v[i] * a + (x ? x[i] * b + c : c);
    for (; i + LANES <= n; i += LANES) {
        floats rest = x ? *(const floats *) (x + i) * b + c : (floats) {0} + c;
        put(y + i, *(const floats *) (v + i) * a + rest, streamed);
    }
    for (; i < n; i++) y[i] = v[i] * a + (x ? x[i] * b + c : c);
}

/* The same of values with a weight and a bias each */
static inline void apply_each(float *restrict y, const float *restrict v, size_t n, float mean, float rstd,
                              const float *restrict w, const float *restrict b, int silu)
{
    if (silu) for (size_t i = 0; i < n; i++) y[i] = swish((v[i] - mean) * rstd * w[i] + b[i]);
    else for (size_t i = 0; i < n; i++) y[i] = (v[i] - mean) * rstd * w[i] + b[i];
}

/* The values from `at`, as float32: where they are, or in the buffer. The last vector overlaps the one before. */
static inline const float *widened(const char *x, size_t at, size_t n, int dtype, float *restrict buffer)
{
    const uint16_t *h = (const uint16_t *) x + at;
    uint16_t few[LANES] = {0};
    if (dtype == FLOAT32) return (const float *) x + at;
    if (dtype == BFLOAT16)
        for (size_t i = 0; i < n; i++) ((uint32_t *) buffer)[i] = (uint32_t) h[i] << 16;
    else if (n < LANES)
        *(floats *) buffer = WIDEN(memcpy(few, h, 2 * n));
    else {
        for (size_t i = 0; i + LANES < n; i += LANES) *(floats *) (buffer + i) = WIDEN(h + i);
        *(floats *) (buffer + n - LANES) = WIDEN(h + n - LANES);
    }
    return buffer;
}

static inline void narrow(uint16_t *restrict y, const float *restrict buffer, size_t n, int dtype)
{
    uint16_t few[LANES];
    if (dtype == BFLOAT16)
        for (size_t i = 0; i < n; i++) {
            uint32_t value = ((const uint32_t *) buffer)[i];
            y[i] = (value + 0x7FFF + (value >> 16 & 1)) >> 16;
        }
    else if (n < LANES) {
        NARROW(few, *(const floats *) buffer);
        memcpy(y, few, 2 * n);
    } else {
        for (size_t i = 0; i + LANES < n; i += LANES) NARROW(y + i, *(const floats *) (buffer + i));
        NARROW(y + n - LANES, *(const floats *) (buffer + n - LANES));
    }
}

/* What one thread does: channels [c0, c1) of slabs [i0, i1). */
typedef struct { size_t i0, i1, c0, c1; } share;

static share shared(size_t slabs, size_t k, int together)
{
    size_t n = omp_get_num_threads(), t = omp_get_thread_num();
    if (together) return (share) {0, slabs, k * t / n, k * (t + 1) / n};
    return (share) {slabs * t / n, slabs * (t + 1) / n, 0, k};
}

/* The sums of all threads; `parts` are two rows, as the fastest is at the next slab when the slowest still adds. */
static sums gathered(sums mine, sums *parts, size_t slab, int together)
{
    if (!together) return mine;
    int n = omp_get_num_threads();
    parts += slab % 2 * n;
    parts[omp_get_thread_num()] = mine;
    mine = (sums) {0, 0};
#pragma omp barrier
    for (int t = 0; t < n; t++) { mine.v += parts[t].v; mine.vx += parts[t].vx; }
    return mine;
}

/* What one thread does of slabs of k channels of s values; compiled for each dtype apart. */
static inline __attribute__((always_inline)) void part_of_forward(
    char *y, const char *x, size_t slabs, size_t k, size_t s, size_t groups, const float *w, const float *b, int dtype,
    int silu, int streamed, int together, sums *parts)
{
    float buffer[s == 1 && k > BUFFER ? k : BUFFER], mean, rstd;
    share my = shared(slabs, k, together);
    size_t n = (my.c1 - my.c0) * s, piece = dtype == FLOAT32 ? k * s : BUFFER;
    for (size_t i = my.i0; i < my.i1; i++) {
        const float *weight = w + i % groups * k, *bias = b + i % groups * k;
        if (s == 1) { /* every value has its own weight */
            const float *v = widened(x, i * k, k, dtype, buffer);
            float *out = dtype == FLOAT32 ? (float *) y + i * k : buffer;
            moments(sum(v, v, k), k, &mean, &rstd);
            apply_each(out, v, k, mean, rstd, weight, bias, silu);
            if (dtype != FLOAT32) narrow((uint16_t *) y + i * k, out, k, dtype);
            continue;
        }
        sums all = {0, 0};
        for (size_t from = 0, m; from < n; from += m) {
            m = n - from < piece ? n - from : piece;
            const float *v = widened(x, (i * k + my.c0) * s + from, m, dtype, buffer);
            sums one = sum(v, v, m);
            all.v += one.v;
            all.vx += one.vx;
        }
        moments(gathered(all, parts, i, together), k * s, &mean, &rstd);
        for (size_t j = my.c0; j < my.c1; j++)
            for (size_t from = 0, m; from < s; from += m) {
                size_t c = together ? my.c0 + my.c1 - 1 - j : j; /* from the end, which is still in a cache */
                size_t at = (i * k + c) * s + from;
                m = s - from < piece ? s - from : piece;
                const float *v = widened(x, at, m, dtype, buffer);
                float *out = dtype == FLOAT32 ? (float *) y + at : buffer, scale = rstd * weight[c];
                apply(out, v, NULL, m, scale, 0, bias[c] - mean * scale, silu, streamed);
                if (dtype != FLOAT32) narrow((uint16_t *) y + at, out, m, dtype);
            }
    }
    _mm_sfence();
}

void forward(char *y, const char *x, size_t slabs, size_t k, size_t s, size_t groups, const float *w, const float *b,
             size_t dtype, size_t silu, size_t streamed, size_t together, size_t threads)
{
    sums parts[2 * threads];
#pragma omp parallel num_threads(threads)
    {
        if (dtype == FLOAT32)
            part_of_forward(y, x, slabs, k, s, groups, w, b, FLOAT32, silu, streamed, together, parts);
        else if (dtype == FLOAT16)
            part_of_forward(y, x, slabs, k, s, groups, w, b, FLOAT16, silu, 0, together, parts);
        else
            part_of_forward(y, x, slabs, k, s, groups, w, b, BFLOAT16, silu, 0, together, parts);
    }
}

/* The gradient of slabs of k channels of s values; a row of dw and db for each sample. */
void backward(float *dx, const float *dy, const float *x, size_t slabs, size_t k, size_t s, size_t groups,
              const float *w, const float *mean, const float *rstd, float *dw, float *db, size_t streamed,
              size_t together, size_t threads)
{
    sums parts[2 * threads];
#pragma omp parallel num_threads(threads)
    {
        share my = shared(slabs, k, together);
        for (size_t i = my.i0; i < my.i1; i++) {
            const float *v = dy + i * k * s, *u = x + i * k * s, *weight = w + i % groups * k;
            float *out = dx + i * k * s, m = mean[i], r = rstd[i];
            sums all = {0, 0}; /* of w * dy and of w * dy * xhat */
            for (size_t c = my.c0; c < my.c1 && s > 1; c++) {
                sums one = sum(v + c * s, u + c * s, s);
                db[i * k + c] = one.v;
                dw[i * k + c] = (one.vx - m * one.v) * r;
                all.v += weight[c] * db[i * k + c];
                all.vx += weight[c] * dw[i * k + c];
            }
            for (size_t c = 0; c < k && s == 1; c++) {
                float xhat = (u[c] - m) * r;
                db[i * k + c] = v[c];
                dw[i * k + c] = v[c] * xhat;
                all.v += weight[c] * v[c];
                all.vx += weight[c] * v[c] * xhat;
            }
            all = gathered(all, parts, i, together);
            float b = -r * r * all.vx / (k * s), a = -r * all.v / (k * s) - m * b;
            for (size_t c = 0; c < k && s == 1; c++) out[c] = r * weight[c] * v[c] + u[c] * b + a;
            for (size_t j = my.c0; j < my.c1 && s > 1; j++) {
                size_t c = together ? my.c0 + my.c1 - 1 - j : j;
                apply(out + c * s, v + c * s, u + c * s, s, r * weight[c], b, a, 0, streamed);
            }
        }
        _mm_sfence();
    }
}

/* ---- the two sweeps, channels last --------------------------------------------------------------------------- */

/* Add rows of v and of v * x to sums of n channels, eight rows in one go. */
static void add_rows(float *restrict a, float *restrict b, const float *restrict v, const float *restrict x,
                     size_t rows, size_t n)
{
    size_t r = 0;
    for (; r + 8 <= rows; r += 8, v += 8 * n, x += 8 * n)
        for (size_t c = 0; c < n; c++) {
            float sum = 0, product = 0;
#pragma GCC unroll 8
            for (size_t j = 0; j < 8; j++) { sum += v[j * n + c]; product += v[j * n + c] * x[j * n + c]; }
            a[c] += sum;
            b[c] += product;
        }
    for (; r < rows; r++, v += n, x += n)
        for (size_t c = 0; c < n; c++) { a[c] += v[c]; b[c] += v[c] * x[c]; }
}

/* y = v * a + b, four rows in one go. */
static void apply_rows(float *restrict y, const float *restrict v, const float *restrict a, const float *restrict b,
                       size_t rows, size_t n)
{
    size_t r = 0;
    for (; r + 4 <= rows; r += 4, v += 4 * n, y += 4 * n)
        for (size_t c = 0; c < n; c++) {
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++) y[j * n + c] = v[j * n + c] * a[c] + b[c];
        }
    for (; r < rows; r++, v += n, y += n)
        for (size_t c = 0; c < n; c++) y[c] = v[c] * a[c] + b[c];
}

/* Samples of s rows of `channels`; together, the threads share the rows. */
void forward_last(float *y, const float *x, size_t samples, size_t channels, size_t s, size_t groups, const float *w,
                  const float *b, size_t together, size_t threads)
{
    size_t k = channels / groups;
    float parts[2][threads][2][channels];
#pragma omp parallel num_threads(threads)
    {
        float scale[channels], shift[channels];
        share my = shared(samples, s, together);
        size_t n = omp_get_num_threads(), t = omp_get_thread_num();
        for (size_t i = my.i0; i < my.i1; i++) {
            float (*row)[2][channels] = parts[i % 2]; /* of each thread, as in `gathered` */
            const float *v = x + (i * s + my.c0) * channels;
            memset(row[t], 0, sizeof row[t]);
            add_rows(row[t][0], row[t][1], v, v, my.c1 - my.c0, channels);
            if (together) {
#pragma omp barrier
            }
            for (size_t g = 0; g < groups; g++) {
                sums all = {0, 0};
                for (size_t p = together ? 0 : t; p < (together ? n : t + 1); p++)
                    for (size_t c = g * k; c < (g + 1) * k; c++) { all.v += row[p][0][c]; all.vx += row[p][1][c]; }
                float mean, rstd;
                moments(all, k * s, &mean, &rstd);
                for (size_t c = g * k; c < (g + 1) * k; c++) {
                    scale[c] = rstd * w[c];
                    shift[c] = b[c] - mean * scale[c];
                }
            }
            apply_rows(y + (i * s + my.c0) * channels, v, scale, shift, my.c1 - my.c0, channels);
        }
    }
}
