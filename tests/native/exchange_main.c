/* exchange.c below sanitizers: ranks as threads, which sum more than their sockets hold, again and again. */

#include "exchange.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, HEAD = 17, N = 100001, TOTAL = RANKS * N - 2, ROUNDS = 5, BYTES = HEAD + 3 + 4 * N };

static int sockets[RANKS][RANKS];
static const char head[HEAD] = "sixteen bytes...";

static void *rank_of(void *number) {
    int rank = *(int *)number;
    char *parts = calloc(RANKS, BYTES), *chunks = calloc(RANKS, BYTES); /* 3 bytes before each head align its payload */
    Transfer scattered[RANKS], gathered[RANKS], parts_in[RANKS], chunks_in[RANKS];
    int n = 0;
    for (int r = 0; r < RANKS; r++) {
        memcpy(chunks + r * BYTES + 3, head, HEAD);
        if (r == rank) continue;
        scattered[n] = (Transfer){sockets[rank][r], chunks + r * BYTES + 3, BYTES - 3, 0};
        gathered[n] = (Transfer){sockets[rank][r], chunks + rank * BYTES + 3, BYTES - 3, 0};
        parts_in[n] = (Transfer){sockets[rank][r], parts + r * BYTES + 3, BYTES - 3, 0};
        chunks_in[n++] = (Transfer){sockets[rank][r], chunks + r * BYTES + 3, BYTES - 3, 0};
    }
    Exchange scatter = {scattered, parts_in, head, n, n, HEAD, 0, 0, 0, 0};
    Exchange gather = {gathered, chunks_in, head, n, n, HEAD, 0, 0, 0, 0};
    Rows part_rows = {parts + HEAD + 3, BYTES, RANKS, N}, chunk_rows = {chunks + HEAD + 3, BYTES, RANKS, N};
    float *x = malloc(TOTAL * sizeof *x);
    for (int round = 0; round < ROUNDS; round++) {
        for (int j = 0; j < TOTAL; j++) x[j] = rank + j % 7 + round;
        int outcome = INTERRUPTED;
        for (int begin = 1; outcome == INTERRUPTED; begin = 0)
            outcome = exchange_sum(&scatter, &gather, &part_rows, &chunk_rows, rank, x, TOTAL, begin);
        if (outcome) return "it failed";
        for (int j = 0; j < TOTAL; j++)
            if (x[j] != 3 + 3 * (j % 7 + round)) return "a sum is wrong";
    }
    free(x);
    free(parts);
    free(chunks);
    return NULL;
}

int main(void) {
    pthread_t threads[RANKS];
    int numbers[RANKS];
    for (int i = 0; i < RANKS; i++)
        for (int j = 0; j < i; j++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return 2;
            sockets[i][j] = pair[0];
            sockets[j][i] = pair[1];
        }
    for (int i = 0; i < RANKS; i++) {
        numbers[i] = i;
        if (pthread_create(threads + i, NULL, rank_of, numbers + i)) return 2;
    }
    const char *wrong = "right";
    for (int i = 0; i < RANKS; i++) {
        void *found;
        pthread_join(threads[i], &found);
        if (found) wrong = found;
    }
    puts(wrong);
    return 0;
}
