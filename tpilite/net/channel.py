"""A connection to one peer that proved the token: whole frames out and in, exactly, or `PeerLost`.

A channel reads never more than the frame at hand, so that nothing waits in a buffer of its own while its
socket looks idle. Reads without a deadline block in one plain system call: whoever watches over the peer
ends them from another thread by `shutdown`. The two calls of the hot path, `send_now` and `receive_some`,
move bytes that the caller owns to and from the kernel.
"""

import contextlib
import hmac
import logging
import select
import socket
import ssl
import threading
import time
from typing import Any, TypeVar

from numpy.typing import NDArray

from tpilite.errors import PeerLost, ProtocolError
from tpilite.net import messages, wire
from tpilite.net.address import plain_host

log = logging.getLogger(__name__)

_H = TypeVar("_H", bound=messages.Header)

# What a peer only claims to send takes no more than this, and then twice what has come: sixteen bytes must
# not make a node write 256 MiB. Most passes are below it, and a connection keeps its buffer.
_FIRST_BYTES = 1 << 20

# The kernel's own watch over a dead wire, behind that of the heartbeats: idle, interval, count.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000))

Progress = tuple[int, int]  # how many bytes of a frame have come, of how many


class Channel:
    """One plain socket. A single thread receives; senders take turns among themselves.

    `shutdown` may come from any thread; `close` from the owner, when nobody uses the channel.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.broken = False  # by the peer or the network, not by `shutdown`
        self._sock = sock
        self._limits = wire.MAX_HEADER_BYTES, wire.MAX_PAYLOAD_BYTES
        self._payload = bytearray()
        self._reason = ""
        self._seals: tuple[wire.Seal, wire.Seal] | None = None  # of what is sent, of what is received
        sock.settimeout(None)
        _tune(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def local_host(self) -> str:
        return plain_host(str(self._sock.getsockname()[0]))

    @property
    def peer_host(self) -> str:
        try:
            return plain_host(str(self._sock.getpeername()[0]))
        except OSError as error:
            raise self.lost(error, (0, 0)) from error

    def limit_frames(self, max_header_bytes: int, max_payload_bytes: int) -> None:
        """Refuses longer frames from the next one on."""
        self._limits = max_header_bytes, max_payload_bytes

    def protect(self, send_key: bytes, receive_key: bytes) -> None:
        """From the next frame on, sends each with its tag and takes none without."""
        self._seals = wire.Seal(send_key), wire.Seal(receive_key)

    @property
    def n_tag_bytes(self) -> int:
        """How many bytes stand behind a frame to vouch for it."""
        return wire.TAG_BYTES if self._seals else 0

    def tag(self, frame: bytearray | memoryview) -> bytes:
        """What to send behind this frame; the frames must be sent in the order of these calls."""
        return self._seals[0].tag(frame) if self._seals else b""

    def check(self, tag: memoryview, *frame: memoryview) -> None:
        """Raises `PeerLost` unless this frame, with this tag behind it, is what the peer sent next."""
        if self._seals and not hmac.compare_digest(tag, self._seals[1].tag(*frame)):
            raise self.altered(f"a frame from {self.peer} was changed, repeated, moved or left out")

    def altered(self, what: str) -> PeerLost:
        """What to raise where a connection brings what a node does not send. It is nobody's word."""
        self.broken = True
        return PeerLost(f"{what}; the connection cannot be trusted")

    def send(
        self, header: messages.Header, payload: NDArray[Any] | None = None, deadline_s: float | None = None
    ) -> None:
        """Sends one frame; returns when the kernel has all of it. `deadline_s` is by `time.monotonic`."""
        head = wire.encode(header, 0 if payload is None else payload.nbytes)
        whole = bytearray(head) if payload is None else bytearray().join((head, payload.data))
        whole += self.tag(whole)
        frame = memoryview(whole)
        while frame := frame[self.send_now(frame) :]:
            timeout_s = None if deadline_s is None else deadline_s - time.monotonic()
            if not self._poll(select.POLLOUT, timeout_s):
                raise PeerLost(f"{self.peer} was silent for too long: it takes no more bytes")

    def receive(self, deadline_s: float | None = None) -> tuple[messages.Header, memoryview]:
        """The next frame's header and payload, which is valid until the next call."""
        try:
            return self._next_frame(deadline_s)
        except ProtocolError as error:
            raise type(error)(f"{self.peer}: {error}") from None

    def expect(self, cls: type[_H], deadline_s: float | None = None) -> tuple[_H, memoryview]:
        """The next frame, which must be a `cls`; otherwise raises `ProtocolError`."""
        header, payload = self.receive(deadline_s)
        if not isinstance(header, cls):
            raise ProtocolError(
                f"expected {cls.__name__} from {self.peer}, found {type(header).__name__}; "
                "the nodes are out of step: start them again"
            )
        return header, payload

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether something can be read (the connection's end included) within this time."""
        return self._poll(select.POLLIN, timeout_s)

    def lost(self, error: OSError | None, where: Progress) -> PeerLost:
        """What to raise for this error of a system call on the socket, or for the connection's end."""
        if self._reason:
            return PeerLost(self._reason)
        self.broken = True
        if error is None:
            return PeerLost(f"{self.peer} closed the connection {_describe(where)}")
        return PeerLost(f"the connection to {self.peer} broke {_describe(where)}: {error.strerror or error}")

    def end_sends(self) -> None:
        """Tells the peer that nothing follows what was sent; receiving goes on."""
        self._shut(socket.SHUT_WR)

    def shutdown(self, reason: str) -> None:
        """Ends the connection: whoever waits on it gets `PeerLost` with the first reason given."""
        self._reason = self._reason or reason
        self._shut(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shutdown("this node closed the connection")
        self._sock.close()

    def _shut(self, how: int) -> None:
        # Not by a TLS socket's own method: that one would have the next read return what is not decrypted.
        with contextlib.suppress(OSError):  # the peer or another thread was faster
            socket.socket.shutdown(self._sock, how)

    def _next_frame(self, deadline_s: float | None) -> tuple[messages.Header, memoryview]:
        prefix, n_bytes = memoryview(bytearray(wire.PREFIX.size)), 0
        try:
            while n_bytes < len(prefix):
                n_bytes += self.receive_some(prefix[n_bytes:], deadline_s, (n_bytes, len(prefix)))
                wire.check_start(prefix[:n_bytes])
            n_header_bytes, n_payload_bytes = wire.decode_prefix(prefix, *self._limits)
        except ProtocolError as error:
            if self._seals is None:
                raise
            raise self.altered(f"{self.peer}: {error}") from error
        total = n_bytes + n_header_bytes + n_payload_bytes + self.n_tag_bytes
        packed = bytearray(min(n_header_bytes, _FIRST_BYTES))
        self._fill(packed, n_header_bytes, n_bytes, total, deadline_s)
        if n_payload_bytes > len(self._payload):
            self._payload = bytearray(min(n_payload_bytes, _FIRST_BYTES))
        self._fill(self._payload, n_payload_bytes, n_bytes + n_header_bytes, total, deadline_s)
        tag = bytearray(self.n_tag_bytes)
        self._fill(tag, len(tag), total - len(tag), total, deadline_s)
        header, payload = memoryview(packed), memoryview(self._payload)[:n_payload_bytes]
        self.check(memoryview(tag), prefix, header, payload)
        return wire.decode_header(header, n_payload_bytes), payload

    def _fill(self, part: bytearray, n: int, n_before: int, total: int, deadline_s: float | None) -> None:
        """Receives `n` bytes into the beginning of `part`, which grows where they are more."""
        n_bytes = 0
        while n_bytes < n:
            if n_bytes == len(part):
                part += bytes(min(n_bytes, n - n_bytes))
            with memoryview(part) as view:
                n_bytes += self.receive_some(view[n_bytes:n], deadline_s, (n_before + n_bytes, total))

    def _late(self, where: Progress) -> PeerLost:
        return PeerLost(f"{self.peer} was silent for too long, {_describe(where)}")

    # What a TLS channel does in another way:

    def receive_some(
        self, view: memoryview, deadline_s: float | None, where: Progress, *, whole: bool = False
    ) -> int:
        """Receives at least one byte, or with `whole` all, which signals can still cut short."""
        if deadline_s is not None and not self._poll(select.POLLIN, deadline_s - time.monotonic()):
            raise self._late(where)
        try:
            n_bytes = self._sock.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except OSError as error:
            raise self.lost(error, where) from error
        if n_bytes == 0:
            raise self.lost(None, where)
        return n_bytes

    def send_now(self, view: memoryview) -> int:
        """Hands bytes to the kernel without waiting; how many of them it took."""
        try:
            n_bytes = self._sock.send(view, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error, (0, len(view))) from error
        self.sent_bytes += n_bytes
        return n_bytes

    def _poll(self, event: int, timeout_s: float | None) -> bool:
        poll = select.poll()
        try:
            poll.register(self._sock, event)
        except ValueError:  # closed by its owner: reading tells
            return True
        return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))


