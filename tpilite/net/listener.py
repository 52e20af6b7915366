"""A port behind which only those come who prove the cluster's token.

Every connection has its own thread until it has proved itself. Time, number and message sizes are limited, so
that port scanners and clients that trickle bytes cost the cluster next to nothing.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from tpilite.closing import Closing
from tpilite.errors import ConfigError, PeerLost, ProtocolError
from tpilite.net import messages
from tpilite.net.address import Address, format_address, plain_host
from tpilite.net.auth import Security
from tpilite.net.channel import Channel
from tpilite.net.handshake import HANDSHAKE_S, accept

log = logging.getLogger(__name__)

# A cluster has fewer nodes than this that connect at the same moment.
MAX_UNAUTHENTICATED = 32
# One line for each, but no more than these in a window: a port scan must not fill a disk.
LOG_LINES, _LOG_WINDOW_S = 5, 60.0
_ACCEPT_PAUSE_S = 0.1


Admit = Callable[[socket.socket, socket.socket, str], Callable[[], None] | None]


class Acceptor(Closing):
    """Accepts connections on a listening socket, which it closes at the end; each has a thread of its own.

    `admit` is called with each, with a second handle by which it can be ended whoever holds the first, and
    with its peer's name; it gives what serves it in its thread, or None. `end` ends all that are served.
    """

    def __init__(
        self, sock: socket.socket, admit: Admit, end: Callable[[], None], refusals: "RefusalLog"
    ) -> None:
        self._socket = sock
        self._admit, self._end, self._refusals = admit, end, refusals
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Accepts, from now on."""
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"listener {self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Closes the port, ends what is being served, and joins all threads."""
        self._wake.close()
        self._thread.join()
        self._socket.close()
        self._end()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._woken.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            if any(fd == self._woken.fileno() for fd, _ in poll.poll()):
                return
            try:
                sock, handle, address = _accept(self._socket)
            except BlockingIOError:  # it has gone again
                continue
            except OSError as error:  # no file descriptors are left, for which there is only waiting
                self._refusals.add("a new one", error.strerror or error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            peer = format_address((plain_host(address[0]), address[1]))
            serve = self._admit(sock, handle, peer)
            if serve is None:
                sock.close()
                handle.close()
                continue
            thread = threading.Thread(target=self._serve, args=(serve, handle), name=peer, daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _serve(self, serve: Callable[[], None], handle: socket.socket) -> None:
        try:
            serve()
        finally:
            handle.close()
            with self._lock:
                self._threads.discard(threading.current_thread())


class Listener(Closing):
    """A listening socket that hands on who proved the token, with the first message that came then.

    `on_peer` is called in a thread of its own for each and owns the channel; what it raises closes it.
    """

    def __init__(
        self, address: Address, security: Security, on_peer: Callable[[Channel, messages.Header], None]
    ) -> None:
        self._address, self._security, self._on_peer = address, security, on_peer
        self._acceptor: Acceptor | None = None
        self._unauthenticated, self._refusals = Unauthenticated(), RefusalLog()

    @property
    def port(self) -> int:
        assert self._acceptor is not None, "open() comes first"
        return self._acceptor.port

    def open(self) -> None:
        """Listens, from now on. Raises `ConfigError` where the address cannot be had."""
        sock = listen(self._address, "--broadcast_port")
        self._acceptor = Acceptor(sock, self._admit, self._unauthenticated.end, self._refusals)
        self._acceptor.start()

    def close(self) -> None:
        """Closes the port and the connections that are not handed on yet, and joins all threads."""
        if self._acceptor is not None:
            self._acceptor.close()

    def _admit(self, sock: socket.socket, handle: socket.socket, peer: str) -> Callable[[], None]:
        self._unauthenticated.add(handle)
        return partial(self._serve, sock, handle, peer)

    def _serve(self, sock: socket.socket, handle: socket.socket, peer: str) -> None:
        deadline_s = time.monotonic() + HANDSHAKE_S
        tls = self._security.server_tls
        try:
            channel = accept(sock, peer, self._security.key, timeout_s=HANDSHAKE_S, tls=tls)
            try:
                header, _ = channel.receive(deadline_s)
                self._unauthenticated.remove(handle)
                self._on_peer(channel, header)
            except BaseException:
                channel.close()
                raise
        except (PeerLost, ProtocolError) as error:
            self._refusals.add(peer, error)
        finally:
            self._unauthenticated.remove(handle)


class Unauthenticated:
    """The connections that have not proved the token yet: a limited number, for any thread to ask.

    When there are more, the oldest is ended: those who just hold connections open keep nobody out.
    """

    def __init__(self, limit: int = MAX_UNAUTHENTICATED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._socks: dict[socket.socket, None] = {}  # the oldest first

    def add(self, sock: socket.socket) -> None:
        """Counts this connection, and ends the oldest ones where the limit asks for it."""
        with self._lock:
            while len(self._socks) >= self._limit:
                oldest = next(iter(self._socks))
                del self._socks[oldest]
                shut_down(oldest)
            self._socks[sock] = None

    def remove(self, sock: socket.socket) -> None:
        """Counts a connection no more: it has proved the token, or is about to be closed."""
        with self._lock:
            self._socks.pop(sock, None)

    def end(self) -> None:
        """Ends all of them, which their threads then notice."""
        with self._lock:
            for sock in self._socks:
                shut_down(sock)


class RefusalLog:
    """Why connections were ended that had not proved the token, in a limited number of lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._window_s, self._n_lines = 0.0, 0

    def add(self, peer: str, reason: object) -> None:
        """Logs a warning, unless there were enough of late; how many were left out is said later."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._window_s > _LOG_WINDOW_S:
                if self._n_lines > LOG_LINES:
                    log.warning("closed %d more unauthenticated connections", self._n_lines - LOG_LINES)
                self._window_s, self._n_lines = now_s, 0
            self._n_lines += 1
            if self._n_lines <= LOG_LINES:
                about = "" if peer in str(reason) else f"{peer}: "
                log.warning("closed an unauthenticated connection: %s%s", about, reason)


def listen(address: Address, option: str, purpose: str = "listen") -> socket.socket:
    """A listening socket that does not block; with an empty host for IPv4 and IPv6, where there are both.

    Raises `ConfigError`, which says what cannot be done and names the `option` that chooses another port.
    """
    host, port = address
    try:
        sock = _bound(host, port)
    except OSError as error:
        # `create_server` adds to the text what is said here already; a name's error has no such number.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error
        is_taken = number == errno.EADDRINUSE
        hint = (
            f"is another node running here? {option} chooses another port"
            if is_taken
            else (f"--host must be an address of this machine and {option} a port that is free for you")
        )
        raise ConfigError(
            f"cannot {purpose} on {format_address(address) if host else f'port {port}'}: {reason}; {hint}"
        ) from error
    # A peer that is gone between poll and accept would block the thread that accepts.
    sock.setblocking(False)
    return sock


def shut_down(sock: socket.socket) -> None:
    """Ends a connection that another thread is using: its reads and writes there fail at once."""
    with contextlib.suppress(OSError):  # it has gone by itself
        # Not an SSLSocket's own shutdown, which would send the rest of a record in the clear.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _bound(host: str, port: int) -> socket.socket:
    backlog = 128  # a cluster's nodes come back at the same moment
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
        except OSError:  # IPv6 is built in, but switched off here
            return socket.create_server(("", port), backlog=backlog)
    info = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return socket.create_server((host, port), family=info[0][0], backlog=backlog)


def _accept(server: socket.socket) -> tuple[socket.socket, socket.socket, Address]:
    """A connection, a second handle by which it can be ended whoever holds the first, and its address."""
    sock, address = server.accept()
    try:
        return sock, sock.dup(), address
    except OSError:
        sock.close()
        raise
