"""Latency of one all-reduce between processes, on loopback and through a relay, against the bound.

    python benchmarks/allreduce.py [--ranks 2,4,8] [--kib 16,32] [--ways star,auto] [--json FILE]
    python benchmarks/allreduce.py --delay_ms 1 --rate_mbit 300

The relay is a process between every two ranks that gives each byte `--delay_ms` one way and each rank's
wire, outgoing and incoming, `--rate_mbit`, by a token bucket. The bound for n ranks, S bytes, a one-way
latency a and an inverse bandwidth b is

    star     2 a + 2 (n - 1) S b        direct   a + (n - 1) S b        scatter  2 a + 2 (n - 1) / n S b

On loopback a is half of a ping-pong of 64 bytes between two processes over plain blocking sockets, and
1 / b the rate of a one-way stream of 256 KiB blocks; through the relay both are the relay's own.

"one" is a single sum, all ranks of which begin at an agreed moment: from when the last rank began to when
the last had the result, by the clock that processes of one machine share. "over" is its median above the
bound, divided by the number of ranks. "in a row" is the time of a sum that follows another at once, at
rank 0: with a star, the first parts of the next come in while the last results still go out.
"""

import argparse
import contextlib
import heapq
import json
import multiprocessing
import os
import platform
import selectors
import socket
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tpilite.collective import Message
from tpilite.net.channel import Channel
from tpilite.net.group import Group, RankZero, Worker
from tpilite.net.sums import WAYS

