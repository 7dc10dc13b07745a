/* The vectors in which the kernel's hot loops are written: their arithmetic, and how they are loaded from and stored to
   each type of values in memory. Here, and only here, is what C, compilers and processors do differently.

   A vector has the width of the instruction set: GN_FLOATS float32 or GN_DOUBLES float64 values. C's +, - and * work on
   them (GCC's and Clang's vector extensions); what they lack is below. Sums are always taken in 16 lanes, whatever the
   width, so that every width gives the same bits. */
#ifndef GN_FAST_VECTOR_H
#define GN_FAST_VECTOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ieee.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GN_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GN_BYTES 32
#else
#define GN_BYTES 16
#endif
enum { GN_FLOATS = GN_BYTES / 4, GN_DOUBLES = GN_BYTES / 8 };

typedef float gn_floats __attribute__((vector_size(GN_BYTES)));
typedef double gn_doubles __attribute__((vector_size(GN_BYTES)));
typedef int32_t gn_ints __attribute__((vector_size(GN_BYTES)));
typedef int64_t gn_longs __attribute__((vector_size(GN_BYTES)));

/* ---- arithmetic --------------------------------------------------------------------------------- */

static inline gn_floats gn_all_floats(float v) { return v - (gn_floats){0}; } /* - keeps the sign of 0 */
static inline gn_doubles gn_all_doubles(double v) { return v - (gn_doubles){0}; }
static inline gn_floats gn_abs_floats(gn_floats a) { return (gn_floats)((gn_ints)a & 0x7FFFFFFF); }
static inline gn_doubles gn_abs_doubles(gn_doubles a) { return (gn_doubles)((gn_longs)a & INT64_C(0x7FFFFFFFFFFFFFFF)); }
/* The number in the low bits, moved to where the exponent is. */
static inline gn_floats gn_exponent_floats(gn_floats a) { return (gn_floats)((gn_ints)a << 23); }
static inline gn_doubles gn_exponent_doubles(gn_doubles a) { return (gn_doubles)((gn_longs)a << 52); }

/* a * b + c, rounded once where the processor can; x86-64-v2 rounds twice.
   least, most: a if it is less (more) than b, else b, so b where one is NaN. where_at_most: a <= b ? x : y. */
