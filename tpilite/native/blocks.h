/* Products of rows in GGML's blocks, with x as it is.
 *
 * A sum is made along the columns by LANES numbers side by side, which are added up at the end; whatever the number of
 * rows of x, and whichever rows are computed beside it. So a sum's bits depend on nothing but its row and its x.
 *
 * With one row of x some rows of weights are taken together, since each addition waits for the one before it. With
 * more, STRIP rows are widened into the first-level cache, and tiles of their products with rows of x fill the
 * registers.
 */

#ifndef TPILITE_BLOCKS_H
#define TPILITE_BLOCKS_H

#include "block_types.h"

/* ---- one row of x ---- */

/* More of them hide an addition's time better, and need registers that NEON's narrow vectors have not. */
enum { ROWS_OF_BLOCKS = VECTOR == 16 ? 2 : 4 };

INLINE void add_group(int64_t type, int n, const uint8_t *block[], const Scales scales[], int group, const float *x,
                      Floats sums[]) {
    for (int r = 0; r < n; r++) {
        Floats weights[32 / LANES];
        weights_of(type, block[r], scales + r, group, weights);
        for (int v = 0; v < 32 / LANES; v++)
            sums[r] = MULTIPLY_ADD(weights[v], load(x + group * 32 + v * LANES), sums[r]);
    }
}

INLINE void block_dots_of(int64_t type, int n, const Piece *piece, int64_t i, const float *x, int64_t n_cols) {
    const BlockType size = block_type(type);
    const uint8_t *block[ROWS_OF_BLOCKS];
    Scales scales[ROWS_OF_BLOCKS];
    Floats sums[ROWS_OF_BLOCKS] = {{0}};
    for (int r = 0; r < n; r++) block[r] = (const uint8_t *)piece->rows + (i + r) * piece->row_bytes;
    const uint8_t *next = block[0] + n * piece->row_bytes; /* several rows at once the processor does not fetch ahead */
    for (int64_t j = 0; j < n_cols; j += size.n_weights) {
        for (int at = 0; at < n * size.n_bytes; at += 64) __builtin_prefetch(next + at);
        next += n * size.n_bytes;
        for (int r = 0; r < n; r++) scales_of(type, block[r], scales + r);
        add_group(type, n, block, scales, 0, x + j, sums);
        if (size.n_weights > 32) {
            add_group(type, n, block, scales, 1, x + j, sums);
            add_group(type, n, block, scales, 2, x + j, sums);
            add_group(type, n, block, scales, 3, x + j, sums);
            add_group(type, n, block, scales, 4, x + j, sums);
            add_group(type, n, block, scales, 5, x + j, sums);
            add_group(type, n, block, scales, 6, x + j, sums);
            add_group(type, n, block, scales, 7, x + j, sums);
        }
        for (int r = 0; r < n; r++) block[r] += size.n_bytes;
    }
    for (int r = 0; r < n; r++) piece->out[i + r] = total(sums[r]);
}

INLINE void block_dots(int64_t type, const Piece *piece, int64_t start, int64_t stop, const float *x,
                       int64_t n_cols) {
    int64_t i = start;
    for (; i + ROWS_OF_BLOCKS <= stop; i += ROWS_OF_BLOCKS)
        block_dots_of(type, ROWS_OF_BLOCKS, piece, i, x, n_cols);
    for (; i < stop; i++) block_dots_of(type, 1, piece, i, x, n_cols);
}

/* ---- several rows of x ---- */

#if VECTOR == 32
enum { TILE_ROWS = 3, TILE_X = 4 }; /* their sums and what they are made of fill 16 registers */
#else
enum { TILE_ROWS = 4, TILE_X = 5 }; /* 32 registers */
#endif

enum {
    BLOCK_DEPTH = 512, /* columns at a time: STRIP * BLOCK_DEPTH floats fit into the first-level cache */
    BLOCK_WIDTH = 120  /* rows of x at a time: whole tiles */
};

/* The weights of one row in `depth` columns, which are whole blocks. */
INLINE void widen_blocks(int64_t type, const uint8_t *block, int64_t depth, float *out) {
    const BlockType size = block_type(type);
    for (const float *end = out + depth; out < end; block += size.n_bytes) {
        Scales scales;
        scales_of(type, block, &scales);
        for (int group = 0; group < size.n_weights / 32; group++, out += 32) {
            Floats weights[32 / LANES];
            weights_of(type, block, &scales, group, weights);
            for (int v = 0; v < 32 / LANES; v++) store(out + v * LANES, weights[v]);
        }
    }
}

/* sums [TILE_ROWS, n, LANES] += w [TILE_ROWS, depth] x [n, depth]; the sums of a row of w are BLOCK_WIDTH * LANES
 * floats apart, and rows of x n_cols. */
