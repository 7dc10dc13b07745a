/* OpenMP, or its absence; fork; and the CPU's instruction sets.  Only the
   entry points include this file: the kernels know nothing of threads. */
#ifndef GN_FAST_THREADS_H
#define GN_FAST_THREADS_H

#include <stdint.h>
#include <stdlib.h>

#include "ieee.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#define GN_PTHREADS 1
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define GN_OPENMP _OPENMP
#else
#define GN_OPENMP 0
static inline int omp_get_max_threads(void) { return 1; }
#endif

/* How many CPUs the process may run on now: libomp's omp_get_num_procs knows how many there were at first. */
static inline int gn_processors(void) {
#if GN_OPENMP && defined(__linux__)
    cpu_set_t cpus;
    if (!sched_getaffinity(0, sizeof cpus, &cpus)) return CPU_COUNT(&cpus);
#endif
#if GN_OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

/* The one parallel loop. Cython's prange would also write the last value of its variable to the caller's. */
static inline void gn_share(int threads, void (*work)(const void *plan, int thread), const void *plan) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int thread = 0; thread < threads; thread++) work(plan, thread);
}

/* A word that threads read and replace, whole, without a lock. */
static inline void *gn_load(void **word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void gn_store(void **word, void *value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

/* Where the system refuses a thread, OpenMP's libraries end the process.  So before they start more for a thread that
   calls than they did before (each caller has workers of its own), as many are started here, at once, and end. */
#if GN_OPENMP && defined(GN_PTHREADS)
static _Thread_local int gn_started = 1;
static void *gn_wait(void *gate) {
    pthread_mutex_lock((pthread_mutex_t *)gate);
    pthread_mutex_unlock((pthread_mutex_t *)gate);
    return NULL;
}
static int gn_can_start(int threads) { /* threads - gn_started of them, each waiting for the gate */
    if (threads <= gn_started) return 1;
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    int wanted = threads - gn_started, count = 0;
    pthread_t *each = (pthread_t *)malloc((size_t)wanted * sizeof(pthread_t));
    if (!each) return 0;
    pthread_mutex_lock(&gate);
    while (count < wanted && !pthread_create(&each[count], NULL, gn_wait, &gate)) count++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < count; i++) pthread_join(each[i], NULL);
    free(each);
    if (count == wanted) gn_started = threads;
    return count == wanted;
}
#else
static inline int gn_can_start(int threads) { (void)threads; return 1; }
#endif

/* libgomp's worker threads do not survive a fork, and a child that opens a parallel region waits for them
   for ever.  Releasing the workers before every fork (they are started again on demand) cures it. */
#if GN_OPENMP && (GN_OPENMP >= 201811 || __GNUC__ >= 9) && defined(GN_PTHREADS)
static void gn_release_workers(void) {
    omp_pause_resource_all(omp_pause_soft);
    gn_started = 1;
}
static inline int gn_survive_fork(void) { return pthread_atfork(gn_release_workers, NULL, NULL); }
#else
static inline int gn_survive_fork(void) { return 0; }
#endif

/* The floating-point mode: flush-to-zero, denormals-are-zero, rounding and traps. Each thread has one of its own, so a
   call's threads take the caller's for its time. gn_leave also orders streamed stores before whatever comes next. */
#if defined(__x86_64__)
static inline unsigned gn_mode(void) { return _mm_getcsr() & 0xFFC0u; }
static inline void gn_set_mode(unsigned mode) { _mm_setcsr((_mm_getcsr() & ~0xFFC0u) | mode); }
static inline void gn_order_stores(void) { _mm_sfence(); }
#elif defined(__aarch64__)
static inline unsigned gn_mode(void) { uint64_t v; __asm__ volatile("mrs %0, fpcr" : "=r"(v)); return (unsigned)v; }
static inline void gn_set_mode(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode)); }
static inline void gn_order_stores(void) {}
#else
static inline unsigned gn_mode(void) { return 0; }
static inline void gn_set_mode(unsigned mode) { (void)mode; }
static inline void gn_order_stores(void) {}
#endif
static inline unsigned gn_enter_mode(unsigned mode) {
    unsigned before = gn_mode();
    if (before != mode) gn_set_mode(mode);
    return before;
}
static inline void gn_leave(unsigned before) {
    gn_order_stores();
    if (gn_mode() != before) gn_set_mode(before);
}

/* The x86-64 psABI level that both the CPU and the operating system support: 2, 3 or 4 (1 for less, 0 on
   other machines, and where only the baseline was built).  Bits: Intel SDM volume 2, CPUID; x86-64 psABI, table 3.1. */
static inline int gn_x86_64_level(void) {
#if defined(__x86_64__) && !defined(GN_BASELINE)
    unsigned a, b, c, d, b7, x, xcr0 = 0, top;
    const unsigned v2 = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23; /* sse3 ssse3 cx16 sse4.1 sse4.2 popcnt */
    const unsigned v3 = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;          /* fma movbe osxsave avx f16c */
    const unsigned v3_7 = 1u << 3 | 1u << 5 | 1u << 8;                                  /* bmi1 avx2 bmi2 */
    const unsigned v4_7 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;        /* avx512 f dq cd bw vl */
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & v2) != v2) return 1;
    if ((c & v3) != v3 || !__get_cpuid_count(7, 0, &a, &b7, &x, &d)) return 2;
    if (!__get_cpuid(0x80000001u, &a, &b, &top, &d) || !(top & 1u << 5)) return 2; /* lzcnt */
    __asm__("xgetbv" : "=a"(xcr0), "=d"(d) : "c"(0));
    if ((b7 & v3_7) != v3_7 || (xcr0 & 0x06) != 0x06) return 2; /* the system saves ymm */
    return (b7 & v4_7) == v4_7 && (xcr0 & 0xE6) == 0xE6 ? 4 : 3; /* and zmm and the masks */
#else
    return 0;
#endif
}

#endif
