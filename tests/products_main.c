/* products.c below sanitizers: every kind of rows, one row of x and many, by one thread and by three. */

#include "products.c"

#include <stdio.h>

enum { N = 44, COLUMNS = 1037, X = 19 };

static void *serve(void *team) {
    for (int64_t n = 0; n < 2;) n = products_serve(team, n);
    return NULL;
}

/* Products of all kinds, in memory from malloc of just the size. */
static float *products_by(int n_threads, int64_t n_x) {
    static const int64_t half_bytes[] = {4, 4, 8, 3};
    Team *team = products_team(n_threads);
    pthread_t threads[2];
    float *x = malloc(4 * n_x * COLUMNS), *y = malloc(4 * 4 * n_x * N);
    float *panels = malloc(4 * (n_x + LANES - 1) / LANES * LANES * COLUMNS);
    int64_t *places = malloc(8 * N), *firsts = malloc(8 * (N / 4 + 1));
    float *values = malloc(4 * N);
    Piece pieces[4];
    for (int i = 0; i < n_threads - 1; i++) pthread_create(threads + i, NULL, serve, team);
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
        for (int64_t i = 0; i < n_bytes; i++) rows[i] = i * 37 % 61; /* small and finite in any type */
        pieces[dtype] = (Piece){(char *)rows, y + dtype * n_x * N, N, N, dtype, 2.0f, places, firsts, values};
    }
    for (int round = 0; round < 20; round++) products_multiply(team, pieces, 4, x, n_x, COLUMNS, panels);
    products_recall(team);
    products_recall(team);
    for (int i = 0; i < n_threads - 1; i++) pthread_join(threads[i], NULL);
    for (int dtype = 0; dtype < 4; dtype++) free((char *)pieces[dtype].rows);
    free(x), free(panels), free(places), free(firsts), free(values);
    products_end(team);
    return y;
}

int main(void) {
    for (int64_t n_x = 1; n_x <= X; n_x += X - 1) {
        float *one = products_by(1, n_x), *three = products_by(3, n_x);
        if (memcmp(one, three, 4 * 4 * n_x * N)) return 1;
        free(one), free(three);
    }
    puts("3 threads agree with one");
    return 0;
}
