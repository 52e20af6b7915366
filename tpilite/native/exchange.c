/* What `Exchange` and `ScatterSum` of tpilite/net do, for plain sockets; called by exchange.py. */

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#ifndef MSG_NOSIGNAL /* macOS; Python ignores that signal */
#define MSG_NOSIGNAL 0
#endif

typedef struct {
    int64_t socket;
    char *frame;
    int64_t n_bytes, n_done;
} Transfer;

typedef struct {
    Transfer *sends, *receives;
    const char *head;
    int64_t n_sends, n_receives, n_head;
    int64_t n_unsent;      /* how many sends are not done */
    int64_t finished;      /* whether all is done */
    int64_t failed, error; /* the number of the transfer that failed, and why by `errno` */
} Exchange;

enum { DONE, INTERRUPTED, NOT_SENT, NOT_RECEIVED, CLOSED, ANOTHER_HEAD };

static int failure(Exchange *exchange, int64_t i, int what) {
    exchange->failed = i;
    exchange->error = errno;
    return what;
}

/* Hands to the kernel what it takes of every send that is not done. */
static int push(Exchange *exchange) {
    exchange->n_unsent = 0;
    for (int64_t i = 0; i < exchange->n_sends; i++) {
        Transfer *to = exchange->sends + i;
        if (to->n_done == to->n_bytes) continue;
        ssize_t n = send(to->socket, to->frame + to->n_done, to->n_bytes - to->n_done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return failure(exchange, i, NOT_SENT);
        if (n > 0) to->n_done += n;
        exchange->n_unsent += to->n_done < to->n_bytes;
    }
    return DONE;
}

/* Waits until a peer takes more, or `from`, where there is one, has something; hands on what is taken. */
static int wait_and_push(Exchange *exchange, const Transfer *from) {
    struct pollfd polls[exchange->n_unsent + 1];
    int n = 0;
    if (from) polls[n++] = (struct pollfd){.fd = from->socket, .events = POLLIN};
    for (int64_t i = 0; i < exchange->n_sends; i++) {
        const Transfer *to = exchange->sends + i;
        if (to->n_done < to->n_bytes) polls[n++] = (struct pollfd){.fd = to->socket, .events = POLLOUT};
    }
    if (poll(polls, n, -1) < 0) return INTERRUPTED; /* nothing else can go wrong */
    return push(exchange);
}

static int receive(Exchange *exchange, int64_t i) {
    Transfer *from = exchange->receives + i;
    while (from->n_done < from->n_bytes) {
        int flags = 0;
        if (exchange->n_unsent) {
            int outcome = wait_and_push(exchange, from);
            if (outcome) return outcome;
            flags = MSG_DONTWAIT;
        } else if (from->n_done >= exchange->n_head) {
            flags = MSG_WAITALL; /* behind a head that is right there are as many bytes as it says */
        }
        int64_t wanted = from->n_bytes - from->n_done;
        ssize_t n = recv(from->socket, from->frame + from->n_done, wanted, flags);
        if (n < 0 && errno == EINTR) return INTERRUPTED;
        if (n < 0 && flags == MSG_DONTWAIT && (errno == EAGAIN || errno == EWOULDBLOCK)) continue;
        if (n <= 0) return failure(exchange, i, n ? NOT_RECEIVED : CLOSED);
        from->n_done += n;
        if (from->n_done >= exchange->n_head && memcmp(from->frame, exchange->head, exchange->n_head))
            return failure(exchange, i, ANOTHER_HEAD);
        if (flags == MSG_WAITALL && n < wanted) return INTERRUPTED;
    }
    return DONE;
}

/* Makes the exchange, or goes on with one that was INTERRUPTED. */
int exchange_run(Exchange *exchange, int begin) {
    int outcome = DONE;
    if (begin) {
        for (int64_t i = 0; i < exchange->n_sends; i++) exchange->sends[i].n_done = 0;
        for (int64_t i = 0; i < exchange->n_receives; i++) exchange->receives[i].n_done = 0;
        outcome = push(exchange);
    }
    for (int64_t i = 0; !outcome && i < exchange->n_receives; i++) outcome = receive(exchange, i);
    while (!outcome && exchange->n_unsent) outcome = wait_and_push(exchange, NULL);
    exchange->finished = !outcome;
    return outcome;
}

/* The rows [n_ranks, size] that lie `stride` bytes apart, of which x [n] is the first numbers. */
typedef struct {
    char *rows;
    int64_t stride, n_ranks, size;
} Rows;

static void copy(const Rows *rows, float *x, int64_t n, int out) {
    for (int64_t r = 0; r < rows->n_ranks && r * rows->size < n; r++) {
        int64_t left = n - r * rows->size, some = (left < rows->size ? left : rows->size) * sizeof *x;
        char *row = rows->rows + r * rows->stride;
        if (out) memcpy(x + r * rows->size, row, some);
        else memcpy(row, x + r * rows->size, some);
    }
}

/* Sums x [n] over the ranks, or goes on: its chunks are sent by `scatter`, which receives the parts of the chunk
 * of `rank`; their sum, one after the other, is sent by `gather`, which receives the other chunks.
 */
int exchange_sum(Exchange *scatter, Exchange *gather, const Rows *parts, const Rows *chunks, int64_t rank, float *x,
                 int64_t n, int begin) {
    float *total = (float *)(chunks->rows + rank * chunks->stride);
    if (begin) {
        copy(chunks, x, n, 0);
        memcpy(parts->rows + rank * parts->stride, total, parts->size * sizeof *total);
    }
    if (begin || !scatter->finished) {
        int outcome = exchange_run(scatter, begin);
        if (outcome) return outcome;
        memcpy(total, parts->rows, parts->size * sizeof *total);
        for (int64_t r = 1; r < parts->n_ranks; r++) {
            const float *part = (const float *)(parts->rows + r * parts->stride);
            for (int64_t j = 0; j < parts->size; j++) total[j] += part[j];
        }
        begin = 1;
    }
    int outcome = exchange_run(gather, begin);
    if (!outcome) copy(chunks, x, n, 1);
    return outcome;
}
