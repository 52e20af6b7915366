"""Hosts in network namespaces, on wires of a given rate and delay to one switch. Linux and root only.

Each host's sockets and its interface are in a namespace of its own. Its wire is a veth pair, whose two ends
hold what goes out and what comes in at the rate by `tc tbf`. The switch, one more namespace, has neither
bridge nor addresses: a process reads what comes from all wires by one packet socket, holds it for the
delay and writes it to the wire of the host that it is for. So both ends speak TCP with each other through
their kernels: acknowledgements wait as long, and they and the headers use up the rate.

A bucket lets the first packets of a message pass at once, which would flatter us. The delay is therefore
longer by as long as a full bucket takes at the rate: what is at least as long as the bucket (12 KB, over
all its messages) comes when its last byte would, and what is shorter later. The delay counts from the
kernel's time stamp; `lateness` tells how far the process lagged behind.

Nothing here has a name outside of these processes, so whatever way they end, nothing is left.
"""

import contextlib
import ctypes
import itertools
import mmap
import multiprocessing
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

# TCP hands over up to so many packets as one, as network cards do and undo: each costs the processor the
# same here. A bucket that holds just one of these would lose what comes in while its timer is late.
_PACKETS = 4
_BUCKET_BYTES = 2 * _PACKETS * 1514

# From linux/if_packet.h, linux/sched.h, linux/prctl.h and asm/socket.h, for what Python has no names.
_PACKET_VNET_HDR, _SOL_PACKET, _CLONE_NEWNET, _ETH_P_IP = 15, 263, 0x40000000, 0x0800
_SO_TIMESTAMPNS, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _PR_SET_PDEATHSIG = 35, 32, 33, 1

# A slot holds ten bytes about checksum and cutting, then the packet, whose byte 5 is the target's number.
_SLOTS, _BATCH, _SLOT_BYTES, _TARGET = 8192, 64, 8192, 10 + 5
# struct mmsghdr, sockaddr_ll, cmsghdr with timespec; 64-bit and little-endian, with their gaps.
_FIELDS = ("name", "name_room", "pieces", "n_pieces", "control", "control_room", "flags", "n_bytes")
_MESSAGE = np.dtype([(name, "u8") for name in _FIELDS])
_ADDRESS = np.dtype([("protocol", "u4"), ("interface", "i4"), ("hardware", "12u1")])
_STAMP = np.dtype([("n_bytes", "u8"), ("kind", "u8"), ("seconds", "i8"), ("nanoseconds", "i8")])

# A virtual processor that sleeps for longer is late by 40 to 200 us.
_NAP_NS = 100_000

_libc = ctypes.CDLL(None, use_errno=True)


class Wires:
    """`n_hosts` hosts with a wire each. Raises `SystemExit` where they cannot be made."""

    def __init__(self, n_hosts: int, delay_s: float, bits_per_s: float) -> None:
        if not hasattr(os, "geteuid") or os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
            raise SystemExit("wires need Linux, root, and the commands ip and tc of the package iproute2")
        hold_s = delay_s + 8 * _BUCKET_BYTES / bits_per_s
        limits = f"root tbf rate {bits_per_s:.0f}bit burst {_BUCKET_BYTES} latency 500ms"
        self._stack = contextlib.ExitStack()
        self._told = np.frombuffer(mmap.mmap(-1, 2 * 8), np.float64)
        self._known = np.zeros(2, np.float64)
        with self._stack:
            home = self._namespace()
            self._stack.callback(_enter, home)
            _unshare()
            switch = self._namespace()
            self._hosts = []
            for i in range(n_hosts):
                _unshare()
                self._hosts.append(self._namespace())
                others = [j for j in range(n_hosts) if j != i]
                _run(
                    "ip",
                    f"link add eth0 address {_mac(i)} gso_max_segs {_PACKETS} type veth "
                    f"peer name port{i} netns /proc/self/fd/{switch}",
                    f"address add {_ip(i)}/24 dev eth0",
                    "link set eth0 up",
                    *(f"neighbour add {_ip(j)} lladdr {_mac(j)} dev eth0" for j in others),
                )
                _run("tc", f"qdisc add dev eth0 {limits}")
            _enter(switch)
            _run("ip", *(f"link set port{i} up" for i in range(n_hosts)))
            _run("tc", *(f"qdisc add dev port{i} {limits}" for i in range(n_hosts)))
            sock = self._stack.enter_context(_packet_socket())
            targets = np.array([socket.if_nametoindex(f"port{i}") for i in range(n_hosts)])
            _enter(home)
            fork = multiprocessing.get_context("fork")
            process = fork.Process(target=_hold, args=(sock, targets, hold_s, self._told), daemon=True)
            process.start()
            self._stack.callback(process.join)
            self._stack.callback(process.kill)
            for _ in range(os.cpu_count() or 1):
                awake = fork.Process(target=_stay_awake, daemon=True)
                awake.start()
                self._stack.callback(awake.join)
                self._stack.callback(awake.kill)
            self._home = home
            self._stack = self._stack.pop_all()

    def __enter__(self) -> "Wires":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connect(self, a: int, b: int) -> tuple[socket.socket, socket.socket]:
        """The ends at host `a` and at host `b` of a connection."""
        with self._inside(b), socket.create_server((_ip(b), 0)) as server:
            _use_cubic(server)
            with self._inside(a):
                client = socket.socket()
            _use_cubic(client)
            client.settimeout(10)
            client.connect(server.getsockname())
            client.settimeout(None)
            return client, server.accept()[0]

    def lateness(self) -> float:
        """By how many seconds a packet came too late since the last call, the mean."""
        told = self._told.copy()
        n, late_s = told - self._known
        self._known = told
        return float(late_s / max(n, 1))

    def _namespace(self) -> int:
        """A descriptor of the present one."""
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        os.set_inheritable(fd, True)  # by the ip command
        self._stack.callback(os.close, fd)
        return fd

    @contextlib.contextmanager
    def _inside(self, host: int) -> Iterator[None]:
        _enter(self._hosts[host])
        try:
            yield
        finally:
            _enter(self._home)


