/* The one place for what C, the compiler and the machine do differently: CPU detection, OpenMP or its
   absence, fork, cache hints, and the conversions to and from the 16-bit types.  No arithmetic of the
   normalization lives here. */
#ifndef GN_FAST_PORT_H
#define GN_FAST_PORT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

/* ---- bits ------------------------------------------------------------------------------------- */

static inline float gn_float_of_bits(uint32_t u) { float f; memcpy(&f, &u, sizeof f); return f; }
static inline uint32_t gn_bits_of_float(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

/* The power of two at or below a normal positive v; 1 for zero, subnormals, inf and NaN. */
static inline double gn_power_of_two(double v) {
    uint64_t u;
    memcpy(&u, &v, sizeof u);
    u &= UINT64_C(0x7FF0000000000000);
    if (u == 0 || u == UINT64_C(0x7FF0000000000000)) return 1.0;
    memcpy(&v, &u, sizeof v);
    return v;
}

/* ---- float16 and bfloat16 ----------------------------------------------------------------------- */

typedef struct { uint16_t bits; } gn_half;
typedef struct { uint16_t bits; } gn_bfloat;

/* Branch-free, free of subnormal float32 operands (so DAZ does not matter); signalling NaNs become quiet,
   as F16C does it. */
static inline float gn_from_half(gn_half half) {
    uint32_t h = half.bits;
    uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7FFFu) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude | 0x7F800000u | (magnitude > 0x0F800000u ? 0x00400000u : 0u);
    uint32_t subnormal = gn_bits_of_float(gn_float_of_bits(magnitude + (113u << 23)) - gn_float_of_bits(113u << 23));
    uint32_t u = magnitude < 0x00800000u ? subnormal : magnitude >= 0x0F800000u ? special : normal;
    return gn_float_of_bits(sign | u);
}

/* Round to nearest even.  Below 2^-14 adding 0.5 lets the FPU round at the half's fixed spacing of 2^-24. */
static inline gn_half gn_to_half(float f) {
    uint32_t u = gn_bits_of_float(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7FFFFFFFu;
    uint32_t nan = 0x7E00u | ((u >> 13) & 0x03FFu);
    uint32_t normal = (u - (112u << 23) + 0x0FFFu + ((u >> 13) & 1u)) >> 13;
    uint32_t subnormal = gn_bits_of_float(gn_float_of_bits(u) + 0.5f) - gn_bits_of_float(0.5f);
    uint32_t h = u < (113u << 23) ? subnormal : u < 0x477FF000u ? normal : u <= 0x7F800000u ? 0x7C00u : nan;
    return (gn_half){(uint16_t)(sign | h)};
}

static inline float gn_from_bfloat(gn_bfloat b) { return gn_float_of_bits((uint32_t)b.bits << 16); }

/* Round to nearest even, in the upper half; every NaN becomes the one of ones, which takes no choice. */
static inline uint32_t gn_round_to_bfloat(float f) {
    uint32_t u = gn_bits_of_float(f);
    return (u + 0x7FFFu + ((u >> 16) & 1u)) | (f == f ? 0u : 0xFFFFFFFFu);
}

static inline void gn_widen_bfloat(const gn_bfloat *b, float *f, int n) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + 16 <= n; i += 16) {  /* 16 values laid out so that their halves need not be moved after they are parted */
        __m256i u = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(b + i)), 0xD8), zero = _mm256_setzero_si256();
        _mm256_storeu_ps(f + i, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, u)));
        _mm256_storeu_ps(f + i + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, u)));
    }
#endif
    for (; i < n; i++) f[i] = gn_from_bfloat(b[i]);
}

static inline void gn_narrow_bfloat(const float *f, gn_bfloat *b, int n) {
#if defined(__AVX2__)
    for (; n >= 32; n -= 32, f += 32, b += 32) {  /* GCC would cut off upper halves that are empty */
        uint32_t u[32];
        for (int j = 0; j < 32; j++) u[j] = gn_round_to_bfloat(f[j]) >> 16;
        for (int j = 0; j < 32; j += 16)
            _mm256_storeu_si256((__m256i *)(b + j), _mm256_permute4x64_epi64(_mm256_packus_epi32(
                _mm256_loadu_si256((const __m256i *)(u + j)), _mm256_loadu_si256((const __m256i *)(u + j + 8))), 0xD8));
    }
#endif
    for (int j = 0; j < n; j++) b[j].bits = (uint16_t)(gn_round_to_bfloat(f[j]) >> 16);
}

static inline void gn_widen_half(const gn_half *h, float *f, int n) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(f + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
    for (; i < n; i++) f[i] = gn_from_half(h[i]);
}

static inline void gn_narrow_half(const float *f, gn_half *h, int n) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(h + i), _mm512_cvtps_ph(_mm512_loadu_ps(f + i), 0));
#elif defined(__F16C__)
    for (; i + 16 <= n; i += 16)  /* in one store: what is streamed is loaded 32 bytes at a time */
        _mm256_storeu_si256((__m256i *)(h + i), _mm256_set_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(f + i + 8), 0),
                                                                 _mm256_cvtps_ph(_mm256_loadu_ps(f + i), 0)));
