"""Latency of one all-reduce between processes, on loopback and over slow wires, against the bound.

    python benchmarks/allreduce.py [--ranks 2,4,8] [--kib 16,32] [--algorithms star,auto] [--json FILE]
    python benchmarks/allreduce.py --delay_ms 1 --rate_mbit 300 --algorithms star,direct,scatter,auto

The second gives each rank a network namespace of its own, at the end of a wire as `wires.py` tells, and
needs root. The bound for n ranks, S bytes, a one-way latency a and an inverse bandwidth b, all but S
without headers, is

    star     2 a + 2 (n - 1) S b        direct   a + (n - 1) S b        scatter  2 a + 2 (n - 1) / n S b

On loopback a is half of a ping-pong of 64 bytes between two processes over plain blocking sockets, and
1 / b the rate of a one-way stream of 256 KiB blocks; over wires both are the ones asked for.

"one" is a single sum, all ranks of which begin at an agreed moment: from when the last rank began to when
the last had the result, by the clock that processes of one machine share. "over" is its median above the
bound, divided by the number of ranks, "times" its median by the cheapest bound of the three. "in a row" is
the time of a sum that follows another at once, the mean at rank 0: with a star, the first parts of the
next come in while the last results still go out. "late" is for how long beyond its time the wires held a
packet, the mean.

plain-direct and plain-scatter send and receive the same bytes by plain blocking calls and sum nothing:
what they take above the bound is the machine's and the wires', not ours.

After loopback follows what this would come to on a network of 0.1 ms and 1 Gb/s: the bound there and the
measured "over" of every rank. As the ranks share this machine's processors, that is rather too much.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from wires import Wires, end_with_parent

from tpilite.cluster.sums import new_sums
from tpilite.collective import Message
from tpilite.net.channel import Channel
from tpilite.net.codecs import CODECS
from tpilite.net.group import Group, MemberGroup, RootGroup
from tpilite.net.sums import ALGORITHMS

_ALGORITHMS = (*ALGORITHMS, "auto", "plain-direct", "plain-scatter")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--kib", default="16,32")
    parser.add_argument(
        "--algorithms", default="star", help=f"of {', '.join(_ALGORITHMS)}; separated by commas"
    )
    parser.add_argument("--payload", default="f32", choices=tuple(CODECS))
    parser.add_argument("--delay_ms", type=float, default=0.0, help="one way, over wires")
    parser.add_argument("--rate_mbit", type=float, default=0.0, help="of each rank's wire")
    parser.add_argument("--protect", action="store_true", help="with a tag behind each frame")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    if args.delay_ms and not args.rate_mbit:
        parser.error("--delay_ms needs --rate_mbit")
    delay_s, bits_per_s = args.delay_ms / 1e3, args.rate_mbit * 1e6
    if bits_per_s:
        latency_s, per_byte_s = delay_s, 8 / bits_per_s
        network = f"wires of {args.delay_ms:g} ms one way, {args.rate_mbit:g} Mb/s"
    else:
        latency_s, per_byte_s = one_way_s(tcp_pair(), 64), loopback_per_byte_s()
        network = "loopback"
    conditions = {
        "machine": platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "payload": args.payload,
        "protect": args.protect,
        "network": network,
        "latency_us": latency_s * 1e6,
        "gbit_per_s": 8e-9 / per_byte_s,
    }
    kibs = [int(kib) for kib in args.kib.split(",")]
    if bits_per_s:
        with Wires(2, delay_s, bits_per_s) as two:
            for n_bytes in (64, *(kib << 10 for kib in kibs)):
                took_s = one_way_s(two.connect(0, 1), n_bytes)
                name = f"plain sockets, {n_bytes} bytes one way, us (by the wire {{:.0f}})"
                conditions[name.format((latency_s + n_bytes * per_byte_s) * 1e6)] = took_s * 1e6
    for name, value in conditions.items():
        print(f"# {name}: {value:.1f}" if isinstance(value, float) else f"# {name}: {value}")
    print(
        "ranks   KiB  algorithm       one us  quartiles us      bound us   over us/rank  times  rounds  "
        "in a row us  late us"
    )
    rows = []
    for n_ranks in map(int, args.ranks.split(",")):
        with contextlib.ExitStack() as stack:
            wires = stack.enter_context(Wires(n_ranks, delay_s, bits_per_s)) if bits_per_s else None
            cluster = stack.enter_context(Cluster(n_ranks, args.payload, args.protect, delay_s, wires))
            for algorithm, kib in itertools.product(args.algorithms.split(","), kibs):
                times_s, in_a_row_s, late_s, used = cluster.measure(algorithm, kib << 10, args.seconds)
                n_bytes = sent_bytes(args.payload, kib << 8)
                bounds = bounds_s(n_ranks, n_bytes, latency_s, per_byte_s)
                bound_s = (
                    min(bounds.values()) if algorithm == "auto" else bounds[algorithm.removeprefix("plain-")]
                )
                low_s, median_s, high_s = statistics.quantiles(times_s, n=4)
                row = {
                    "ranks": n_ranks,
                    "kib": kib,
                    "algorithm": f"auto:{used}" if algorithm == "auto" else algorithm,
                    "median_us": median_s * 1e6,
                    "quartiles_us": [low_s * 1e6, high_s * 1e6],
                    "bound_us": bound_s * 1e6,
                    "over_us_per_rank": (median_s - bound_s) * 1e6 / n_ranks,
                    "times": median_s / min(bounds.values()),
                    "rounds": len(times_s),
                    "in_a_row_us": in_a_row_s * 1e6,
                    "late_us": late_s * 1e6,
                }
                rows.append(row)
                print(
                    f"{n_ranks:5} {kib:5}  {row['algorithm']:13} {median_s * 1e6:9.1f}  "
                    f"{low_s * 1e6:7.1f}-{high_s * 1e6:<8.1f} {bound_s * 1e6:9.1f} "
                    f"{row['over_us_per_rank']:13.1f} {row['times']:6.2f}  {len(times_s):6} "
                    f"{in_a_row_s * 1e6:12.1f} {late_s * 1e6:8.1f}"
                )
    if not bits_per_s:
        foretell(rows)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


def bounds_s(n_ranks: int, n_bytes: int, latency_s: float, per_byte_s: float) -> dict[str, float]:
    transfer_s = (n_ranks - 1) * n_bytes * per_byte_s
    return {
        "star": 2 * latency_s + 2 * transfer_s,
        "direct": latency_s + transfer_s,
        "scatter": 2 * latency_s + 2 * transfer_s / n_ranks,
    }


def foretell(rows: list[dict[str, Any]], latency_s: float = 1e-4, bits_per_s: float = 1e9) -> None:
    """Prints what the algorithms would take on another network, by what they took above the bound."""
    print(f"# computed for {latency_s * 1e3:g} ms one way, {bits_per_s / 1e9:g} Gb/s")
    print("ranks   KiB  cheapest bound us  each algorithm, us; the cheapest of them")
    for (n_ranks, kib), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["ranks"], row["kib"])), key=lambda row: (row["ranks"], row["kib"])
    ):
        bounds = bounds_s(n_ranks, kib << 10, latency_s, 8 / bits_per_s)
        least_us = min(bounds.values()) * 1e6
        took_us = {
            row["algorithm"]: bounds[row["algorithm"]] * 1e6 + row["over_us_per_rank"] * n_ranks
            for row in group
            if row["algorithm"] in bounds
        }
        if took_us:
            best = min(took_us, key=lambda algorithm: took_us[algorithm])
            all_took = ", ".join(f"{algorithm} {us:.0f}" for algorithm, us in took_us.items())
            times = took_us[best] / least_us
            print(f"{n_ranks:5} {kib:5} {least_us:18.0f}  {all_took}; {best}, {times:.2f} times")


class Cluster:
    """Rank 0 in this process, the others in processes of their own."""

    def __init__(
        self, n_ranks: int, payload: str, protect: bool, delay_s: float, wires: Wires | None
    ) -> None:
        ends: list[list[socket.socket | None]] = [[None] * n_ranks for _ in range(n_ranks)]
        for low, high in itertools.combinations(range(n_ranks), 2):
            ends[low][high], ends[high][low] = wires.connect(low, high) if wires else tcp_pair()
        fork = multiprocessing.get_context("fork")  # the sockets are inherited as they are
        self._processes = [
            fork.Process(target=work, args=(rank, ends, payload, protect), daemon=True)
            for rank in range(1, n_ranks)
        ]
        for process in self._processes:
            process.start()
        self.group = group_of(0, ends, payload, protect)
        self._wires = wires
        # Long enough for the agreement on a moment to reach every rank before it.
        self._lead_s = 2 * delay_s + (500e-6 if wires else 0) + 100e-6 * n_ranks

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.group.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def measure(self, algorithm: str, n_bytes: int, seconds: float) -> tuple[list[float], float, float, str]:
        """Seconds of each single sum, of one in a row and that the wires were late, and the algorithm."""
        n = n_bytes // 4
        self.group.broadcast(Message({"algorithm": algorithm}))
        self._sum = prepare(self.group, algorithm)
        trial_s = self._in_a_row(n, 10)
        n_rounds = max(30, min(20_000, int(seconds / 2 / trial_s)))
        in_a_row_s = self._in_a_row(n, n_rounds)
        n_rounds = max(30, min(2000, int(seconds / (in_a_row_s + 2 * self._lead_s))))
        if self._wires:
            self._wires.lateness()
        times_s = self._single(n, n_rounds)
        late_s = self._wires.lateness() if self._wires else 0.0
        return times_s, in_a_row_s, late_s, self.group.algorithm(n)

    def _in_a_row(self, n: int, n_rounds: int) -> float:
        self.group.broadcast(Message({"n": n, "starts": [0.0] * n_rounds}))
        began_s, ended_s = sums(self._sum, n, [0.0] * n_rounds)
        self.group.gather(Message())
        return float(ended_s[-1] - began_s[0]) / n_rounds

    def _single(self, n: int, n_rounds: int) -> list[float]:
        times_s = []
        for _ in range(n_rounds):
            starts = [time.perf_counter() + self._lead_s]
            self.group.broadcast(Message({"n": n, "starts": starts}))
            began_s, ended_s = sums(self._sum, n, starts)
            gathered = self.group.gather(Message({}, np.stack((began_s, ended_s)))) or []
            moments = np.stack([one.array for one in gathered if one.array is not None])
            times_s.append(float(moments[:, 1].max() - moments[:, 0].max()))
        return times_s


def prepare(group: Group, algorithm: str) -> Callable[[Any], Any]:
    """What sums an array by an algorithm; a plain one only sends and receives as much."""
    plain, _, exchange = algorithm.rpartition("-")
    group.settle("star" if plain else algorithm)
    if not plain:
        return group.all_reduce
    socks = [group.channel((group.rank + i) % group.world_size)._sock for i in range(1, group.world_size)]
    parts, rounds = (group.world_size, 2) if exchange == "scatter" else (1, 1)

    def exchange_all(x: Any) -> None:
        part = memoryview(x).cast("B")[: sent_bytes(group.payload, x.size) // parts]
        for _ in range(rounds):
            for sock in socks:
                sock.sendall(part)
            for sock in reversed(socks):
                sock.recv_into(part, 0, socket.MSG_WAITALL)

    return exchange_all


def sent_bytes(payload: str, n: int) -> int:
    """What `n` numbers take on the wire."""
    codec = CODECS[payload](1, n)
    return codec.width * codec.dtype.itemsize


def sums(sum_up: Callable[[Any], Any], n: int, starts: list[float]) -> tuple[Any, Any]:
    """Makes a sum of `n` numbers at each of these moments (or at once): when each began and ended here."""
    x = np.zeros(n, np.float32)
    began_s, ended_s = np.zeros(len(starts)), np.zeros(len(starts))
    for i, start_s in enumerate(starts):
        if start_s:
            time.sleep(max(0.0, start_s - time.perf_counter()))
        began_s[i] = time.perf_counter()
        sum_up(x)
        ended_s[i] = time.perf_counter()
    return began_s, ended_s


def work(rank: int, ends: list[list[socket.socket | None]], payload: str, protect: bool) -> None:
    if sys.platform == "linux":  # through wires that went with it, the parent's end is not noticed
        end_with_parent()
    group = group_of(rank, ends, payload, protect)
    with contextlib.suppress(Exception, KeyboardInterrupt):  # rank 0 has ended and says what there is to say
        while True:
            order = group.broadcast(None).header
            if "algorithm" in order:
                sum_up = prepare(group, order["algorithm"])
                continue
            moments = np.stack(sums(sum_up, order["n"], order["starts"]))
            group.gather(Message({}, moments))


def group_of(rank: int, ends: list[list[socket.socket | None]], payload: str, protect: bool) -> Group:
    """The group of one rank; the other ranks' sockets are closed in this process."""
    for other, row in enumerate(ends):
        if other != rank:
            close_all(row)
    channels = [None if sock is None else Channel(sock, f"rank {r}") for r, sock in enumerate(ends[rank])]
    for channel in channels:
        if protect and channel is not None:
            channel.protect(b"k" * 32, b"k" * 32)
    return (MemberGroup if rank else RootGroup)(
        rank, channels, payload=payload, protect=protect, new_sum=new_sums()
    )


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


def one_way_s(pair: tuple[socket.socket, socket.socket], n_bytes: int) -> float:
    """Half of a ping-pong between two processes over plain sockets: the median."""
    here, there = pair
    data, buffer = bytes(n_bytes), bytearray(n_bytes)

    def echo() -> None:
        while there.recv_into(buffer, 0, socket.MSG_WAITALL):
            there.sendall(data)

    process = multiprocessing.get_context("fork").Process(target=echo, daemon=True)
    process.start()
    times_s = []
    ends_s = time.perf_counter() + 1
    while time.perf_counter() < ends_s:
        started_s = time.perf_counter()
        here.sendall(data)
        here.recv_into(buffer, 0, socket.MSG_WAITALL)
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
