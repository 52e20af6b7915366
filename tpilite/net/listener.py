"""A listening socket behind which only those come who prove the cluster's token.

Every connection has its own thread until it has proved itself; time, number and message sizes are limited,
so that strangers, port scanners and clients that trickle bytes cost the cluster next to nothing.
"""

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages
from tpilite.net.address import Address, format_address
from tpilite.net.auth import Security
from tpilite.net.channel import Channel
from tpilite.net.handshake import accept

log = logging.getLogger(__name__)

# A handshake is three short packets each way; a sleeping Wi-Fi card needs a second or two more.
HANDSHAKE_S = 5.0
# Connections that have not proved the token yet. A cluster has fewer nodes; when there are more, the
# oldest is closed, so that strangers who just hold connections open keep nobody out.
_MAX_UNPROVEN = 32
# One line for each stranger, but no more than these in a window: a port scan must not fill a disk.
_LOG_LINES, _LOG_WINDOW_S = 5, 60.0
_ACCEPT_PAUSE_S = 0.1


class Door:
    """A listening socket that hands on who proved the token, with the first message that came then.

    `on_guest` is called in a thread of its own for each and owns the channel; what it raises closes it.
    """

    def __init__(
        self, address: Address, security: Security, on_guest: Callable[[Channel, messages.Header], None]
    ) -> None:
        self._security, self._on_guest = security, on_guest
        self._listener = _listen(address)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._unproven: dict[threading.Thread, socket.socket] = {}
        self._threads: set[threading.Thread] = set()
        self._log_window_s, self._n_logged = 0.0, 0
        self._thread = threading.Thread(target=self._run, name=f"door {self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._wake.close()
        self._thread.join()
        with self._lock:
            threads = list(self._threads)
            for handle in self._unproven.values():
                _shutdown(handle)
        for thread in threads:
            thread.join()
        self._listener.close()
        self._woken.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            if any(fd == self._woken.fileno() for fd, _ in poll.poll()):
                return
            try:
                sock, handle, address = self._accept()
            except BlockingIOError:  # the stranger has gone again
                continue
            except OSError as error:  # no file descriptors are left, for which there is only waiting
                self._log("a stranger", error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            peer = format_address((address[0].removeprefix("::ffff:"), address[1]))
            thread = threading.Thread(target=self._serve, args=(sock, handle, peer), name=peer, daemon=True)
            with self._lock:
                while len(self._unproven) >= _MAX_UNPROVEN:
                    oldest = next(iter(self._unproven))
                    _shutdown(self._unproven.pop(oldest))
                self._unproven[thread] = handle
                self._threads.add(thread)
            thread.start()

    def _accept(self) -> tuple[socket.socket, socket.socket, Address]:
        """A connection, a second handle by which it can be ended whoever holds the first, and its address."""
        sock, address = self._listener.accept()
        try:
            return sock, sock.dup(), address
        except OSError:
            sock.close()
            raise

    def _serve(self, sock: socket.socket, handle: socket.socket, peer: str) -> None:
        deadline_s = time.monotonic() + HANDSHAKE_S
        tls = self._security.server_tls
        me = threading.current_thread()
        try:
            channel = accept(sock, peer, self._security.token, timeout_s=HANDSHAKE_S, tls=tls)
            try:
                header, _ = channel.receive(deadline_s)
                with self._lock:
                    self._unproven.pop(me, None)
                self._on_guest(channel, header)
            except BaseException:
                channel.close()
                raise
        except (PeerLost, ProtocolError) as error:
            self._log(peer, error)
        finally:
            with self._lock:
                self._unproven.pop(me, None)
                self._threads.discard(me)
            handle.close()

    def _log(self, peer: str, error: TpiliteError | OSError) -> None:
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._log_window_s > _LOG_WINDOW_S:
                if self._n_logged > _LOG_LINES:
                    log.warning("closed %d more connections of strangers", self._n_logged - _LOG_LINES)
                self._log_window_s, self._n_logged = now_s, 0
            self._n_logged += 1
            if self._n_logged <= _LOG_LINES:
                about = "" if peer in str(error) else f"{peer}: "
                log.warning("closed the connection of a stranger: %s%s", about, error)


def _listen(address: Address) -> socket.socket:
    """A listening socket; with an empty host for IPv4 and IPv6, where the machine has both."""
    host, port = address
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError:  # IPv6 is built in, but switched off here
                return socket.create_server(("", port))
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][
            0
        ]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # `create_server` adds to the text what is said here already; a name's error has no such number.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error
        raise ConfigError(
            f"cannot listen on {format_address(address) if host else f'port {port}'}: {reason}; "
            "is another node running here? --broadcast_port chooses another port"
        ) from error


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has gone by itself
        sock.shutdown(socket.SHUT_RDWR)
