"""A connection to one peer that proved the token: whole frames out and in, exactly, or `PeerLost`.

A channel reads never more than the frame at hand, so that nothing waits in a buffer of its own while its
socket looks idle. Reads without a deadline block in one plain system call: whoever watches over the peer
ends them from another thread by `shutdown`. The two calls of the hot path, `send_now` and `receive_some`,
move bytes that the caller owns to and from the kernel.
"""

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import auth, messages, wire

log = logging.getLogger(__name__)

_H = TypeVar("_H", bound=messages.Header)

# A connection attempt to a machine that is switched off ends after minutes by itself; home networks answer
# in milliseconds, Wi-Fi that wakes up in a second or two.
CONNECT_TIMEOUT_S = 5.0
# Between attempts: quick at first, as nodes are mostly started together; then easy on the network.
_FIRST_DELAY_S, _DELAY_GROWTH, _LAST_DELAY_S = 0.1, 1.5, 2.0
_REMINDER_S = 60.0
# The kernel's own watch over a dead wire, behind that of the heartbeats: idle, interval, count.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000))

# How a TLS connection ends that nothing is wrong with.
_TLS_ENDS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)

Address = tuple[str, int]
Progress = wire.Decoder | tuple[int, int]  # how far a frame has come, the tuple in bytes of how many


def parse_address(text: str, default_port: int) -> Address:
    """Host and port of HOST, HOST:PORT, [V6], [V6]:PORT or a bare IPv6 address. Raises `ConfigError`."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else rest
        valid = bool(bracket) and rest[:1] in ("", ":") and rest != ":"
    elif text.count(":") > 1:  # no port can follow: it could be the address's own last group
        host, port, valid = text, "", True
    else:
        host, colon, port = text.partition(":")
        valid = bool(port) or not colon
    valid = valid and bool(host) and not any(c.isspace() for c in host)
    if port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        valid = False
    if not valid:
        raise ConfigError(
            f"expected HOST, HOST:PORT or [IPV6]:PORT with a port of 1 to 65535, found {text!r}"
        )
    return host, int(port) if port else default_port


def format_address(address: Sequence[Any]) -> str:
    """What `parse_address` reads back, of a socket's address too."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Channel:
    """One plain socket. A single thread receives; senders take turns among themselves.

    `shutdown` may come from any thread; `close` from the owner, when nobody uses the channel.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.broken = False  # by the peer or the network, not by `shutdown`
        self._sock = sock
        self._decoder = wire.Decoder()
        self._payload = memoryview(bytearray())
        self._reason = ""
        sock.settimeout(None)
        _tune(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def local_host(self) -> str:
        return str(self._sock.getsockname()[0]).removeprefix("::ffff:")

    @property
    def peer_host(self) -> str:
        """The peer's address, an IPv4 one as such also where an IPv6 socket wraps it."""
        try:
            return str(self._sock.getpeername()[0]).removeprefix("::ffff:")
        except OSError as error:
            raise self.lost(error, self._decoder) from error

    def send(
        self, header: messages.Header, payload: NDArray[Any] | None = None, deadline_s: float | None = None
    ) -> None:
        """Sends one frame; returns when the kernel has all of it. `deadline_s` is by `time.monotonic`."""
        head = wire.encode(header, 0 if payload is None else payload.nbytes)
        frame = memoryview(head if payload is None else b"".join((head, payload.data)))
        while frame := frame[self.send_now(frame) :]:
            timeout_s = None if deadline_s is None else deadline_s - time.monotonic()
            if not self._poll(select.POLLOUT, timeout_s):
                raise PeerLost(f"{self.peer} was silent for too long: it takes no more bytes")

    def receive(self, deadline_s: float | None = None) -> tuple[messages.Header, memoryview]:
        """The next frame's header and payload, which is valid until the next call."""
        try:
            header, payload = self._next_frame(deadline_s)
        except ProtocolError as error:
            raise type(error)(f"{self.peer}: {error}") from None
        return header, payload

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
        progress = (
            where.progress
            if isinstance(where, wire.Decoder)
            else f"after {where[0]} of {where[1]} bytes of a frame"
        )
        if error is None:
            return PeerLost(f"{self.peer} closed the connection {progress}")
        return PeerLost(f"the connection to {self.peer} broke {progress}: {error.strerror or error}")

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
        decoder = self._decoder
        header: messages.Header | None = None
        while True:
            event = decoder.next_event()
            if event is wire.NEED_MORE:
                decoder.received(self.receive_some(decoder.wanted(), deadline_s, decoder))
            elif isinstance(event, wire.FrameStart):
                header = event.header
                if event.n_payload_bytes > len(self._payload):
                    self._payload = memoryview(bytearray(event.n_payload_bytes))
                decoder.payload_into(self._payload[: event.n_payload_bytes])
            else:
                assert header is not None
                return header, event.payload

    def _late(self, where: Progress) -> PeerLost:
        progress = where.progress if isinstance(where, wire.Decoder) else "while it was to receive"
        return PeerLost(f"{self.peer} was silent for too long, {progress}")

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