def end_with_parent() -> None:
    """Has this process killed when its parent ends in whatever way."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _unshare() -> None:
    if _libc.unshare(_CLONE_NEWNET):
        raise SystemExit(f"no network namespace can be made here: {os.strerror(ctypes.get_errno())}")


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(command: str, *lines: str) -> None:
    done = subprocess.run(
        [command, "-batch", "-"],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        close_fds=False,  # which name namespaces
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the wires cannot be made here: {command}: {done.stderr.strip()}")


def _ip(host: int) -> str:
    return f"10.77.0.{host + 1}"


def _mac(host: int) -> str:
    return f"02:00:00:00:00:{host:02x}"


def _use_cubic(sock: socket.socket) -> None:
    """What home machines use, whatever this one does."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _packet_socket() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_IP))
    sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)  # checksums and cutting stay with the kernel
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):  # what waits for a bucket counts as being sent
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 28)
    return sock


def _stay_awake() -> None:
    """Spins where nobody has anything to do: a virtual processor that sleeps wakes up 40 to 200 us late."""
    end_with_parent()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            pass


def _hold(sock: socket.socket, targets: Any, hold_s: float, told: Any) -> None:
    """Passes every packet on when its time has come, before anything else that this machine has to do."""
    end_with_parent()
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    packets = np.zeros((_SLOTS, _SLOT_BYTES), np.uint8)
    addresses, stamps = np.zeros(_SLOTS, _ADDRESS), np.zeros(_SLOTS, _STAMP)
    pieces, messages = np.zeros((_SLOTS, 2), np.uint64), np.zeros(_SLOTS, _MESSAGE)
    pieces[:, 0] = _at(packets)
    messages["name"], messages["name_room"] = _at(addresses), _ADDRESS.itemsize
    messages["pieces"], messages["n_pieces"], messages["control"] = _at(pieces), 1, _at(stamps)
    base, hold_ns = messages.ctypes.data, int(hold_s * 1e9)

    def transfer(call: Any, first: int, n: int) -> int:
        """How many of these messages were received or sent."""
        at = ctypes.c_void_p(base + first * _MESSAGE.itemsize)
        return max(0, call(sock.fileno(), at, n, socket.MSG_DONTWAIT, None))

    seconds, nanoseconds, interfaces = stamps["seconds"], stamps["nanoseconds"], addresses["interface"]
    sizes, rooms, stamp_rooms = messages["n_bytes"], pieces[:, 1], messages["control_room"]
    due_ns: deque[int] = deque()
    tail = 0  # the slot of the first that is held, in a ring
    read_ns = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if not due_ns:
                select.select([sock], [], [])
            # What came since the last look has its own time stamp and is not due yet.
            if not due_ns or time.time_ns() - read_ns > hold_ns // 4:
                read_ns = time.time_ns()
                n = _BATCH
                while n == _BATCH and len(due_ns) <= _SLOTS - _BATCH:
                    first = (tail + len(due_ns)) % _SLOTS
                    n = min(_BATCH, _SLOTS - first)
                    new = slice(first, first + n)
                    rooms[new], stamp_rooms[new] = _SLOT_BYTES, _STAMP.itemsize
                    n = transfer(_libc.recvmmsg, first, n)
                    new = slice(first, first + n)
                    due_ns.extend((seconds[new] * 1_000_000_000 + nanoseconds[new] + hold_ns).tolist())
                    rooms[new], stamp_rooms[new] = sizes[new], 0
                    interfaces[new] = targets[packets[new, _TARGET]]
            now_ns = time.time_ns()
            n = len(list(itertools.takewhile(now_ns.__ge__, due_ns)))
            if n:
                n = transfer(_libc.sendmmsg, tail, min(n, _SLOTS - tail)) or 1  # or a full queue lost it
                now_ns = time.time_ns()
                told += n, sum(now_ns - due_ns.popleft() for _ in range(n)) / 1e9
                tail = (tail + n) % _SLOTS
            elif due_ns:
                wait_ns = min(due_ns[0], read_ns + hold_ns // 4 + 1) - now_ns
                time.sleep(max(0, min(wait_ns, _NAP_NS)) / 1e9)


def _at(array: Any) -> Any:
    """The address of each row."""
    return array.ctypes.data + np.arange(len(array), dtype=np.uint64) * np.uint64(array.strides[0])
