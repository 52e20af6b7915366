/* Threads of the caller's, which do what is to be done in `share_out` together with the one that calls it.
 *
 * They wait awake for a while, since a processor that has gone to sleep takes as long to come back as a small
 * product does: within a pass they hardly ever sleep, and for the network they do. */

#ifndef TPILITE_POOL_H
#define TPILITE_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() __asm__ volatile("yield")
#endif

#define AWAKE_NS 100000

typedef void Work(const void *job, int64_t start, int64_t stop);

typedef struct {
    int64_t n_threads;
    /* What is being done: units 0 to n_units - 1, taken from the front in ever smaller runs. */
    Work *work;
    const void *job;
    int64_t n_units;
    _Atomic int64_t n_left, n_undone; /* that nobody has taken; that are not done */
    /* Who waits asleep, and how often all were called back. */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    _Atomic int64_t n_asleep, n_recalls;
} Pool;

Pool *products_new_pool(int64_t n_threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (pool) {
        pool->n_threads = n_threads;
        pthread_mutex_init(&pool->mutex, NULL);
        pthread_cond_init(&pool->changed, NULL);
    }
    return pool;
}

/* No thread may be in `products_serve` any more. */
void products_free_pool(Pool *pool) {
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->changed);
    free(pool);
}

static int take(Pool *pool, int64_t *start, int64_t *stop) {
    int64_t left = atomic_load(&pool->n_left), n;
    do {
        if (left == 0) return 0;
        n = left / (2 * pool->n_threads);
        n = n ? n : 1;
    } while (!atomic_compare_exchange_weak(&pool->n_left, &left, left - n));
    /* What is being done does not change before this run is done. */
    *start = pool->n_units - left;
    *stop = *start + n;
    return 1;
}

static void take_part(Pool *pool) {
    int64_t start, stop;
    while (take(pool, &start, &stop)) {
        pool->work(pool->job, start, stop);
        atomic_fetch_sub(&pool->n_undone, stop - start);
    }
}

static void wake(Pool *pool) {
    if (atomic_load(&pool->n_asleep)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void share_out(Pool *pool, Work *work, const void *job, int64_t n_units) {
    pool->work = work;
    pool->job = job;
    pool->n_units = n_units;
    atomic_store(&pool->n_undone, n_units);
    atomic_store(&pool->n_left, n_units);
    if (n_units > 1) wake(pool);
    take_part(pool);
    for (int i = 0; atomic_load(&pool->n_undone); i++)
        if (i < 1000)
            PAUSE();
        else
            sched_yield(); /* the other thread may have no processor */
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Takes part until there have been other than `n_recalls` calls back; how many there have been. */
int64_t products_serve(Pool *pool, int64_t n_recalls) {
    int64_t awake_until = now_ns() + AWAKE_NS;
    while (atomic_load(&pool->n_recalls) == n_recalls) {
        if (atomic_load(&pool->n_left)) {
            take_part(pool);
            awake_until = now_ns() + AWAKE_NS;
        } else if (now_ns() < awake_until) {
            for (int i = 0; i < 16; i++) PAUSE();
        } else {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->n_asleep, 1);
            while (!atomic_load(&pool->n_left) && atomic_load(&pool->n_recalls) == n_recalls)
                pthread_cond_wait(&pool->changed, &pool->mutex);
            atomic_fetch_sub(&pool->n_asleep, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
    return atomic_load(&pool->n_recalls);
}

/* Brings every thread back from `products_serve`. */
void products_recall(Pool *pool) {
    atomic_fetch_add(&pool->n_recalls, 1);
    wake(pool);
}

#endif
