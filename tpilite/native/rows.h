/* Products of rows of bfloat16, float16, float32 and of bfloat16 in twelve bits; each weight is widened in a
 * register.
 *
 * With one row of x, or a few, each row of the matrix is a dot product, and the memory's rate decides. With more
 * rows of x, the code takes ROWS rows of weights at a time, widened into the first-level cache, and PANELS vectors
 * of rows of x: their ROWS * PANELS sums fill the registers (K. Goto and R. van de Geijn, "Anatomy of
 * High-Performance Matrix Multiplication", 2008). The order in which a sum is made depends only on the number of
 * columns and of rows of x.
 */

#ifndef TPILITE_ROWS_H
#define TPILITE_ROWS_H

#include "piece.h"
#include "vectors.h"

#if defined(__x86_64__)
#define ROWS 6
#else
#define ROWS 12
#endif

/* ---- weights ---- */

/* Where row i begins; of packed rows, the first of four. */
INLINE const char *row_of(const Piece *piece, int64_t i, int64_t n_cols) {
    int64_t half_bytes = piece->dtype == FLOAT32 ? 8 : piece->dtype == PACKED ? 3 : 4;
    return piece->rows + half_bytes * n_cols * i / 2;
}

/* bfloat16 is the upper half of a float32. */
INLINE Words upper_halves(const void *p) { return SHORTS(p) << 16; }

/* The weights from number `at` on of a row that begins at `row`. */
INLINE Floats weights(int64_t dtype, const char *row, int64_t at) {
    if (dtype == BFLOAT16) return (Floats)upper_halves(row + 2 * at);
    if (dtype == FLOAT16) return HALVES(row + 2 * at);
    return load(row + 4 * at);
}

/* The same, with zeros behind column n_cols. */
INLINE Floats last_weights(int64_t dtype, const char *row, int64_t n_cols, int64_t at) {
    int64_t size = dtype == FLOAT32 ? 4 : 2;
    char rest[VECTOR] = {0};
    memcpy(rest, row + size * at, size * (n_cols - at));
    return weights(dtype, rest, 0);
}

/* The weights from column `at` on of four packed rows, but for those that are stored apart: packing.py has the
 * format. The words of the three rows are `n_cols` apart. */
INLINE void unpack(const char *words, int64_t n_cols, int64_t at, float scale, Floats four[PACKED_ROWS]) {
    Words a = upper_halves(words + 2 * at), b = upper_halves(words + 2 * (n_cols + at)),
          c = upper_halves(words + 2 * (2 * n_cols + at));
    Words last = (Words)((Signed)(c << 1) >> 12) ^ (a & 0x78000000) >> 4 ^ (b & 0x78000000) >> 8;
    four[0] = (Floats)(a & 0x87ff0000) * scale;
    four[1] = (Floats)(b & 0x87ff0000) * scale;
    four[2] = (Floats)(c & 0x87ff0000) * scale;
    four[3] = (Floats)(last & 0x87ff0000) * scale;
}

/* The next of each of four rows' weights that are stored apart. */
typedef struct {
    int64_t next[PACKED_ROWS], end[PACKED_ROWS]; /* in the piece's places */
    int64_t column;                              /* the first of those that come next; n_cols at the end */
} Apart;

static void find_column(const Piece *piece, int64_t i, int64_t n_cols, Apart *apart) {
    apart->column = n_cols;
    for (int k = 0; k < PACKED_ROWS; k++) {
        if (apart->next[k] == apart->end[k]) continue;
        int64_t column = piece->places[apart->next[k]] - (i + k) * n_cols;
        if (column < apart->column) apart->column = column;
    }
}

/* From column `at` of rows i to i + 3 on. */
static Apart apart_from(const Piece *piece, int64_t i, int64_t n_cols, int64_t at) {
    Apart apart;
    int64_t e = piece->firsts[i / PACKED_ROWS], end = piece->firsts[i / PACKED_ROWS + 1];
    for (int k = 0; k < PACKED_ROWS; k++) {
        while (e < end && piece->places[e] < (i + k) * n_cols + at) e++;
        apart.next[k] = e;
        while (e < end && piece->places[e] < (i + k + 1) * n_cols) e++;
        apart.end[k] = e;
    }
    find_column(piece, i, n_cols, &apart);
    return apart;
}

/* Puts those of the columns from `at` on into their places in `four`. */
static void put_apart(const Piece *piece, int64_t i, int64_t n_cols, int64_t at, Apart *apart, Floats *four) {
    for (int k = 0; k < PACKED_ROWS; k++)
        for (; apart->next[k] < apart->end[k]; apart->next[k]++) {
            int64_t column = piece->places[apart->next[k]] - (i + k) * n_cols - at;
            if (column >= LANES) break;
            ((float *)(four + k))[column] = piece->values[apart->next[k]] * piece->scale;
        }
    find_column(piece, i, n_cols, apart);
}