#endif
    for (; i < n; i++) h[i] = gn_to_half(f[i]);
}

/* ---- lanes ---------------------------------------------------------------------------------------- */

/* Values of 16 bits that are widened as they are loaded, where a processor can, and worked on at once: +, - and * are those
   of C. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define GN_FLOATS 16
typedef __m512 gn_floats;
static inline gn_floats gn_floats_of_halfs(const gn_half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline gn_floats gn_floats_of_bfloats(const gn_bfloat *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
#elif defined(__GNUC__) && defined(__AVX2__) && defined(__F16C__)
#define GN_FLOATS 8
typedef __m256 gn_floats;
static inline gn_floats gn_floats_of_halfs(const gn_half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline gn_floats gn_floats_of_bfloats(const gn_bfloat *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
#else
#define GN_FLOATS 1
typedef float gn_floats;
static inline gn_floats gn_floats_of_halfs(const gn_half *p) { return gn_from_half(*p); }
static inline gn_floats gn_floats_of_bfloats(const gn_bfloat *p) { return gn_from_bfloat(*p); }
#endif

/* Values of float64 that are worked on at once: +, - and * are those of C. Floats are widened as they are loaded, which a
   compiler would do in registers: there the upper half has to be moved first, and a sum of floats takes a third longer. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define GN_LANES 8
typedef __m512d gn_lanes;
static inline gn_lanes gn_lanes_of_floats(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline void gn_floats_of_lanes(float *p, gn_lanes v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
#elif defined(__GNUC__) && defined(__AVX__)
#define GN_LANES 4
typedef __m256d gn_lanes;
static inline gn_lanes gn_lanes_of_floats(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline void gn_floats_of_lanes(float *p, gn_lanes v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
#elif defined(__GNUC__) && defined(__SSE2__)
#define GN_LANES 2
typedef __m128d gn_lanes;
static inline gn_lanes gn_lanes_of_floats(const float *p) {
    return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
}
static inline void gn_floats_of_lanes(float *p, gn_lanes v) { _mm_storel_epi64((__m128i *)p, _mm_castps_si128(_mm_cvtpd_ps(v))); }
#else
#define GN_LANES 1
typedef double gn_lanes;
static inline gn_lanes gn_lanes_of_floats(const float *p) { return *p; }
static inline void gn_floats_of_lanes(float *p, gn_lanes v) { *p = (float)v; }
#endif

static inline gn_lanes gn_lanes_of_doubles(const double *p) { gn_lanes v; memcpy(&v, p, sizeof v); return v; }
static inline void gn_store_lanes(double *p, gn_lanes v) { memcpy(p, &v, sizeof v); }

/* ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])) */
static inline double gn_total_of_eight(const double *p) {
#if defined(__AVX__)
    __m256d four = _mm256_add_pd(_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
#elif defined(__SSE2__)
    __m128d two = _mm_add_pd(_mm_add_pd(_mm_loadu_pd(p), _mm_loadu_pd(p + 4)), _mm_add_pd(_mm_loadu_pd(p + 2), _mm_loadu_pd(p + 6)));
#else
    const double two[2] = {(p[0] + p[4]) + (p[2] + p[6]), (p[1] + p[5]) + (p[3] + p[7])};
    return two[0] + two[1];
#endif
#if defined(__SSE2__)
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
#endif
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* Ask for memory to be brought to the level 2 cache. */
static inline void gn_prefetch(const char *from, ptrdiff_t bytes) {
#if defined(__GNUC__)
    for (ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
#endif
}

/* Bytes from an address to the next line of the caches. */
static inline ptrdiff_t gn_before_line(const void *p) { return (ptrdiff_t)(-(uintptr_t)p & 63); }

/* memcpy of whole lines whose stores bypass the caches: no line is read only to be overwritten.  gn_stream_end
   orders the stores before whatever the thread does next. */
static inline void gn_stream_lines(void *to, const void *from, size_t bytes) {
#if defined(__AVX512F__)
    for (size_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512((void *)((char *)to + i), _mm512_loadu_si512((const char *)from + i));
#elif defined(__AVX__)
    for (size_t i = 0; i < bytes; i += 32)
        _mm256_stream_si256((__m256i *)((char *)to + i), _mm256_loadu_si256((const __m256i *)((const char *)from + i)));
#elif defined(__SSE2__)
    for (size_t i = 0; i < bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)to + i), _mm_loadu_si128((const __m128i *)((const char *)from + i)));
#else
    memcpy(to, from, bytes);
#endif
}

/* The same of any bytes; those of lines that are not whole take the usual way. */
static inline void gn_stream(void *to, const void *from, size_t bytes) {
    size_t head = (size_t)gn_before_line(to), lines;
    if (head > bytes) head = bytes;
    lines = (bytes - head) & ~(size_t)63;
    memcpy(to, from, head);
    gn_stream_lines((char *)to + head, (const char *)from + head, lines);
    memcpy((char *)to + head + lines, (const char *)from + head + lines, bytes - head - lines);
}

static inline void gn_stream_end(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#endif
