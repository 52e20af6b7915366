/* What `Exchange` and `SummedExchange` of exchange.py do, for sockets that are plain. */

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

/* Makes `first`, puts the sum of the parts, one after the other, into `total` and makes `second`; or goes on.
 * In one call, as the caches have forgotten Python by the time that the last part comes.
 */
int exchange_sum(Exchange *first, const char *parts, int64_t stride, int64_t n_parts, int64_t n, float *total,
                 Exchange *second, int begin) {
    if (begin || !first->finished) {
        int outcome = exchange_run(first, begin);
        if (outcome) return outcome;
        memcpy(total, parts, n * sizeof *total);
        for (int64_t i = 1; i < n_parts; i++) {
            const float *part = (const float *)(parts + i * stride);
            for (int64_t j = 0; j < n; j++) total[j] += part[j];
        }
        begin = 1;
    }
    return exchange_run(second, begin);
}