def connect(address: Address, token: str, *, timeout_s: float, tls: ssl.SSLContext | None = None) -> Channel:
    """A channel to `address`, where both sides have proved the token. One attempt.

    Raises `PeerLost` where trying again can help, `ConfigError` for another token, `ProtocolError` for
    another kind of service or version.
    """
    deadline_s = time.monotonic() + timeout_s
    peer = format_address(address)
    try:
        sock = socket.create_connection(address, timeout_s)
    except OSError as error:
        raise PeerLost(f"{peer} cannot be reached: {error.strerror or error}") from error
    with _closed_on_error(sock):
        channel = _wrap(sock, peer, tls, server_side=False, deadline_s=deadline_s)
    with _closed_on_error(channel):
        _greet_server(channel, token, deadline_s)
    return channel


def connect_until(
    address: Address,
    token: str,
    *,
    deadline_s: float | None = None,
    tls: ssl.SSLContext | None = None,
) -> Channel:
    """As `connect`, tried again until it succeeds or the deadline (None: never) passes; logs the wait."""
    delay_s, next_reminder_s = _FIRST_DELAY_S, time.monotonic()
    told: set[str] = set()
    while True:
        now_s = time.monotonic()
        timeout_s = CONNECT_TIMEOUT_S if deadline_s is None else min(CONNECT_TIMEOUT_S, deadline_s - now_s)
        try:
            return connect(address, token, timeout_s=max(timeout_s, 0.1), tls=tls)
        except PeerLost as error:
            now_s = time.monotonic()
            if deadline_s is not None and now_s + delay_s > deadline_s:
                raise PeerLost(f"{error}; gave up waiting for it") from error
            if now_s >= next_reminder_s or str(error) not in told:
                told.add(str(error))
                log.info("waiting for rank 0: %s; trying again until it answers", error)
                next_reminder_s = now_s + _REMINDER_S
        time.sleep(delay_s)
        delay_s = min(delay_s * _DELAY_GROWTH, _LAST_DELAY_S)