/* All weights from column `at` on of packed rows i to i + 3, with zeros behind column n_cols. */
INLINE void packed_weights(const Piece *piece, int64_t i, int64_t n_cols, int64_t at, Apart *apart,
                           Floats four[PACKED_ROWS]) {
    const char *words = row_of(piece, i, n_cols);
    if (at + LANES <= n_cols) {
        unpack(words, n_cols, at, piece->scale, four);
    } else {
        uint16_t rest[3 * LANES] = {0};
        for (int k = 0; k < 3; k++) memcpy(rest + k * LANES, words + 2 * (k * n_cols + at), 2 * (n_cols - at));
        unpack((char *)rest, LANES, 0, piece->scale, four);
    }
    if (__builtin_expect(apart->column < at + LANES && apart->column < n_cols, 0)) {
        Floats patched[PACKED_ROWS]; /* a copy, so that the others may stay in registers */
        for (int k = 0; k < PACKED_ROWS; k++) patched[k] = four[k];
        put_apart(piece, i, n_cols, at, apart, patched);
        for (int k = 0; k < PACKED_ROWS; k++) four[k] = patched[k];
    }
}

/* ---- one row of x ---- */

/* Of how many columns x may be for the first-level cache to hold it beside the weights that pass through, and how
 * many rows meet each number of a longer one, which comes from the next cache then: with 8192 columns, one row at a
 * time took twice as long. With shorter ones it is more rows that take longer, as their weights lie apart. */
enum { CACHED_COLUMNS = 4096, ROWS_TOGETHER = 6 };

/* Of each row two sums side by side, as each addition waits for the one before it. Vector v of a row belongs to sum
 * v % 2, of packed rows too: so the bits are the same. */
INLINE void dots_of(int64_t dtype, int n, const Piece *piece, int64_t i, const float *x, int64_t n_cols) {
    const char *row[ROWS_TOGETHER];
    Floats sums[ROWS_TOGETHER][2] = {{{0}}};
    int64_t j = 0, last = n_cols / LANES % 2;
    for (int r = 0; r < n; r++) row[r] = row_of(piece, i + r, n_cols);
    for (; j + 2 * LANES <= n_cols; j += 2 * LANES)
        for (int r = 0; r < n; r++) {
            sums[r][0] += weights(dtype, row[r], j) * load(x + j);
            sums[r][1] += weights(dtype, row[r], j + LANES) * load(x + j + LANES);
        }
    for (int r = 0; last && r < n; r++) sums[r][0] += weights(dtype, row[r], j) * load(x + j);
    j += last * LANES;
    for (int r = 0; j < n_cols && r < n; r++)
        sums[r][last] += last_weights(dtype, row[r], n_cols, j) * last_floats(x, n_cols, j);
    for (int r = 0; r < n; r++) piece->out[i + r] = total(sums[r][0] + sums[r][1]);
}

INLINE void dots(int64_t dtype, const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_cols) {
    int64_t i = start;
    if (n_cols > CACHED_COLUMNS)
        for (; i + ROWS_TOGETHER <= stop; i += ROWS_TOGETHER) dots_of(dtype, ROWS_TOGETHER, piece, i, x, n_cols);
    for (; i < stop; i++) dots_of(dtype, 1, piece, i, x, n_cols);
}

INLINE void add_packed(const Piece *piece, int64_t i, int64_t n_cols, int64_t at, Apart *apart, Floats columns,
                       Floats sums[PACKED_ROWS]) {
    Floats four[PACKED_ROWS];
    packed_weights(piece, i, n_cols, at, apart, four);
    for (int k = 0; k < PACKED_ROWS; k++) sums[k] += four[k] * columns;
}

static void packed_dots(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_cols) {
    for (int64_t i = start; i < stop; i += PACKED_ROWS) {
        Floats sums[2][PACKED_ROWS] = {{{0}}};
        Apart apart = apart_from(piece, i, n_cols, 0);
        int64_t j = 0, last = n_cols / LANES % 2;
        for (; j + 2 * LANES <= n_cols; j += 2 * LANES) {
            add_packed(piece, i, n_cols, j, &apart, load(x + j), sums[0]);
            add_packed(piece, i, n_cols, j + LANES, &apart, load(x + j + LANES), sums[1]);
        }
        if (last) add_packed(piece, i, n_cols, j, &apart, load(x + j), sums[0]), j += LANES;
        if (j < n_cols) add_packed(piece, i, n_cols, j, &apart, last_floats(x, n_cols, j), sums[last]);
        for (int k = 0; k < PACKED_ROWS; k++) piece->out[i + k] = total(sums[0][k] + sums[1][k]);
    }
}

