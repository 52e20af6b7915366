/* y = x W^T for stored weights, as `linear` does it in NumPy; each weight is widened in a register.
 *
 * NumPy widens a block in one call and multiplies it in the next: the memory waits during the second, the
 * arithmetic during the first. Here both go on at once. This file is compiled when the package is installed,
 * where there is a compiler, and called by products.py; without it NumPy does everything.
 *
 * rows.h has the products of rows of floats, blocks.h those of rows in GGML's blocks, pool.h the threads. A sum's
 * bits depend neither on the threads nor on what else the same call computes.
 */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* Whether this processor has the instructions. Everything else here may be called only if it does. Not every
 * compiler can be asked for F16C; whether the system keeps such registers is in the answer for AVX2. */
int products_run_here(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C) != 0;
#else
    return 1;
#endif
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#endif

#include "blocks.h"
#include "pool.h"
#include "rows.h"

#define UNIT_BYTES 32768 /* of weights: the least that a thread takes */

/* What `products_multiply_pieces` is called for. */
typedef struct {
    MultiplyBlocks *multiply_blocks;
    const Piece *pieces;
    int64_t n_x, n_cols;
    const float *x;
    float *panels;
} Products;

/* How blocks are multiplied here: with wider vectors where they are there and allowed. */
static MultiplyBlocks *of_blocks(int allow_avx512) {
#if defined(__x86_64__)
    if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return products_multiply_blocks_avx512;
#endif
    (void)allow_avx512;
    return multiply_blocks;
}

static void lay_out(const void *job, int64_t start, int64_t stop) {
    const Products *products = job;
    int64_t n_x = products->n_x, n_cols = products->n_cols;
    enum { COLUMNS = 64 }; /* at a time: both sides stay in the cache */
    for (int64_t p = start; p < stop; p++) {
        const float *x = products->x + p * LANES * n_cols;
        float *panel = products->panels + p * LANES * n_cols;
        int64_t n = n_x - p * LANES < LANES ? n_x - p * LANES : LANES;
        if (n < LANES) memset(panel, 0, sizeof(float) * LANES * n_cols);
        for (int64_t first = 0; first < n_cols; first += COLUMNS)
            for (int64_t t = 0; t < n; t++)
                for (int64_t j = first; j < first + COLUMNS && j < n_cols; j++)
                    panel[j * LANES + t] = x[t * n_cols + j];
    }
}

/* Rows in a unit of a piece: whole strips. */
static int64_t unit_rows(const Piece *piece, int64_t n_cols) {
    int64_t strip_bytes =
        piece->dtype > PACKED ? STRIP * piece->row_bytes : row_of(piece, STRIP, n_cols) - piece->rows;
    return STRIP * (strip_bytes && strip_bytes < UNIT_BYTES ? UNIT_BYTES / strip_bytes : 1);
}

static int64_t units_of(const Piece *piece, int64_t n_cols) {
    int64_t n = unit_rows(piece, n_cols);
    return (piece->n_rows + n - 1) / n;
}

static void multiply_rows(const Products *products, const Piece *piece, int64_t start, int64_t stop) {
    int64_t n_x = products->n_x, n_cols = products->n_cols;
    if (piece->dtype > PACKED)
        products->multiply_blocks(piece, start, stop, products->x, n_x, n_cols);
    else if (n_x == 1)
        one_row(piece, start, stop, products->x, n_cols);
    else if (n_x <= FEW)
        few_rows(piece, start, stop, products->x, n_x, n_cols);
    else
        several_rows(piece, start, stop, products->panels, n_x, n_cols);
}

static void multiply(const void *job, int64_t start, int64_t stop) {
    const Products *products = job;
    for (const Piece *piece = products->pieces; start < stop; piece++) {
        int64_t n_units = units_of(piece, products->n_cols), n = unit_rows(piece, products->n_cols);
        if (start < n_units)
            multiply_rows(products, piece, start * n, stop < n_units ? stop * n : piece->n_rows);
        start = start < n_units ? 0 : start - n_units;
        stop -= n_units;
    }
}

/* The products of x [n_x, n_cols] with all pieces. `panels` has room for x with its rows rounded up to LANES; it
 * is not used for a few, nor for blocks. Threads in `products_serve` help. */
void products_multiply_pieces(Pool *pool, const Piece *pieces, int64_t n_pieces, const float *x, int64_t n_x,
                              int64_t n_cols, float *panels, int allow_avx512) {
    Products products = {of_blocks(allow_avx512), pieces, n_x, n_cols, x, panels};
    int64_t n_units = 0, n_of_floats = 0;
    for (int64_t i = 0; i < n_pieces; i++) {
        n_units += units_of(pieces + i, n_cols);
        n_of_floats += pieces[i].dtype <= PACKED;
    }
    if (n_x > FEW && n_of_floats) share_out(pool, lay_out, &products, (n_x + LANES - 1) / LANES);
    share_out(pool, multiply, &products, n_units);
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
