/* products.c below sanitizers, or on another processor: every kind of rows, one row of x and many, by one thread
 * and by three, against plain sums in double precision. N_COLUMNS is given to the compiler. */

#include "products.c"

#include <math.h>
#include <stdio.h>

enum { N = 44, COLUMNS = N_COLUMNS, X = 19 };

static void *serve(void *pool) {
    for (int64_t n = 0; n < 2;) n = products_serve(pool, n);
    return NULL;
}

static double of_bits(int sign, int exponent, int bias, int mantissa, int n_bits) {
    double value = exponent ? ldexp(mantissa + (1 << n_bits), exponent - bias - n_bits)
                            : ldexp(mantissa, 1 - bias - n_bits);
    return sign ? -value : value;
}

static double bfloat16(unsigned bits) { return of_bits(bits >> 15 & 1, bits >> 7 & 255, 127, bits & 127, 7); }

static double weight(const Piece *piece, int64_t i, int64_t j) {
    const uint16_t *halves = (const uint16_t *)piece->rows;
    if (piece->dtype == FLOAT32) return ((const float *)piece->rows)[i * COLUMNS + j];
    if (piece->dtype == BFLOAT16) return bfloat16(halves[i * COLUMNS + j]);
    if (piece->dtype == FLOAT16) {
        unsigned bits = halves[i * COLUMNS + j];
        return of_bits(bits >> 15, bits >> 10 & 31, 15, bits & 1023, 10);
    }
    for (int e = 0; e < N; e++)
        if (piece->places[e] == i * COLUMNS + j) return (double)piece->values[e] * piece->scale;
    const uint16_t *words = halves + i / 4 * 3 * COLUMNS + j;
    unsigned a = words[0], b = words[COLUMNS], c = words[2 * COLUMNS], bits;
    if (i % 4 < 3) {
        bits = words[i % 4 * COLUMNS] & 0x87ff;
    } else { /* sign and the mantissa's lower three bits in c; in a the exponent, in b its upper four */
        unsigned sign = c >> 14 & 1, flip = sign ? 15 : 0;
        bits = sign << 15 | ((a >> 11 & 15) ^ flip) << 7 | ((b >> 11 & 15) ^ flip) << 3 | (c >> 11 & 7);
    }
    return bfloat16(bits) * piece->scale;
}

static void check(const Piece *piece, const float *x, int64_t n_x) {
    for (int64_t t = 0; t < n_x; t++)
        for (int64_t i = 0; i < N; i++) {
            double sum = 0, unit = 0;
            for (int64_t j = 0; j < COLUMNS; j++) {
                double product = weight(piece, i, j) * x[t * COLUMNS + j];
                sum += product;
                unit += fabs(product);
            }
            if (!(fabs(piece->out[t * N + i] - sum) <= 1e-6 * unit)) {
                printf("dtype %d, row %d of x, row %d: %g instead of %g\n", (int)piece->dtype, (int)t, (int)i,
                       piece->out[t * N + i], sum);
                exit(1);
            }
        }
}

/* Products of all kinds, in memory from malloc of just the size. */
static float *products_by(int n_threads, int64_t n_x) {
    static const int64_t half_bytes[] = {4, 4, 8, 3};
    Pool *pool = products_new_pool(n_threads);
    pthread_t threads[2];
    float *x = malloc(4 * n_x * COLUMNS), *y = malloc(4 * 4 * n_x * N);
    float *panels = malloc(4 * (n_x + LANES - 1) / LANES * LANES * COLUMNS);
    int64_t *places = malloc(8 * N), *firsts = malloc(8 * (N / 4 + 1));
    float *values = malloc(4 * N);
    Piece pieces[4];
    for (int i = 0; i < n_threads - 1; i++) pthread_create(threads + i, NULL, serve, pool);
    for (int64_t i = 0; i < n_x * COLUMNS; i++) x[i] = (float)(i % 7) - 3;
    for (int i = 0; i < N; i++) {
        places[i] = i * COLUMNS + (i % 2 ? COLUMNS - 1 - i : i);
        values[i] = i;
        firsts[i / 4] = i / 4 * 4;
    }
    firsts[N / 4] = N;
    for (int dtype = 0; dtype < 4; dtype++) {
        int64_t n_bytes = half_bytes[dtype] * N * COLUMNS / 2;
        unsigned char *rows = malloc(n_bytes);
        for (int64_t i = 0; i < n_bytes; i++) rows[i] = i % 2 ? i * 37 % 61 + i % 3 % 2 * 128 : i * 41 % 251;
        pieces[dtype] = (Piece){(char *)rows, y + dtype * n_x * N, N, N, dtype, 0, 2.0f, places, firsts, values};
    }
    for (int round = 0; round < 20; round++) products_multiply_pieces(pool, pieces, 4, x, n_x, COLUMNS, panels, 1);
    for (int dtype = 0; dtype < 4; dtype++) check(pieces + dtype, x, n_x);
    products_recall(pool);
    products_recall(pool);
    for (int i = 0; i < n_threads - 1; i++) pthread_join(threads[i], NULL);
    for (int dtype = 0; dtype < 4; dtype++) free((char *)pieces[dtype].rows);
    free(x), free(panels), free(places), free(firsts), free(values);
    products_free_pool(pool);
    return y;
}

int main(void) {
    static const int64_t rows_of_x[] = {1, 3, X};
    for (int which = 0; which < 3; which++) {
        int64_t n_x = rows_of_x[which];
        float *one = products_by(1, n_x), *three = products_by(3, n_x);
        if (memcmp(one, three, 4 * 4 * n_x * N)) return 1;
        free(one), free(three);
    }
    puts("3 threads agree with one");
    return 0;
}