static void one_row(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_cols) {
    switch (piece->dtype) { /* each with its own loop, in which the question is not asked again */
    case BFLOAT16: dots(BFLOAT16, piece, start, stop, x, n_cols); break;
    case FLOAT16: dots(FLOAT16, piece, start, stop, x, n_cols); break;
    case FLOAT32: dots(FLOAT32, piece, start, stop, x, n_cols); break;
    case PACKED: packed_dots(piece, start, stop, x, n_cols); break;
    }
}

/* ---- a few rows of x ---- */

#define FEW 4 /* or fewer would leave tiles mostly empty */

#define FEW_TOGETHER 3 /* rows of weights meet what is loaded of x; their FEW_TOGETHER * FEW sums fill the registers */

/* Each weight is widened once and meets all rows of x: one sum for each of them. */
INLINE void few_dots_of(int64_t dtype, int n, int n_x, const Piece *piece, int64_t i, const float *x,
                        int64_t n_cols) {
    const char *row[FEW_TOGETHER];
    Floats sums[FEW_TOGETHER][FEW] = {{{0}}}, w[FEW_TOGETHER];
    int64_t j = 0;
    for (int r = 0; r < n; r++) row[r] = row_of(piece, i + r, n_cols);
    for (; j + LANES <= n_cols; j += LANES) {
        for (int r = 0; r < n; r++) w[r] = weights(dtype, row[r], j);
        for (int t = 0; t < n_x; t++)
            for (int r = 0; r < n; r++) sums[r][t] += w[r] * load(x + t * n_cols + j);
    }
    for (int r = 0; j < n_cols && r < n; r++) {
        w[r] = last_weights(dtype, row[r], n_cols, j);
        for (int t = 0; t < n_x; t++) sums[r][t] += w[r] * last_floats(x + t * n_cols, n_cols, j);
    }
    for (int r = 0; r < n; r++)
        for (int t = 0; t < n_x; t++) piece->out[t * piece->out_stride + i + r] = total(sums[r][t]);
}

INLINE void few_dots(int64_t dtype, int n_x, const Piece *piece, int64_t start, int64_t stop, const float *x,
                     int64_t n_cols) {
    int64_t i = start;
    for (; i + FEW_TOGETHER <= stop; i += FEW_TOGETHER) few_dots_of(dtype, FEW_TOGETHER, n_x, piece, i, x, n_cols);
    for (; i < stop; i++) few_dots_of(dtype, 1, n_x, piece, i, x, n_cols);
}

static void few_packed_dots(int64_t n_x, const Piece *piece, int64_t start, int64_t stop, const float *x,
                            int64_t n_cols) {
    for (int64_t i = start; i < stop; i += PACKED_ROWS) {
        Floats sums[FEW][PACKED_ROWS] = {{{0}}}, four[PACKED_ROWS];
        Apart apart = apart_from(piece, i, n_cols, 0);
        for (int64_t j = 0; j < n_cols; j += LANES) {
            packed_weights(piece, i, n_cols, j, &apart, four);
            for (int t = 0; t < n_x; t++) {
                const float *row = x + t * n_cols;
                Floats columns = j + LANES <= n_cols ? load(row + j) : last_floats(row, n_cols, j);
                for (int k = 0; k < PACKED_ROWS; k++) sums[t][k] += four[k] * columns;
            }
        }
        for (int t = 0; t < n_x; t++)
            for (int k = 0; k < PACKED_ROWS; k++) piece->out[t * piece->out_stride + i + k] = total(sums[t][k]);
    }
}

INLINE void few_of(int64_t dtype, const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_x,
                   int64_t n_cols) {
    switch (n_x) { /* the sums of a number that the compiler knows stay in registers */
    case 2: few_dots(dtype, 2, piece, start, stop, x, n_cols); break;
    case 3: few_dots(dtype, 3, piece, start, stop, x, n_cols); break;
    case 4: few_dots(dtype, 4, piece, start, stop, x, n_cols); break;
    }
}

static void few_rows(const Piece *piece, int64_t start, int64_t stop, const float *x, int64_t n_x, int64_t n_cols) {
    switch (piece->dtype) {
    case BFLOAT16: few_of(BFLOAT16, piece, start, stop, x, n_x, n_cols); break;
    case FLOAT16: few_of(FLOAT16, piece, start, stop, x, n_x, n_cols); break;
    case FLOAT32: few_of(FLOAT32, piece, start, stop, x, n_x, n_cols); break;
    case PACKED: few_packed_dots(n_x, piece, start, stop, x, n_cols); break;
    }
}

/* ---- several rows of x ---- */

#define PANELS 2   /* of LANES rows of x each */
#define DEPTH 512  /* columns at a time: STRIP * DEPTH floats fit into the first-level cache */
#define WIDTH 256  /* rows of x at a time */

