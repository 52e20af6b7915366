/* exchange.c below sanitizers: ranks as threads, which sum more than their sockets hold, again and again. */

#include "exchange.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, HEAD = 17, N = 100001, ROUNDS = 5, BYTES = HEAD + 3 + 4 * N };

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
    Exchange first = {scattered, parts_in, head, n, n, HEAD, 0, 0, 0, 0}, second = {gathered, chunks_in, head, n, n, HEAD, 0, 0, 0, 0};
    for (int round = 0; round < ROUNDS; round++) {
        for (int r = 0; r < RANKS; r++)
            for (int j = 0; j < N; j++) ((float *)(chunks + r * BYTES + HEAD + 3))[j] = rank + r * 10 + j % 7 + round;
        memcpy(parts + rank * BYTES, chunks + rank * BYTES, BYTES);
        float *total = (float *)(chunks + rank * BYTES + HEAD + 3);
        int outcome = exchange_sum(&first, parts + HEAD + 3, BYTES, RANKS, N, total, &second, 1);
        while (outcome == INTERRUPTED) outcome = exchange_sum(&first, parts + HEAD + 3, BYTES, RANKS, N, total, &second, 0);
        if (outcome) return "it failed";
        for (int r = 0; r < RANKS; r++)
            for (int j = 0; j < N; j++)
                if (((float *)(chunks + r * BYTES + HEAD + 3))[j] != 3 + 3 * (r * 10 + j % 7 + round)) return "a sum is wrong";
    }
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