#if GN_BYTES == 64
static inline gn_floats gn_fma_floats(gn_floats a, gn_floats b, gn_floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline gn_doubles gn_fma_doubles(gn_doubles a, gn_doubles b, gn_doubles c) { return _mm512_fmadd_pd(a, b, c); }
static inline gn_doubles gn_sqrt_doubles(gn_doubles a) { return _mm512_sqrt_pd(a); }
static inline int gn_any_less(gn_doubles a, gn_doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ) != 0; }
static inline gn_floats gn_least_floats(gn_floats a, gn_floats b) { return _mm512_min_ps(a, b); }
static inline gn_doubles gn_least_doubles(gn_doubles a, gn_doubles b) { return _mm512_min_pd(a, b); }
static inline gn_floats gn_most_floats(gn_floats a, gn_floats b) { return _mm512_max_ps(a, b); }
static inline gn_doubles gn_most_doubles(gn_doubles a, gn_doubles b) { return _mm512_max_pd(a, b); }
static inline gn_floats gn_where_at_most_floats(gn_floats a, gn_floats b, gn_floats x, gn_floats y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x);
}
static inline gn_doubles gn_where_at_most_doubles(gn_doubles a, gn_doubles b, gn_doubles x, gn_doubles y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), y, x);
}
#elif GN_BYTES == 32
static inline gn_floats gn_fma_floats(gn_floats a, gn_floats b, gn_floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline gn_doubles gn_fma_doubles(gn_doubles a, gn_doubles b, gn_doubles c) { return _mm256_fmadd_pd(a, b, c); }
static inline gn_doubles gn_sqrt_doubles(gn_doubles a) { return _mm256_sqrt_pd(a); }
static inline int gn_any_less(gn_doubles a, gn_doubles b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_LT_OQ)) != 0; }
static inline gn_floats gn_least_floats(gn_floats a, gn_floats b) { return _mm256_min_ps(a, b); }
static inline gn_doubles gn_least_doubles(gn_doubles a, gn_doubles b) { return _mm256_min_pd(a, b); }
static inline gn_floats gn_most_floats(gn_floats a, gn_floats b) { return _mm256_max_ps(a, b); }
static inline gn_doubles gn_most_doubles(gn_doubles a, gn_doubles b) { return _mm256_max_pd(a, b); }
static inline gn_floats gn_where_at_most_floats(gn_floats a, gn_floats b, gn_floats x, gn_floats y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
static inline gn_doubles gn_where_at_most_doubles(gn_doubles a, gn_doubles b, gn_doubles x, gn_doubles y) {
    return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LE_OQ));
}
#else
static inline gn_floats gn_fma_floats(gn_floats a, gn_floats b, gn_floats c) {
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < GN_FLOATS; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
static inline gn_doubles gn_fma_doubles(gn_doubles a, gn_doubles b, gn_doubles c) {
#if defined(__FP_FAST_FMA) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < GN_DOUBLES; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
static inline int gn_any_less(gn_doubles a, gn_doubles b) {
    int any = 0;
    for (int i = 0; i < GN_DOUBLES; i++) any |= a[i] < b[i];
    return any;
}
static inline gn_doubles gn_sqrt_doubles(gn_doubles a) {
    for (int i = 0; i < GN_DOUBLES; i++) a[i] = sqrt(a[i]);
    return a;
}
static inline gn_floats gn_choose_floats(gn_ints m, gn_floats x, gn_floats y) { return (gn_floats)(((gn_ints)x & m) | ((gn_ints)y & ~m)); }
static inline gn_doubles gn_choose_doubles(gn_longs m, gn_doubles x, gn_doubles y) { return (gn_doubles)(((gn_longs)x & m) | ((gn_longs)y & ~m)); }
static inline gn_floats gn_least_floats(gn_floats a, gn_floats b) { return gn_choose_floats(a < b, a, b); }
static inline gn_doubles gn_least_doubles(gn_doubles a, gn_doubles b) { return gn_choose_doubles(a < b, a, b); }
static inline gn_floats gn_most_floats(gn_floats a, gn_floats b) { return gn_choose_floats(a > b, a, b); }
static inline gn_doubles gn_most_doubles(gn_doubles a, gn_doubles b) { return gn_choose_doubles(a > b, a, b); }
static inline gn_floats gn_where_at_most_floats(gn_floats a, gn_floats b, gn_floats x, gn_floats y) { return gn_choose_floats(a <= b, x, y); }
static inline gn_doubles gn_where_at_most_doubles(gn_doubles a, gn_doubles b, gn_doubles x, gn_doubles y) { return gn_choose_doubles(a <= b, x, y); }
#endif

/* ---- float16 and bfloat16, a value at a time ------------------------------------------------------ */

typedef struct { uint16_t bits; } gn_half;
typedef struct { uint16_t bits; } gn_bfloat;

static inline float gn_float_of_bits(uint32_t u) { float f; memcpy(&f, &u, sizeof f); return f; }
static inline uint32_t gn_bits_of_float(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

/* Branch-free, free of subnormal float32 operands (so DAZ does not matter); signalling NaNs become quiet, as F16C does. */
static inline float gn_from_half(gn_half half) {
    uint32_t h = half.bits;
    uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7FFFu) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude | 0x7F800000u | (magnitude > 0x0F800000u ? 0x00400000u : 0u);
    uint32_t subnormal = gn_bits_of_float(gn_float_of_bits(magnitude + (113u << 23)) - gn_float_of_bits(113u << 23));
    uint32_t u = magnitude < 0x00800000u ? subnormal : magnitude >= 0x0F800000u ? special : normal;
    return gn_float_of_bits(sign | u);
}

/* Round to nearest even. Below 2^-14 adding 0.5 lets the FPU round at the half's fixed spacing of 2^-24. */
static inline gn_half gn_to_half(float f) {
    uint32_t u = gn_bits_of_float(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7FFFFFFFu;
    uint32_t nan = 0x7E00u | ((u >> 13) & 0x03FFu);
    uint32_t normal = (u - (112u << 23) + 0x0FFFu + ((u >> 13) & 1u)) >> 13;
    uint32_t tiny = u < (113u << 23) ? u : 0; /* no other is added to, so that none raises a floating-point exception */
    uint32_t subnormal = gn_bits_of_float(gn_float_of_bits(tiny) + 0.5f) - gn_bits_of_float(0.5f);
    uint32_t h = u < (113u << 23) ? subnormal : u < 0x477FF000u ? normal : u <= 0x7F800000u ? 0x7C00u : nan;
    return (gn_half){(uint16_t)(sign | h)};
}

static inline float gn_from_bfloat(gn_bfloat b) { return gn_float_of_bits((uint32_t)b.bits << 16); }

/* Round to nearest even; every NaN becomes the one of ones, which takes no choice. */
static inline gn_bfloat gn_to_bfloat(float f) {
    uint32_t u = gn_bits_of_float(f);
    return (gn_bfloat){(uint16_t)(((u + 0x7FFFu + ((u >> 16) & 1u)) | (f == f ? 0u : 0xFFFFFFFFu)) >> 16)};
}

/* ---- loads ---------------------------------------------------------------------------------------- */

static inline gn_floats gn_floats_of_float(const float *p) { gn_floats v; memcpy(&v, p, sizeof v); return v; }
static inline gn_doubles gn_doubles_of_double(const double *p) { gn_doubles v; memcpy(&v, p, sizeof v); return v; }

#if GN_BYTES == 64
static inline gn_doubles gn_doubles_of_float(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline gn_floats gn_floats_of_half(const gn_half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline gn_floats gn_floats_of_bfloat(const gn_bfloat *p) {
    return (gn_floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
static inline gn_doubles gn_doubles_of_half(const gn_half *p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const void *)p))); }
static inline gn_doubles gn_doubles_of_bfloat(const gn_bfloat *p) {
    return _mm512_cvtps_pd((__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
#elif GN_BYTES == 32
static inline gn_doubles gn_doubles_of_float(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline gn_floats gn_floats_of_half(const gn_half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline gn_floats gn_floats_of_bfloat(const gn_bfloat *p) {
    return (gn_floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
}
static inline gn_doubles gn_doubles_of_half(const gn_half *p) { return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const void *)p))); }
static inline gn_doubles gn_doubles_of_bfloat(const gn_bfloat *p) {
    return _mm256_cvtps_pd((__m128)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const void *)p)), 16));
}
#else
static inline gn_doubles gn_doubles_of_float(const float *p) {
    gn_doubles v;
    for (int i = 0; i < GN_DOUBLES; i++) v[i] = p[i];
    return v;
}
static inline gn_floats gn_floats_of_half(const gn_half *p) {
    gn_floats v;
    for (int i = 0; i < GN_FLOATS; i++) v[i] = gn_from_half(p[i]);
    return v;
}
static inline gn_floats gn_floats_of_bfloat(const gn_bfloat *p) {
    gn_floats v;
    for (int i = 0; i < GN_FLOATS; i++) v[i] = gn_from_bfloat(p[i]);
    return v;
}
static inline gn_doubles gn_doubles_of_half(const gn_half *p) {
    gn_doubles v;
    for (int i = 0; i < GN_DOUBLES; i++) v[i] = gn_from_half(p[i]);
    return v;
}
static inline gn_doubles gn_doubles_of_bfloat(const gn_bfloat *p) {
    gn_doubles v;
    for (int i = 0; i < GN_DOUBLES; i++) v[i] = gn_from_bfloat(p[i]);
    return v;
}
#endif

/* ---- stores; streamed ones, to an address that is a multiple of what is stored, pass the caches --------------------- */

static inline void gn_put(void *to, const void *from, size_t bytes, int stream) {
#if defined(__SSE2__)
    if (stream) {
#if GN_BYTES == 64
        if (bytes == 64) _mm512_stream_si512(to, _mm512_loadu_si512(from));
#endif
#if GN_BYTES >= 32
        if (bytes == 32) _mm256_stream_si256(to, _mm256_loadu_si256(from));
#endif
        if (bytes == 16) _mm_stream_si128(to, _mm_loadu_si128(from));
        if (bytes == 8) memcpy(to, from, bytes);
        return;
    }
#endif
    memcpy(to, from, bytes);
}

static inline void gn_floats_to_float(float *p, gn_floats v, int stream) { gn_put(p, &v, sizeof v, stream); }
static inline void gn_doubles_to_double(double *p, gn_doubles v, int stream) { gn_put(p, &v, sizeof v, stream); }
static inline void gn_floats_to_half(gn_half *p, gn_floats v, int stream) {
#if GN_BYTES == 64
    __m256i h = _mm512_cvtps_ph(v, 0);
#elif GN_BYTES == 32
    __m128i h = _mm256_cvtps_ph(v, 0);
#else
    gn_half h[GN_FLOATS];
    for (int i = 0; i < GN_FLOATS; i++) h[i] = gn_to_half(v[i]);
#endif
    gn_put(p, &h, sizeof h, stream);
}
static inline void gn_floats_to_bfloat(gn_bfloat *p, gn_floats v, int stream) {
#if GN_BYTES == 64
    __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    u = _mm512_mask_set1_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), -1);
    __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