/* `next` is what will be widened next: of each row the processor would notice too late that it is read in order. */
INLINE void widen(int64_t dtype, const char *row, int64_t at, int64_t stop, const char *next, float *out) {
    for (; at + LANES <= stop; at += LANES, out += LANES, next += (dtype == FLOAT32 ? 4 : 2) * LANES) {
        store(out, weights(dtype, row, at));
        __builtin_prefetch(next);
    }
    if (at < stop) store(out, last_weights(dtype, row, stop, at));
}

static void widen_packed(const Piece *piece, int64_t i, int64_t n_cols, int64_t at, int64_t stop, float *out) {
    Apart apart = apart_from(piece, i, n_cols, at);
    Floats four[PACKED_ROWS];
    for (; at < stop; at += LANES, out += LANES) {
        packed_weights(piece, i, n_cols, at, &apart, four);
        for (int k = 0; k < PACKED_ROWS; k++) store(out + k * DEPTH, four[k]);
    }
}

/* Rows i to i + n of the piece, their columns from `at` to `stop`, as float32 in `out` [STRIP, DEPTH]. */
static void widen_strip(const Piece *piece, int64_t i, int64_t n, int64_t n_cols, int64_t at, int64_t stop,
                        float *out) {
    if (piece->dtype == PACKED) {
        for (int64_t k = 0; k < n; k += PACKED_ROWS)
            widen_packed(piece, i + k, n_cols, at, stop, out + k * DEPTH);
        return;
    }
    for (int64_t k = 0; k < n; k++, out += DEPTH) {
        const char *row = row_of(piece, i + k, n_cols);
        const char *next = stop < n_cols ? row + stop * (piece->dtype == FLOAT32 ? 4 : 2)
                                         : row_of(piece, i + STRIP + k, n_cols);
        switch (piece->dtype) {
        case BFLOAT16: widen(BFLOAT16, row, at, stop, next, out); break;
        case FLOAT16: widen(FLOAT16, row, at, stop, next, out); break;
        case FLOAT32: widen(FLOAT32, row, at, stop, next, out); break;
        }
    }
}

/* sums [ROWS, n * LANES] += w [ROWS, depth] x [depth, n * LANES]; the panels of x are `panel` floats apart. */
INLINE void tile(int n, const float *w, const float *x, int64_t panel, int64_t depth, float *sums) {
    Floats found[ROWS][PANELS], columns[PANELS];
    for (int i = 0; i < ROWS; i++)
        for (int p = 0; p < n; p++) found[i][p] = (Floats){0};
    for (int64_t j = 0; j < depth; j++) {
        for (int p = 0; p < n; p++) columns[p] = load(x + p * panel + j * LANES);
        for (int i = 0; i < ROWS; i++)
            for (int p = 0; p < n; p++) found[i][p] += w[i * DEPTH + j] * columns[p];
    }
    for (int i = 0; i < ROWS; i++)
        for (int p = 0; p < n; p++) {
            float *sum = sums + i * WIDTH + p * LANES;
            store(sum, load(sum) + found[i][p]);
        }
}

/* The panels of x are [n_cols, LANES] each, with zeros for rows that there are not. */
static void several_rows(const Piece *piece, int64_t start, int64_t stop, const float *panels, int64_t n_x,
                         int64_t n_cols) {
    float wide[STRIP * DEPTH] = {0}, sums[STRIP * WIDTH];
    int64_t panel = n_cols * LANES;
    for (int64_t first = 0; first < n_x; first += WIDTH, panels += WIDTH / LANES * panel) {
        int64_t width = n_x - first < WIDTH ? n_x - first : WIDTH, n_panels = (width + LANES - 1) / LANES;
        for (int64_t i = start; i < stop; i += STRIP) {
            int64_t n = stop - i < STRIP ? stop - i : STRIP;
            memset(sums, 0, sizeof sums);
            for (int64_t at = 0; at < n_cols; at += DEPTH) {
                int64_t depth = n_cols - at < DEPTH ? n_cols - at : DEPTH, p;
                widen_strip(piece, i, n, n_cols, at, at + depth, wide);
                const float *x = panels + at * LANES;
                for (p = 0; p + PANELS <= n_panels; p += PANELS)
                    for (int k = 0; k < STRIP; k += ROWS) /* meanwhile the panels stay in the cache */
                        tile(PANELS, wide + k * DEPTH, x + p * panel, panel, depth, sums + k * WIDTH + p * LANES);
                if (p < n_panels)
                    for (int k = 0; k < STRIP; k += ROWS)
                        tile(1, wide + k * DEPTH, x + p * panel, panel, depth, sums + k * WIDTH + p * LANES);
            }
            for (int64_t t = 0; t < width; t++) {
                float *out = piece->out + (first + t) * piece->out_stride + i;
                for (int64_t k = 0; k < n; k++) out[k] = sums[k * WIDTH + t];
            }
        }
    }
}

#endif