INLINE void block_tile(int n, const float *w, const float *x, int64_t n_cols, int64_t depth, float *sums) {
    Floats found[TILE_ROWS][TILE_X];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int t = 0; t < n; t++) found[r][t] = load(sums + (r * BLOCK_WIDTH + t) * LANES);
    for (int64_t j = 0; j < depth; j += LANES) {
        Floats weights[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) weights[r] = load(w + r * BLOCK_DEPTH + j);
        for (int t = 0; t < n; t++) {
            Floats columns = load(x + t * n_cols + j);
            for (int r = 0; r < TILE_ROWS; r++) found[r][t] = MULTIPLY_ADD(weights[r], columns, found[r][t]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int t = 0; t < n; t++) store(sums + (r * BLOCK_WIDTH + t) * LANES, found[r][t]);
}

/* All of a strip with up to TILE_X rows of x. */
static void block_tiles(int64_t n, const float *w, const float *x, int64_t n_cols, int64_t depth, float *sums) {
    for (int r = 0; r < STRIP; r += TILE_ROWS, w += TILE_ROWS * BLOCK_DEPTH, sums += TILE_ROWS * BLOCK_WIDTH * LANES)
        switch (n) { /* the sums of a number that the compiler knows stay in registers */
        case 1: block_tile(1, w, x, n_cols, depth, sums); break;
        case 2: block_tile(2, w, x, n_cols, depth, sums); break;
        case 3: block_tile(3, w, x, n_cols, depth, sums); break;
        case 4: block_tile(4, w, x, n_cols, depth, sums); break;
        default: block_tile(TILE_X, w, x, n_cols, depth, sums);
        }
}

/* Of one type's functions, those that differ: the rest is the same for all. */
typedef void WidenBlocks(const uint8_t *block, int64_t depth, float *out);

static void block_strips(WidenBlocks *widen, const Piece *piece, BlockType size, int64_t start, int64_t stop,
                         const float *x, int64_t n_x, int64_t n_cols) {
    float wide[STRIP * BLOCK_DEPTH] = {0}, sums[STRIP * BLOCK_WIDTH * LANES];
    for (int64_t first = 0; first < n_x; first += BLOCK_WIDTH, x += BLOCK_WIDTH * n_cols) {
        int64_t width = n_x - first < BLOCK_WIDTH ? n_x - first : BLOCK_WIDTH;
        for (int64_t i = start; i < stop; i += STRIP) {
            int64_t n = stop - i < STRIP ? stop - i : STRIP;
            memset(sums, 0, sizeof sums);
            for (int64_t at = 0; at < n_cols; at += BLOCK_DEPTH) {
                int64_t depth = n_cols - at < BLOCK_DEPTH ? n_cols - at : BLOCK_DEPTH;
                const uint8_t *blocks = (const uint8_t *)piece->rows + at / size.n_weights * size.n_bytes;
                for (int64_t r = 0; r < n; r++)
                    widen(blocks + (i + r) * piece->row_bytes, depth, wide + r * BLOCK_DEPTH);
                for (int64_t t = 0; t < width; t += TILE_X)
                    block_tiles(width - t < TILE_X ? width - t : TILE_X, wide, x + t * n_cols + at, n_cols, depth,
                                sums + t * LANES);
            }
            for (int64_t t = 0; t < width; t++)
                for (int64_t r = 0; r < n; r++)
                    piece->out[(first + t) * piece->out_stride + i + r] =
                        total(load(sums + (r * BLOCK_WIDTH + t) * LANES));
        }
    }
}

/* ---- the table ---- */

typedef void BlockDots(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_cols);

typedef struct {
    BlockDots *dots;
    WidenBlocks *widen;
} BlockKernel;

/* The loops with the type known. */
#define KERNEL(TYPE)                                                                                       \
    static void dots_##TYPE(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_cols) { \
        block_dots(TYPE, piece, start, stop, x, n_cols);                                                       \
    }                                                                                                          \
    static void widen_##TYPE(const uint8_t *block, int64_t depth, float *out) {                                \
        widen_blocks(TYPE, block, depth, out);                                                                 \
    }
#define ENTRY(TYPE) [TYPE] = {dots_##TYPE, widen_##TYPE},
#define FOR_EACH_BLOCK_TYPE(DO) \
    DO(Q4_0) DO(Q4_1) DO(Q5_0) DO(Q5_1) DO(Q8_0) DO(IQ4_NL) DO(Q4_K) DO(Q5_K) DO(Q6_K) DO(IQ4_XS)

FOR_EACH_BLOCK_TYPE(KERNEL)

static const BlockKernel BLOCK_KERNELS[] = {FOR_EACH_BLOCK_TYPE(ENTRY)};

typedef void MultiplyBlocks(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_x,
                            int64_t n_cols);

/* The same with wider vectors: blocks_avx512.c. */
MultiplyBlocks products_multiply_blocks_avx512;

static void multiply_blocks(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_x,
                            int64_t n_cols) {
    BlockKernel kernel = BLOCK_KERNELS[piece->dtype];
    if (n_x == 1)
        kernel.dots(piece, start, stop, x, n_cols);
    else
        block_strips(kernel.widen, piece, block_type(piece->dtype), start, stop, x, n_x, n_cols);
}

#endif