#elif GN_BYTES == 32
    __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    u = _mm256_srli_epi32(_mm256_or_si256(u, (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q)), 16);
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
#else
    gn_bfloat h[GN_FLOATS];
    for (int i = 0; i < GN_FLOATS; i++) h[i] = gn_to_bfloat(v[i]);
#endif
    gn_put(p, &h, sizeof h, stream);
}

/* ---- sums ----------------------------------------------------------------------------------------- */

/* Widen a vector of sums, and store it or add it to as many doubles. */
static inline void gn_widen_floats(gn_floats v, gn_doubles *a, gn_doubles *b) {
#if GN_BYTES == 64
    *a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    *b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif GN_BYTES == 32
    *a = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    *b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
    *a = (gn_doubles){v[0], v[1]};
    *b = (gn_doubles){v[2], v[3]};
#endif
}
static inline void gn_put_floats(double *to, gn_floats v) {
    gn_doubles a, b;
    gn_widen_floats(v, &a, &b);
    memcpy(to, &a, sizeof a);
    memcpy(to + GN_DOUBLES, &b, sizeof b);
}
static inline void gn_add_floats(double *to, gn_floats v) {
    gn_doubles a, b;
    gn_widen_floats(v, &a, &b);
    a += gn_doubles_of_double(to);
    b += gn_doubles_of_double(to + GN_DOUBLES);
    memcpy(to, &a, sizeof a);
    memcpy(to + GN_DOUBLES, &b, sizeof b);
}
static inline void gn_add_doubles(double *to, gn_doubles v) {
    v += gn_doubles_of_double(to);
    memcpy(to, &v, sizeof v);
}

