/* The memory of large outputs: blocks that were in use before, so that the system need not map and clear their
   pages again.  A data-memory handler for NumPy (NEP 49), its own records and its lock; only _core includes
   this file, and pool.pxi says which arrays come from here. */
#ifndef GN_FAST_POOL_H
#define GN_FAST_POOL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "numpy/ndarraytypes.h"

/* Bytes that may be kept free: 0, so no pool, until gn_pool_open. */
static size_t gn_pool_limit = 0;

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#define GN_HUGE_PAGE ((size_t)1 << 21)
#define GN_MOST_KEPT 256 /* blocks: searching all takes 0.4 us, the shortest call with an output from here 7 */

/* A block is a page whose last bytes are this header, and the data.  The capacity is recorded here because the size
   that NumPy passes to free is that of the array's shape by then, not what it asked malloc for. */
typedef struct {
    size_t capacity;
} gn_header;

static pthread_mutex_t gn_pool_lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static size_t gn_kept_bytes = 0;
static int gn_kept_count = 0;
static struct {
    size_t capacity; /* again, so that a search stays out of the blocks' own pages */
    char *data;
} gn_kept[GN_MOST_KEPT]; /* the first one was freed the longest ago */

static inline gn_header *gn_header_of(void *data) { return (gn_header *)data - 1; }

/* Bytes asked for, rounded up to a multiple of an eighth of the power of two below them (from 128 KiB on, where
   pool.pxi begins): sizes that differ a little share blocks.  A new block is at most an eighth too large, a kept one
   about a quarter. */
static inline size_t gn_capacity_for(size_t bytes) {
    size_t step = 1 << 14;
    while (step <= bytes / 16) step *= 2;
    return bytes ? (bytes + step - 1) / step * step : step;
}

/* Mapped, not from malloc: once such a block was freed, glibc takes the next from its heap, up to 32 MiB, of which
   the system gets back what happens to lie at the end.  Mapped memory goes back for sure, and comes zeroed. */
static inline char *gn_map(size_t capacity) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), align = capacity < GN_HUGE_PAGE ? page : GN_HUGE_PAGE, before;
    char *start, *data;
    if (capacity > PTRDIFF_MAX - align) return NULL;
    start = mmap(NULL, align + capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return NULL;
    before = align - (uintptr_t)start % align;
    data = start + before;
    if (before > page) munmap(start, before - page);
    if (before < align) munmap(data + capacity, align - before);
#ifdef MADV_HUGEPAGE
    if (align == GN_HUGE_PAGE) madvise(data, capacity, MADV_HUGEPAGE);
#endif
    gn_header_of(data)->capacity = capacity;
    return data;
}

static inline void gn_unmap(char *data) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    munmap(data - page, page + gn_header_of(data)->capacity);
}

/* With the lock held. */
static inline char *gn_no_longer_kept(int i) {
    char *data = gn_kept[i].data;
    gn_kept_bytes -= gn_kept[i].capacity;
    gn_kept_count--;
    memmove(gn_kept + i, gn_kept + i + 1, (size_t)(gn_kept_count - i) * sizeof gn_kept[0]);
    return data;
}

static inline void gn_unmap_all_kept(void) {
    while (gn_kept_count) gn_unmap(gn_no_longer_kept(gn_kept_count - 1));
}

static inline void gn_pool_clear(void) {
    pthread_mutex_lock(&gn_pool_lock);
    gn_unmap_all_kept();
    pthread_mutex_unlock(&gn_pool_lock);
}

static inline size_t gn_pool_kept(void) {
    size_t bytes;
    pthread_mutex_lock(&gn_pool_lock);
    bytes = gn_kept_bytes;
    pthread_mutex_unlock(&gn_pool_lock);
    return bytes;
}

/* The block freed last of those that are large enough and at most an eighth larger: the likeliest to be in a
   cache.  A new one if there is none; `fresh` tells. */