def accept(
    sock: socket.socket, peer: str, token: str, *, timeout_s: float, tls: ssl.SSLContext | None = None
) -> Channel:
    """The channel of an accepted socket, once both sides have proved the token; closes the socket if not.

    Raises `ProtocolError` or `PeerLost`; the whole handshake has `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    with _closed_on_error(sock):
        channel = _wrap(sock, peer, tls, server_side=True, deadline_s=deadline_s)
    with _closed_on_error(channel):
        _greet_client(channel, token, deadline_s)
    return channel


def _greet_server(channel: Channel, token: str, deadline_s: float) -> None:
    channel._decoder = wire.Decoder(wire.MAX_HANDSHAKE_BYTES, 0)
    mine = auth.new_nonce()
    try:
        channel.send(messages.Hello(mine), deadline_s=deadline_s)
        theirs = _nonce(channel, deadline_s)
    except PeerLost as error:
        raise _not_greeted(channel, error) from error
    channel.send(messages.Proof(auth.prove(token, "client", theirs, mine)), deadline_s=deadline_s)
    reply, _ = channel.receive(deadline_s)
    if isinstance(reply, messages.Refused):  # from someone who proved nothing: its words are not repeated
        raise ConfigError(f"{channel.peer} did not accept the token; start this node with that of rank 0")
    if not isinstance(reply, messages.Proof) or not auth.verify(token, "server", theirs, mine, reply.proof):
        raise ProtocolError(f"{channel.peer} does not know the token: it is not the cluster's rank 0")
    channel._decoder = wire.Decoder()


def _not_greeted(channel: Channel, error: PeerLost) -> TpiliteError:
    """Why a server says not a word; with TLS 1.3, a client learns only here that it is not let in."""
    cause = error.__cause__
    if not isinstance(channel, TlsChannel):
        return PeerLost(f"{error} (if it uses TLS, this node needs --tls_cert, --tls_key and --tls_ca)")
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, _TLS_ENDS):
        return ConfigError(
            f"{channel.peer} does not let this node in ({cause.reason}); give it with --tls_cert and "
            "--tls_key a certificate that the cluster's authority signed"
        )
    return error


def _greet_client(channel: Channel, token: str, deadline_s: float) -> None:
    # The client proves first, so that a stranger gets no proof on which to try tokens at home.
    channel._decoder = wire.Decoder(wire.MAX_HANDSHAKE_BYTES, 0)
    mine = auth.new_nonce()
    try:
        theirs = _nonce(channel, deadline_s)
    except wire.OtherVersion:
        # Its side finds our version in our Hello, if we do not reset the connection by unread bytes.
        with contextlib.suppress(PeerLost):
            channel.send(messages.Hello(mine), deadline_s=deadline_s)
            channel.receive_some(memoryview(bytearray(wire.MAX_HANDSHAKE_BYTES)), deadline_s, (0, 0))
        raise
    channel.send(messages.Hello(mine), deadline_s=deadline_s)
    proof = channel.expect(messages.Proof, deadline_s)[0].proof
    if not auth.verify(token, "client", mine, theirs, proof):
        channel.send(messages.Refused("the token is another one"), deadline_s=deadline_s)
        raise ProtocolError(f"{channel.peer} does not know the token; start it with that of this node")
    channel.send(messages.Proof(auth.prove(token, "server", mine, theirs)), deadline_s=deadline_s)
    channel._decoder = wire.Decoder()


def _nonce(channel: Channel, deadline_s: float) -> bytes:
    nonce = channel.expect(messages.Hello, deadline_s)[0].nonce
    if len(nonce) != auth.NONCE_BYTES:
        raise ProtocolError(
            f"expected a nonce of {auth.NONCE_BYTES} bytes from {channel.peer}, found {len(nonce)}"
        )
    return nonce


def _wrap(
    sock: socket.socket, peer: str, tls: ssl.SSLContext | None, *, server_side: bool, deadline_s: float
) -> Channel:
    if tls is None:
        return Channel(sock, peer)
    wrapped = tls.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    with _closed_on_error(wrapped):
        wrapped.setblocking(False)
        while True:
            event = select.POLLIN
            try:
                wrapped.do_handshake()
                return TlsChannel(wrapped, peer)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except (ConnectionError, *_TLS_ENDS) as error:
                raise PeerLost(f"{peer} ended the connection during TLS; is TLS on there, too?") from error
            except OSError as error:
                raise ProtocolError(
                    f"TLS with {peer} failed: {error.strerror or error}; "
                    "start both sides with TLS and with certificates of one authority"
                ) from error
            poll = select.poll()
            poll.register(wrapped, event)
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise PeerLost(f"{peer} was silent for too long, during TLS")


@contextlib.contextmanager
def _closed_on_error(closable: Any) -> Any:
    try:
        yield
    except BaseException:
        closable.close()
        raise


def _tune(sock: socket.socket) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the peer has gone already: the next read tells
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):  # macOS lacks some
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
