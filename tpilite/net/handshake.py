"""Connections made and accepted: TLS where it is wanted, then the token proved in both directions.

Until the other side has proved itself, it can make this one receive a few short frames and no more.
"""

import contextlib
import logging
import select
import socket
import ssl
import time
from typing import Any

from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import auth, messages, wire
from tpilite.net.address import Address, format_address
from tpilite.net.channel import Channel, TlsChannel

log = logging.getLogger(__name__)

# A handshake is three short packets each way; a sleeping Wi-Fi card needs a second or two more.
HANDSHAKE_S = 5.0
# A connection attempt to a machine that is switched off ends after minutes by itself; home networks answer
# in milliseconds, Wi-Fi that wakes up in a second or two.
CONNECT_TIMEOUT_S = 5.0
# Between attempts: quick at first, as nodes are mostly started together; then easy on the network.
_FIRST_DELAY_S, _DELAY_GROWTH, _LAST_DELAY_S = 0.1, 1.5, 2.0
_REMINDER_S = 60.0
# Reasons told at once: what answers there may give another one each time.
_MAX_REPORTED = 8

# How a TLS connection ends that nothing is wrong with.
_TLS_ENDS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)


def connect(address: Address, key: bytes, *, timeout_s: float, tls: ssl.SSLContext | None = None) -> Channel:
    """A channel to `address`, where both sides have proved the token; for frames without payload.

    One attempt. Raises `PeerLost`, whatever answers there: only who has proved the token can end a node for
    good.
    """
    deadline_s = time.monotonic() + timeout_s
    peer = format_address(address)
    try:
        sock = socket.create_connection(address, timeout_s)
    except OSError as error:
        raise PeerLost(f"{peer} cannot be reached: {error.strerror or error}") from error
    try:
        with _closed_on_error(sock):
            channel = _wrap(sock, peer, tls, server_side=False, deadline_s=deadline_s)
        with _closed_on_error(channel):
            _greet_server(channel, key, deadline_s)
    except (ProtocolError, ConfigError) as error:
        raise PeerLost(str(error)) from error
    return channel


def connect_until(
    address: Address,
    key: bytes,
    *,
    deadline_s: float | None = None,
    tls: ssl.SSLContext | None = None,
) -> Channel:
    """As `connect`, tried again until it succeeds or the deadline (None: never) passes; logs the wait."""
    delay_s, next_reminder_s = _FIRST_DELAY_S, time.monotonic()
    reported: set[str] = set()
    while True:
        now_s = time.monotonic()
        timeout_s = CONNECT_TIMEOUT_S if deadline_s is None else min(CONNECT_TIMEOUT_S, deadline_s - now_s)
        try:
            return connect(address, key, timeout_s=max(timeout_s, 0.1), tls=tls)
        except PeerLost as error:
            now_s = time.monotonic()
            if deadline_s is not None and now_s + delay_s > deadline_s:
                raise PeerLost(f"{error}; gave up waiting for it") from error
            is_new = str(error) not in reported and len(reported) < _MAX_REPORTED
            if now_s >= next_reminder_s or is_new:
                reported.add(str(error))
                log.info("waiting for rank 0: %s; trying again until it answers", error)
                next_reminder_s = now_s + _REMINDER_S
        time.sleep(delay_s)
        delay_s = min(delay_s * _DELAY_GROWTH, _LAST_DELAY_S)


def accept(
    sock: socket.socket, peer: str, key: bytes, *, timeout_s: float, tls: ssl.SSLContext | None = None
) -> Channel:
    """The channel of an accepted socket, for frames without payload, once both sides have proved the token.

    Closes the socket if they do not.
    Raises `ProtocolError` or `PeerLost`; the whole handshake has `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    with _closed_on_error(sock):
        channel = _wrap(sock, peer, tls, server_side=True, deadline_s=deadline_s)
    with _closed_on_error(channel):
        _greet_client(channel, key, deadline_s)
    return channel


def _greet_server(channel: Channel, key: bytes, deadline_s: float) -> None:
    channel.limit_frames(wire.MAX_HANDSHAKE_BYTES, 0)
    mine = auth.new_nonce()
    try:
        channel.send(messages.Hello(mine), deadline_s=deadline_s)
        theirs = _nonce(channel, deadline_s)
    except PeerLost as error:
        raise _not_greeted(channel, error) from error
    channel.send(messages.Proof(auth.prove(key, "client", theirs, mine)), deadline_s=deadline_s)
    reply, _ = channel.receive(deadline_s)
    if isinstance(reply, messages.Refused):  # from someone who proved nothing: its words are not repeated
        raise ConfigError(f"{channel.peer} did not accept the token; start this node with that of rank 0")
    if not isinstance(reply, messages.Proof) or not auth.verify(key, "server", theirs, mine, reply.proof):
        raise ProtocolError(f"{channel.peer} does not know the token: it is not the cluster's rank 0")
    channel.protect(*(auth.prove(key, role, theirs, mine) for role in ("client frames", "server frames")))
    channel.limit_frames(wire.MAX_HEADER_BYTES, 0)


def _not_greeted(channel: Channel, error: PeerLost) -> TpiliteError:
    """Why a server says not a word; with TLS 1.3, a client learns only here that it is not let in."""
    cause = error.__cause__
    if not isinstance(channel, TlsChannel):
        return PeerLost(
            f"{error} (if it uses TLS, this node needs --encrypt, or --tls_cert, --tls_key and --tls_ca)"
        )
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, _TLS_ENDS):
        return ConfigError(
            f"{channel.peer} does not let this node in ({cause.reason}); give it with --tls_cert and "
            "--tls_key a certificate that the cluster's authority signed"
        )
    return error


def _greet_client(channel: Channel, key: bytes, deadline_s: float) -> None:
    # The client proves first: one without the token gets no proof on which to try tokens at home.
    channel.limit_frames(wire.MAX_HANDSHAKE_BYTES, 0)
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
    if not auth.verify(key, "client", mine, theirs, proof):
        channel.send(messages.Refused("the token is another one"), deadline_s=deadline_s)
        raise ProtocolError(f"{channel.peer} does not know the token; start it with that of this node")
    channel.send(messages.Proof(auth.prove(key, "server", mine, theirs)), deadline_s=deadline_s)
    channel.protect(*(auth.prove(key, role, mine, theirs) for role in ("server frames", "client frames")))
    channel.limit_frames(wire.MAX_HEADER_BYTES, 0)


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
                    "start both sides with --encrypt, or with certificates of one authority"
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
