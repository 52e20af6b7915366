/* The switch of wires.py: passes every packet on when its time has come.
 *
 * In C, as the hosts share this machine's processors with it: what it takes, they lack, and what it is late, so
 * are they.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <linux/if_packet.h>

/* A slot holds ten bytes about checksum and cutting, then the packet, whose byte 5 is the target's number. */
enum { SLOTS = 8192, BATCH = 64, SLOT_BYTES = 8192, TARGET = 10 + 5 };

/* Each sleep costs the hosts some of their processors' time; longer ones end late by more on a virtual processor. */
enum { SHORTEST_NAP_NS = 60000, LONGEST_NAP_NS = 100000 };

typedef struct {
    struct mmsghdr messages[SLOTS];
    struct iovec pieces[SLOTS];
    struct sockaddr_ll addresses[SLOTS];
    char stamps[SLOTS][CMSG_SPACE(sizeof(struct timespec))];
    int64_t due_ns[SLOTS];
    unsigned char packets[SLOTS][SLOT_BYTES];
} Ring;

static Ring ring;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now); /* the clock of the kernel's time stamps */
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Reads what has come into the slots from `first` on; how many were filled. */
static int take_in(int sock, int first, int room, const int32_t *targets, int64_t hold_ns) {
    int n = room < BATCH ? room : BATCH;
    if (n > SLOTS - first) n = SLOTS - first;
    for (int i = first; i < first + n; i++) {
        ring.pieces[i] = (struct iovec){ring.packets[i], SLOT_BYTES};
        ring.messages[i].msg_hdr = (struct msghdr){
            .msg_iov = ring.pieces + i, .msg_iovlen = 1, .msg_control = ring.stamps[i], .msg_controllen = sizeof ring.stamps[i]};
    }
    n = recvmmsg(sock, ring.messages + first, n, MSG_DONTWAIT, NULL);
    for (int i = first; i < first + n; i++) {
        struct timespec stamp;
        struct cmsghdr *control = CMSG_FIRSTHDR(&ring.messages[i].msg_hdr);
        memcpy(&stamp, CMSG_DATA(control), sizeof stamp);
        ring.due_ns[i] = stamp.tv_sec * 1000000000LL + stamp.tv_nsec + hold_ns;
        ring.pieces[i].iov_len = ring.messages[i].msg_len;
        ring.addresses[i] = (struct sockaddr_ll){.sll_family = AF_PACKET, .sll_ifindex = targets[ring.packets[i][TARGET]]};
        ring.messages[i].msg_hdr = (struct msghdr){.msg_name = ring.addresses + i,
                                                   .msg_namelen = sizeof ring.addresses[i],
                                                   .msg_iov = ring.pieces + i,
                                                   .msg_iovlen = 1};
    }
    return n < 0 ? 0 : n;
}

/* Never returns. Packets go out sooner by what they would be late otherwise, up to 100 us in the mean, so that in the
 * mean they are held as long as they should. `told` counts the packets that were passed on, and the seconds that they
 * were late in all. */
void relay(int sock, const int32_t *targets, int64_t hold_ns, volatile double *told) {
    int first = 0, n_held = 0; /* in a ring */
    int64_t read_ns = 0, now;
    double lead_ns = 0;
    for (;;) {
        if (n_held == 0) {
            first = 0; /* its memory is still in the cache */
            struct pollfd wait = {.fd = sock, .events = POLLIN};
            poll(&wait, 1, -1);
        }
        /* What came since the last look has its own time stamp and is not due yet. */
        if (n_held == 0 || now_ns() - read_ns > hold_ns / 4) {
            int n;
            read_ns = now_ns();
            do {
                n = take_in(sock, (first + n_held) % SLOTS, SLOTS - n_held, targets, hold_ns);
                n_held += n;
            } while (n == BATCH);
        }
        now = now_ns();
        int n = 0;
        while (n < n_held && first + n < SLOTS && ring.due_ns[first + n] <= now + (int64_t)lead_ns) n++;
        if (n) {
            n = sendmmsg(sock, ring.messages + first, n, MSG_DONTWAIT);
            if (n <= 0) n = 1; /* a full queue lost it */
            now = now_ns();
            for (int i = 0; i < n; i++) {
                double late_ns = now - ring.due_ns[first + i];
                told[1] += late_ns / 1e9;
                lead_ns += late_ns / 256;
            }
            lead_ns = lead_ns < 0 ? 0 : lead_ns > LONGEST_NAP_NS ? LONGEST_NAP_NS : lead_ns;
            told[0] += n;
            first = (first + n) % SLOTS;
            n_held -= n;
        } else if (n_held) {
            int64_t wait_ns = ring.due_ns[first] - (int64_t)lead_ns, look_ns = read_ns + hold_ns / 4 + 1;
            wait_ns = (wait_ns < look_ns ? wait_ns : look_ns) - now;
            if (wait_ns < SHORTEST_NAP_NS) wait_ns = SHORTEST_NAP_NS;
            if (wait_ns > LONGEST_NAP_NS) wait_ns = LONGEST_NAP_NS;
            nanosleep(&(struct timespec){.tv_nsec = wait_ns}, NULL);
        }
    }
}
