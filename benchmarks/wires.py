"""Hosts in network namespaces, on wires of some rate and delay to one switch. For root, on Linux, with cc.

Each host's sockets and its interface are in a namespace of its own. Its wire is a veth pair, whose two ends
hold what goes out and what comes in at the rate by `tc tbf`. The switch, one more namespace, has neither
bridge nor addresses: a process (relay.c) reads what comes from all wires by one packet socket, holds it for
the delay and writes it to the wire of the host that it is for. So both ends speak TCP with each other through
their kernels: acknowledgements wait as long, and they and the headers use up the rate.

A bucket lets the first packets of a message pass at once, which would flatter us. The delay is therefore
longer by as long as a full bucket takes at the rate: what is at least as long as the bucket (12 KB, over
all its messages) comes when its last byte would, and what is shorter later. The delay counts from the
kernel's time stamp, and is right in the mean: what would come late, the relay sends sooner; `lateness` tells
what remained of that.

Nothing here has a name outside of these processes, so whatever way they end, nothing is left.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# TCP hands over up to so many packets as one, as network cards do and undo: each costs the processor the
# same here. A bucket that holds just one of these would lose what comes in while its timer is late.
_PACKETS = 4
_BUCKET_BYTES = 2 * _PACKETS * 1514

# From linux/if_packet.h, linux/sched.h, linux/prctl.h and asm/socket.h, for what Python has no names.
_PACKET_VNET_HDR, _SOL_PACKET, _CLONE_NEWNET, _ETH_P_IP = 15, 263, 0x40000000, 0x0800
_SO_TIMESTAMPNS, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _PR_SET_PDEATHSIG = 35, 32, 33, 1

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
            targets = np.array([socket.if_nametoindex(f"port{i}") for i in range(n_hosts)], np.int32)
            _enter(home)
            fork = multiprocessing.get_context("fork")
            process = fork.Process(
                target=_hold, args=(_compiled_relay(), sock, targets, hold_s, self._told), daemon=True
            )
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


def _hold(relay: ctypes.CDLL, sock: socket.socket, targets: Any, hold_s: float, told: Any) -> None:
    """Passes every packet on when its time has come, before anything else that this machine has to do."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle: it kills this process
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    relay.relay(
        sock.fileno(),
        ctypes.c_void_p(targets.ctypes.data),
        ctypes.c_int64(int(hold_s * 1e9)),
        ctypes.c_void_p(told.ctypes.data),
    )


def _compiled_relay() -> ctypes.CDLL:
    """relay.c as a library."""
    source = Path(__file__).with_name("relay.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "relay.so"
        done = subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=False)
        if done.returncode:
            raise SystemExit("wires need a C compiler, for relay.c")
        return ctypes.CDLL(str(library))