static inline char *gn_take(size_t bytes, int *fresh) {
    size_t capacity = gn_capacity_for(bytes);
    char *data = NULL;
    int i;
    if (bytes > PTRDIFF_MAX) return NULL;
    pthread_mutex_lock(&gn_pool_lock);
    for (i = gn_kept_count - 1; i >= 0 && data == NULL; i--)
        if (gn_kept[i].capacity >= capacity && gn_kept[i].capacity <= capacity + capacity / 8)
            data = gn_no_longer_kept(i);
    pthread_mutex_unlock(&gn_pool_lock);
    *fresh = data == NULL;
    if (data == NULL) data = gn_map(capacity);
    if (data == NULL) {
        gn_pool_clear(); /* memory is short: what is kept may be what is missing */
        data = gn_map(capacity);
    }
    return data;
}

/* ---- the handler ------------------------------------------------------------------------------------ */

static void *gn_pool_malloc(void *ctx, size_t bytes) {
    int fresh;
    (void)ctx;
    return gn_take(bytes, &fresh);
}

static void *gn_pool_calloc(void *ctx, size_t count, size_t size) {
    int fresh;
    char *data;
    (void)ctx;
    if (size && count > PTRDIFF_MAX / size) return NULL;
    data = gn_take(count * size, &fresh);
    return data == NULL || fresh ? data : memset(data, 0, count * size);
}

static void gn_pool_free(void *ctx, void *data, size_t untrusted) {
    size_t capacity;
    (void)ctx, (void)untrusted;
    if (data == NULL) return;
    capacity = gn_header_of(data)->capacity;
    if (capacity > gn_pool_limit) {
        gn_unmap(data);
        return;
    }
    pthread_mutex_lock(&gn_pool_lock);
    while (gn_kept_count == GN_MOST_KEPT || gn_kept_bytes > gn_pool_limit - capacity) gn_unmap(gn_no_longer_kept(0));
    gn_kept[gn_kept_count].capacity = capacity;
    gn_kept[gn_kept_count++].data = data;
    gn_kept_bytes += capacity;
    pthread_mutex_unlock(&gn_pool_lock);
}

static void *gn_pool_realloc(void *ctx, void *data, size_t bytes) {
    size_t capacity, wanted = gn_capacity_for(bytes);
    void *moved;
    if (data == NULL) return gn_pool_malloc(ctx, bytes);
    capacity = gn_header_of(data)->capacity;
    if (capacity >= wanted && capacity <= wanted + wanted / 8) return data;
    moved = gn_pool_malloc(ctx, bytes);
    if (moved == NULL) return bytes <= capacity ? data : NULL;
    memcpy(moved, data, bytes < capacity ? bytes : capacity);
    gn_pool_free(ctx, data, capacity);
    return moved;
}

static PyDataMem_Handler gn_pool_handler = {
    "gn_fast pool", 1, {NULL, gn_pool_malloc, gn_pool_calloc, gn_pool_realloc, gn_pool_free}};

/* ---- fork ------------------------------------------------------------------------------------------- */

/* The lock is held across a fork, so that no thread that the child lacks can have it.  The child keeps nothing:
   the first write to each page would copy what is in it only to overwrite it. */
static void gn_before_fork(void) { pthread_mutex_lock(&gn_pool_lock); }
static void gn_in_parent(void) { pthread_mutex_unlock(&gn_pool_lock); }
static void gn_in_child(void) {
    gn_unmap_all_kept();
    pthread_mutex_unlock(&gn_pool_lock);
}

static inline void gn_pool_open(size_t limit) {
    if (pthread_atfork(gn_before_fork, gn_in_parent, gn_in_child) == 0) gn_pool_limit = limit;
}

#else /* no pool: outputs come from NumPy's own handler */
static PyDataMem_Handler gn_pool_handler;
static inline void gn_pool_open(size_t limit) { (void)limit; }
static inline void gn_pool_clear(void) {}
static inline size_t gn_pool_kept(void) { return 0; }
#endif

#endif
