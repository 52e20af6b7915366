/* Products of blocks below sanitizers, or on another processor, against sums in double precision that a file brings
 * (test_block_products.py writes it): by one thread and by three, and by one row of x alone. */

#include "products.c"

#include <math.h>
#include <stdio.h>

enum { N_THREADS = 3 };

static void *serve(void *pool) {
    products_serve(pool, 0);
    return NULL;
}

static void *read_array(FILE *file, size_t n_bytes) {
    void *memory = malloc(n_bytes); /* of just the size, so that reading beyond it is noticed */
    if (fread(memory, 1, n_bytes, file) != n_bytes) exit(2);
    return memory;
}

static float *multiplied(Pool *pool, Piece piece, const float *x, int64_t n_x, int64_t n_cols, int allow_avx512) {
    float *out = malloc(sizeof(float) * n_x * piece.n_rows);
    piece.out = out;
    products_multiply_pieces(pool, &piece, 1, x, n_x, n_cols, NULL, allow_avx512);
    return out;
}

static void check(int right, const char *what, int64_t type) {
    if (!right) {
        printf("type %d: %s\n", (int)type, what);
        exit(1);
    }
}

static void check_one(FILE *file, const int64_t *header, Pool *alone, Pool *together, int allow_avx512) {
    int64_t type = header[0], n_rows = header[1], n_cols = header[2], row_bytes = header[3], n_x = header[4];
    Piece piece = {.n_rows = n_rows, .out_stride = n_rows, .dtype = type, .row_bytes = row_bytes};
    char *rows = read_array(file, n_rows * row_bytes);
    float *x = read_array(file, sizeof(float) * n_x * n_cols);
    double *sums = read_array(file, sizeof(double) * n_x * n_rows);
    double *units = read_array(file, sizeof(double) * n_x * n_rows);
    piece.rows = rows;
    float *one = multiplied(alone, piece, x, n_x, n_cols, allow_avx512);
    float *three = multiplied(together, piece, x, n_x, n_cols, allow_avx512);
    for (int64_t i = 0; i < n_x * n_rows; i++) check(fabs(one[i] - sums[i]) <= 1e-6 * units[i], "wrong", type);
    check(!memcmp(one, three, sizeof(float) * n_x * n_rows), "three threads differ from one", type);
    for (int64_t t = 0; t < n_x; t++) {
        float *row = multiplied(alone, piece, x + t * n_cols, 1, n_cols, allow_avx512);
        check(!memcmp(row, one + t * n_rows, sizeof(float) * n_rows), "a row of x alone differs", type);
        free(row);
    }
    free(rows), free(x), free(sums), free(units), free(one), free(three);
}

int main(int n_arguments, char **arguments) {
    if (n_arguments != 2) return 2;
    Pool *alone = products_new_pool(1), *together = products_new_pool(N_THREADS);
    pthread_t threads[N_THREADS - 1];
    for (int i = 0; i < N_THREADS - 1; i++) pthread_create(threads + i, NULL, serve, together);
    for (int allow_avx512 = 0; allow_avx512 < 2; allow_avx512++) {
        FILE *file = fopen(arguments[1], "rb");
        int64_t header[5];
        if (!file) return 2;
        while (fread(header, sizeof header, 1, file) == 1) check_one(file, header, alone, together, allow_avx512);
        fclose(file);
    }
    products_recall(together);
    for (int i = 0; i < N_THREADS - 1; i++) pthread_join(threads[i], NULL);
    products_free_pool(alone), products_free_pool(together);
    puts("all types agree");
    return 0;
}
