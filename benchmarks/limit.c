/* The limit: the bytes that group normalization moves, moved with no arithmetic on the way.  limit.py compiles it. */
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512i vec;
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define STREAM(p, v) _mm512_stream_si512((__m512i *) (p), v)
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i vec;
#define LOAD(p) _mm256_loadu_si256((const __m256i *) (p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *) (p), v)
#define STREAM(p, v) _mm256_stream_si256((__m256i *) (p), v)
#elif defined(__SSE2__)
#include <immintrin.h>
typedef __m128i vec;
#define LOAD(p) _mm_loadu_si128((const __m128i *) (p))
#define STORE(p, v) _mm_storeu_si128((__m128i *) (p), v)
#define STREAM(p, v) _mm_stream_si128((__m128i *) (p), v)
#else /* no non-temporal stores: both ways are plain */
typedef uint64_t vec;
static inline vec LOAD(const char *p) { vec v; memcpy(&v, p, sizeof v); return v; }
#define STORE(p, v) memcpy(p, &(vec){v}, sizeof(vec))
#define STREAM(p, v) STORE(p, v)
#define _mm_sfence() ((void) 0)
#endif

enum { BLOCK = 1 << 18 }; /* bytes swept in one go */

static volatile char seen;

static void look(const char *a, size_t bytes)
{
    vec all = {0};
    for (size_t i = 0; i + sizeof all <= bytes; i += sizeof all) all ^= LOAD(a + i);
    seen = *(char *) &all;
}

static void move_bytes(char *out, const char *x, const char *dy, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) out[i] = dy ? x[i] ^ dy[i] : x[i];
}

/* Not memcpy: on some processors its `rep movsb` takes ten times as long where the addresses are badly aligned. */
static void plain(char *out, const char *x, const char *dy, size_t bytes)
{
    size_t i = 0;
    for (; i + sizeof(vec) <= bytes; i += sizeof(vec)) {
        vec v = LOAD(x + i);
        if (dy) v ^= LOAD(dy + i);
        STORE(out + i, v);
        __asm__ volatile("" ::: "memory"); /* or the compiler would call memcpy */
    }
    move_bytes(out + i, x + i, dy ? dy + i : NULL, bytes - i);
}

static void stream(char *out, const char *x, const char *dy, size_t bytes)
{
    size_t i = -(uintptr_t) out % sizeof(vec);
    if (i > bytes) i = bytes;
    move_bytes(out, x, dy, i);
    if (dy) for (; i + sizeof(vec) <= bytes; i += sizeof(vec)) STREAM(out + i, LOAD(x + i) ^ LOAD(dy + i));
    else for (; i + sizeof(vec) <= bytes; i += sizeof(vec)) STREAM(out + i, LOAD(x + i));
    move_bytes(out + i, x + i, dy ? dy + i : NULL, bytes - i);
}

/* out = x, or x ^ dy, by equal shares of the threads.  With `twice` everything is read a first time, slab by slab,
   and moved from its end, which is then still in a cache. */
void move(char *out, const char *x, const char *dy, size_t slab, size_t slabs, int twice, int streamed, int threads)
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
                size_t bytes = end - at < BLOCK ? end - at : BLOCK;
                (streamed ? stream : plain)(out + at, x + at, dy ? dy + at : NULL, bytes);
            }
        }
        _mm_sfence();
    }
}
