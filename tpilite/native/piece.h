/* Some rows of a matrix as they are stored, and where their products go. */

#ifndef TPILITE_PIECE_H
#define TPILITE_PIECE_H

#include <stdint.h>

/* How a piece is stored: products.py has the same numbers. The block types come last. */
enum { BFLOAT16, FLOAT16, FLOAT32, PACKED, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q4_K, Q5_K, Q6_K, IQ4_XS };

#define PACKED_ROWS 4 /* lie in three that are stored */

#define STRIP 12 /* rows are taken at a time, at least where there are several of x: some tiles, some packed fours */

/* Some rows of a matrix, all of the same number of columns, and where their products go. */
typedef struct {
    const char *rows;
    float *out; /* of row i and row t of x at out[t * out_stride + i] */
    int64_t n_rows, out_stride;
    int64_t dtype, row_bytes; /* of rows in blocks, how far apart they begin */
    /* Of packed rows: their values are too small by `scale`; the few that are stored apart, with their places in
     * the rows laid end to end, are grouped: those of rows 4 g to 4 g + 3 are firsts[g] to firsts[g + 1] - 1. */
    float scale;
    const int64_t *places, *firsts;
    const float *values;
} Piece;

#endif