class TlsChannel(Channel):
    """A channel over TLS. OpenSSL wants one call at a time on a connection, so none of them may block."""

    _sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket, peer: str) -> None:
        super().__init__(sock, peer)
        sock.setblocking(False)
        self._lock = threading.Lock()

    def wait_readable(self, timeout_s: float) -> bool:
        with self._lock:
            if self._sock.pending():
                return True
        return super().wait_readable(timeout_s)

    def receive_some(
        self, view: memoryview, deadline_s: float | None, where: Progress, *, whole: bool = False
    ) -> int:
        del whole  # OpenSSL gives one record at a time
        while True:
            event = select.POLLIN
            try:
                with self._lock:
                    n_bytes = self._sock.recv_into(view)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except OSError as error:
                raise self.lost(error, where) from error
            else:
                if n_bytes == 0:
                    raise self.lost(None, where)
                return n_bytes
            timeout_s = 3600.0 if deadline_s is None else deadline_s - time.monotonic()
            if not self._poll(event, timeout_s) and deadline_s is not None:
                raise self._late(where)

    def send_now(self, view: memoryview) -> int:
        n_sent = 0
        try:
            while n_sent < len(view):
                with self._lock:
                    n_sent += self._sock.send(view[n_sent:])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            raise self.lost(error, (n_sent, len(view))) from error
        self.sent_bytes += n_sent
        return n_sent


def _describe(progress: Progress) -> str:
    n_bytes, total = progress
    return f"after {n_bytes} of {total} bytes of a frame" if n_bytes else "between two frames"


def _tune(sock: socket.socket) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the peer has gone already: the next read tells
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):  # macOS lacks some
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
