"""A relay between nodes that knows frames but not the token, and does harm to one of them."""

import contextlib
import socket
import struct
import threading
from typing import Any

_N_HANDSHAKE_FRAMES, _N_TAG_BYTES = 2, 16


class FrameRelay:
    """Passes frames on to `port`, all of which have tags, and does harm to the `nth` of a kind.

    "flip" changes a bit of its last part before the tag; "repeat", "drop"; "swap" with the next one.
    """

    def __init__(self, port: int, kind: str, harm: str, nth: int = 3) -> None:
        self._port, self._kind, self._harm, self._nth = port, b"type" + _packed(kind), harm, nth
        self.harmed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "FrameRelay":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_error: object) -> None:
        for sock in (self._listener, *self._sockets):
            _shut(sock)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _start(self, target: Any, *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self._sockets.append(near)
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets.append(far)
                for a, b in ((near, far), (far, near)):
                    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._start(self._pass_on, a, b)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error), source.makefile("rb") as stream:
            for i in range(1 << 30):
                prefix = stream.read(16)
                n_header_bytes, n_payload_bytes = struct.unpack("<4xIQ", prefix)
                n_tag_bytes = _N_TAG_BYTES if i >= _N_HANDSHAKE_FRAMES else 0
                body = stream.read(n_header_bytes + n_payload_bytes)
                frame = prefix + body + stream.read(n_tag_bytes)
                if n_tag_bytes and self._is_the_one(body):
                    frame = self._alter(frame, stream)
                target.sendall(frame)
        _shut(source)
        _shut(target)

    def _is_the_one(self, body: bytes) -> bool:
        with self._lock:
            self._nth -= self._kind in body[:40]
            if self._nth or self.harmed.is_set():
                return False
            self.harmed.set()
            return True

    def _alter(self, frame: bytes, stream: Any) -> bytes:
        if self._harm == "flip":
            place = len(frame) - _N_TAG_BYTES - 2
            return frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]
        if self._harm == "repeat":
            return frame + frame
        if self._harm == "drop":
            return b""
        prefix = stream.read(16)
        n_header_bytes, n_payload_bytes = struct.unpack("<4xIQ", prefix)
        return bytes(prefix + stream.read(n_header_bytes + n_payload_bytes + _N_TAG_BYTES)) + frame


def _packed(text: str) -> bytes:
    """The text as msgpack has it."""
    return bytes([0xA0 + len(text)]) + text.encode()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