# What the token bucket lets through at once. Smaller pieces share a wire more fairly, but a relay in Python
# takes some 15 us for each.
_PIECE = 1 << 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--kib", default="16,32")
    parser.add_argument("--ways", default="star", help=f"of {', '.join(WAYS)}, auto; separated by commas")
    parser.add_argument("--payload", default="f32", choices=("f32", "f16", "bf16"))
    parser.add_argument("--delay_ms", type=float, default=0.0, help="one way, through the relay")
    parser.add_argument("--rate_mbit", type=float, default=0.0, help="of each rank's wire, through the relay")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    relayed = bool(args.delay_ms or args.rate_mbit)
    if relayed:
        latency_s = args.delay_ms / 1e3
        per_byte_s = 8 / (args.rate_mbit * 1e6) if args.rate_mbit else 0.0
    else:
        latency_s, per_byte_s = loopback_latency_s(), loopback_per_byte_s()
    conditions = {
        "machine": platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "payload": args.payload,
        "network": f"relay, {args.delay_ms:g} ms one way, {args.rate_mbit:g} Mb/s" if relayed else "loopback",
        "latency_us": latency_s * 1e6,
        "gbit_per_s": 8e-9 / per_byte_s if per_byte_s else None,
    }
    for name, value in conditions.items():
        print(f"# {name}: {value:.1f}" if isinstance(value, float) else f"# {name}: {value}")
    print(
        "ranks   KiB  way             one us  quartiles us      bound us   over us/rank  rounds  in a row us"
    )
    rows = []
    for n_ranks in map(int, args.ranks.split(",")):
        cluster = Cluster(
            n_ranks, args.payload, args.delay_ms / 1e3, args.rate_mbit * 1e6 / 8 if relayed else 0
        )
        with cluster:
            for way in args.ways.split(","):
                for kib in map(int, args.kib.split(",")):
                    times_s, in_a_row_s, used = cluster.measure(way, kib << 10, args.seconds)
                    n_bytes = (kib << 10) // (1 if args.payload == "f32" else 2)
                    bounds = bounds_s(n_ranks, n_bytes, latency_s, per_byte_s)
                    bound_s = min(bounds.values()) if way == "auto" else bounds[way]
                    low_s, median_s, high_s = statistics.quantiles(times_s, n=4)
                    name = f"auto:{used}" if way == "auto" else way
                    rows.append(
                        {
                            "ranks": n_ranks,
                            "kib": kib,
                            "way": name,
                            "median_us": median_s * 1e6,
                            "quartiles_us": [low_s * 1e6, high_s * 1e6],
                            "bound_us": bound_s * 1e6,
                            "over_us_per_rank": (median_s - bound_s) * 1e6 / n_ranks,
                            "rounds": len(times_s),
                            "in_a_row_us": in_a_row_s * 1e6,
                        }
                    )
                    print(
                        f"{n_ranks:5} {kib:5}  {name:13} {median_s * 1e6:9.1f}  "
                        f"{low_s * 1e6:7.1f}-{high_s * 1e6:<8.1f} {bound_s * 1e6:9.1f} "
                        f"{rows[-1]['over_us_per_rank']:13.1f}  {len(times_s):6} "
                        f"{in_a_row_s * 1e6:12.1f}"
                    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


def bounds_s(n_ranks: int, n_bytes: int, latency_s: float, per_byte_s: float) -> dict[str, float]:
    transfer_s = (n_ranks - 1) * n_bytes * per_byte_s
    return {
        "star": 2 * latency_s + 2 * transfer_s,
        "direct": latency_s + transfer_s,
        "scatter": 2 * latency_s + 2 * transfer_s / n_ranks,
    }


class Cluster:
    """Rank 0 in this process, the others and the relay in processes of their own."""

    def __init__(self, n_ranks: int, payload: str, delay_s: float, bytes_per_s: float) -> None:
        ends: list[list[socket.socket | None]] = [[None] * n_ranks for _ in range(n_ranks)]
        wires: list[tuple[int, int, socket.socket, socket.socket]] = []
        for low in range(n_ranks):
            for high in range(low + 1, n_ranks):
                ends[low][high], near = tcp_pair()
                if delay_s or bytes_per_s:
                    far, ends[high][low] = tcp_pair()
                    wires.append((low, high, near, far))
                else:
                    ends[high][low] = near
        fork = multiprocessing.get_context("fork")  # the sockets are inherited as they are
        self._processes = [
            fork.Process(target=work, args=(rank, ends, payload), daemon=True) for rank in range(1, n_ranks)
        ]
        if wires:
            self._processes.append(
                fork.Process(target=relay, args=(wires, ends, delay_s, bytes_per_s), daemon=True)
            )
        for process in self._processes:
            process.start()
        for *_, near, far in wires:
            near.close()
            far.close()
        self.group = group_of(0, ends, payload)
        # Long enough for the agreement on a moment to reach every rank before it.
        self._lead_s = 2 * delay_s + 100e-6 * n_ranks

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.group.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def measure(self, way: str, n_bytes: int, seconds: float) -> tuple[list[float], float, str]:
        """Seconds of each single sum, the median of sums in a row, and the way they were made."""
        n = n_bytes // 4
        self.group.broadcast(Message({"way": way}))
        self.group.settle(way)
        trial_s = self._in_a_row(n, 10)
        n_rounds = max(30, min(20_000, int(seconds / 2 / trial_s)))
        in_a_row_s = self._in_a_row(n, n_rounds)
        n_rounds = max(30, min(2000, int(seconds / (in_a_row_s + 2 * self._lead_s))))
        return self._single(n, n_rounds), in_a_row_s, self.group.way(n)

    def _in_a_row(self, n: int, n_rounds: int) -> float:
        self.group.broadcast(Message({"n": n, "starts": [0.0] * n_rounds}))
        began_s, ended_s = sums(self.group, n, [0.0] * n_rounds)
        self.group.gather(Message())
        return statistics.median(ended_s - began_s)

    def _single(self, n: int, n_rounds: int) -> list[float]:
        times_s = []
        for _ in range(n_rounds):
            starts = [time.perf_counter() + self._lead_s]
            self.group.broadcast(Message({"n": n, "starts": starts}))
            began_s, ended_s = sums(self.group, n, starts)
            gathered = self.group.gather(Message({}, np.stack((began_s, ended_s)))) or []
            moments = np.stack([one.array for one in gathered if one.array is not None])
            times_s.append(float(moments[:, 1].max() - moments[:, 0].max()))
        return times_s


def sums(group: Group, n: int, starts: list[float]) -> tuple[Any, Any]:
    """Makes a sum of `n` numbers at each of these moments (or at once): when each began and ended here."""
    x = np.zeros(n, np.float32)
    began_s, ended_s = np.zeros(len(starts)), np.zeros(len(starts))
    for i, start_s in enumerate(starts):
        if start_s:
            time.sleep(max(0.0, start_s - time.perf_counter()))
        began_s[i] = time.perf_counter()
        group.all_reduce(x)
        ended_s[i] = time.perf_counter()
    return began_s, ended_s


def work(rank: int, ends: list[list[socket.socket | None]], payload: str) -> None:
    group = group_of(rank, ends, payload)
    with contextlib.suppress(Exception, KeyboardInterrupt):  # rank 0 has ended and says what there is to say
        while True:
            order = group.broadcast(None).header
            if "way" in order:
                group.settle(order["way"])
                continue
            moments = np.stack(sums(group, order["n"], order["starts"]))
            group.gather(Message({}, moments))


def group_of(rank: int, ends: list[list[socket.socket | None]], payload: str) -> Group:
    """The group of one rank; the other ranks' sockets are closed in this process."""
    for other, row in enumerate(ends):
        if other != rank:
            close_all(row)
    channels = [None if sock is None else Channel(sock, f"rank {r}") for r, sock in enumerate(ends[rank])]
    return (Worker if rank else RankZero)(rank, channels, payload=payload)


def close_all(socks: list[socket.socket | None]) -> None:
    for sock in socks:
        if sock is not None:
            sock.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        served = server.accept()[0]
    for sock in (client, served):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, served


@dataclass
class Bucket:
    """A wire of one rank in one direction: when it is free again."""

    per_byte_s: float
    free_s: float = 0.0

    def pass_through(self, n_bytes: int, at_s: float) -> float:
        """When the last of the bytes that come at `at_s` is through."""
        self.free_s = max(self.free_s, at_s) + n_bytes * self.per_byte_s
        return self.free_s


@dataclass
class Link:
    """One direction between two ranks."""

    source: socket.socket
    target: socket.socket
    outgoing: Bucket
    incoming: Bucket
    leaving: deque[memoryview] = field(default_factory=deque)
    arriving: deque[memoryview] = field(default_factory=deque)


def relay(
    wires: list[tuple[int, int, socket.socket, socket.socket]],
    ends: list[list[socket.socket | None]],
    delay_s: float,
    bytes_per_s: float,
) -> None:
    """Passes everything on, later: spinning where the next moment is near, as sleeping is not exact."""
    for row in ends:
        close_all(row)
    per_byte_s = 1 / bytes_per_s if bytes_per_s else 0.0
    n_ranks = len(ends)
    out = [Bucket(per_byte_s) for _ in range(n_ranks)]
    into = [Bucket(per_byte_s) for _ in range(n_ranks)]
    selector = selectors.DefaultSelector()
    for low, high, near, far in wires:
        for a, b, source, target in ((low, high, near, far), (high, low, far, near)):
            source.setblocking(False)
            selector.register(source, selectors.EVENT_READ, Link(source, target, out[a], into[b]))
    due: list[tuple[float, int, Link, bool]] = []  # when, in which order, where, and which of two ends
    order = 0
    with contextlib.suppress(OSError, KeyboardInterrupt):  # the ranks have ended
        while True:
            now_s = time.perf_counter()
            wait_s = None if not due else max(0.0, due[0][0] - now_s - 100e-6)
            for key, _ in selector.select(wait_s):
                link: Link = key.data
                data = memoryview(link.source.recv(1 << 18))
                if not data:
                    return
                at_s = time.perf_counter()
                for start in range(0, len(data), _PIECE):
                    piece = data[start : start + _PIECE]
                    first_s = link.outgoing.pass_through(len(piece), at_s) - len(piece) * per_byte_s
                    link.leaving.append(piece)
                    order += 1
                    heapq.heappush(due, (first_s, order, link, False))
            while due and due[0][0] <= time.perf_counter():
                at_s, _, link, arrives = heapq.heappop(due)
                if not arrives:
                    # Its first byte enters the other wire now, while the last is still on this one.
                    piece = link.leaving.popleft()
                    link.arriving.append(piece)
                    order += 1
                    then_s = link.incoming.pass_through(len(piece), at_s) + delay_s
                    heapq.heappush(due, (then_s, order, link, True))
                    continue
                piece = link.arriving.popleft()
                while piece:
                    try:
                        piece = piece[link.target.send(piece) :]
                    except BlockingIOError:
                        time.sleep(20e-6)


def loopback_latency_s() -> float:
    """Half of a ping-pong between two processes over plain sockets: the median."""
    here, there = tcp_pair()

    def echo() -> None:
        while data := there.recv(64):
            there.sendall(data)

    process = multiprocessing.get_context("fork").Process(target=echo, daemon=True)
    process.start()
    times_s = []
    for _ in range(5000):
        started_s = time.perf_counter()
        here.sendall(bytes(64))
        here.recv(64)
        times_s.append(time.perf_counter() - started_s)
    process.kill()
    process.join()
    here.close()
    there.close()
    return statistics.median(times_s) / 2


def loopback_per_byte_s() -> float:
    here, there = tcp_pair()
    n_blocks, block = 800, bytes(1 << 18)

    def drain() -> None:
        buffer, missing = bytearray(1 << 18), n_blocks * len(block)
        while missing:
            missing -= there.recv_into(buffer)
        there.sendall(b"!")

    process = multiprocessing.get_context("fork").Process(target=drain, daemon=True)
    process.start()
    started_s = time.perf_counter()
    for _ in range(n_blocks):
        here.sendall(block)
    here.recv(1)
    took_s = time.perf_counter() - started_s
    process.join()
    here.close()
    there.close()
    return took_s / (n_blocks * len(block))


if __name__ == "__main__":
    main()