/* The sums of two times 16 lanes: those that are 8, 4, 1 and 2 apart are added in turn. */
static inline void gn_total(const double *p, double *first, double *second) {
#if GN_BYTES >= 32
    __m256d a = _mm256_add_pd(_mm256_add_pd(_mm256_loadu_pd(p), _mm256_loadu_pd(p + 8)),
                              _mm256_add_pd(_mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 12)));
    __m256d b = _mm256_add_pd(_mm256_add_pd(_mm256_loadu_pd(p + 16), _mm256_loadu_pd(p + 24)),
                              _mm256_add_pd(_mm256_loadu_pd(p + 20), _mm256_loadu_pd(p + 28)));
    __m256d c = _mm256_hadd_pd(a, b);
    __m128d d = _mm_add_pd(_mm256_castpd256_pd128(c), _mm256_extractf128_pd(c, 1));
    *first = _mm_cvtsd_f64(d);
    *second = _mm_cvtsd_f64(_mm_unpackhi_pd(d, d));
#else
    double t[8];
    for (int j = 0; j < 4; j++) {
        t[j] = (p[j] + p[j + 8]) + (p[j + 4] + p[j + 12]);
        t[4 + j] = (p[j + 16] + p[j + 24]) + (p[j + 20] + p[j + 28]);
    }
    *first = (t[0] + t[1]) + (t[2] + t[3]);
    *second = (t[4] + t[5]) + (t[6] + t[7]);
#endif
}

/* The same of two times 16 lanes of float32 in vectors of their own: four lanes of each are left when they are widened. */
static inline void gn_total_floats(const gn_floats *p, const gn_floats *q, double *first, double *second) {
#if GN_BYTES >= 32
#if GN_BYTES == 64
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(p[0]), _mm512_extractf32x8_ps(p[0], 1));
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(q[0]), _mm512_extractf32x8_ps(q[0], 1));
#else
    __m256 a = _mm256_add_ps(p[0], p[1]), b = _mm256_add_ps(q[0], q[1]);
#endif
    __m256d c = _mm256_hadd_pd(_mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))),
                               _mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1))));
    __m128d d = _mm_add_pd(_mm256_castpd256_pd128(c), _mm256_extractf128_pd(c, 1));
    _mm_store_sd(first, d);
    _mm_storeh_pd(second, d);
#else
    gn_floats a = (p[0] + p[2]) + (p[1] + p[3]), b = (q[0] + q[2]) + (q[1] + q[3]);
    *first = ((double)a[0] + a[1]) + ((double)a[2] + a[3]);
    *second = ((double)b[0] + b[1]) + ((double)b[2] + b[3]);
#endif
}

/* Tell the compiler a fact that it cannot know, so that it leaves out what is made for the contrary. */
static inline void gn_assume(int fact) { if (!fact) __builtin_unreachable(); }

/* ---- memory ----------------------------------------------------------------------------------- */

/* Ask for a line to be brought to the level 1 cache. */
static inline void gn_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

/* Bytes from an address to the next line of the caches. */
static inline ptrdiff_t gn_before_line(const void *p) { return (ptrdiff_t)(-(uintptr_t)p & 63); }

/* memcpy whose stores bypass the caches, so that no line is read only to be overwritten; those of lines that are not
   whole take the usual way. */
static inline void gn_stream(void *to, const void *from, size_t bytes) {
    size_t i = (size_t)gn_before_line(to);
    if (i > bytes) i = bytes;
    memcpy(to, from, i);
    for (; i + 64 <= bytes; i += 64)
        for (size_t j = i; j < i + 64; j += GN_BYTES) gn_put((char *)to + j, (const char *)from + j, GN_BYTES, 1);
    memcpy((char *)to + i, (const char *)from + i, bytes - i);
}

#endif
