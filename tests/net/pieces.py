"""Channels without a network: one that reads given bytes, and one that keeps what it sends."""

import socket

from tpilite.net.channel import Channel, Progress


class Pieces(Channel):
    """A channel whose bytes come in these pieces, of which it reads no more than it has room for."""

    def __init__(self, *pieces: bytes) -> None:
        self.sockets = socket.socketpair()
        super().__init__(self.sockets[0], "peer")
        self.pieces = [piece for piece in pieces if piece]
        self.wanted: list[int] = []

    def receive_some(
        self, view: memoryview, deadline_s: float | None, where: Progress, *, whole: bool = False
    ) -> int:
        if not self.pieces:
            raise self.lost(None, where)
        self.wanted.append(len(view))
        piece = self.pieces.pop(0)
        view[: len(piece)] = piece[: len(view)]
        if piece[len(view) :]:
            self.pieces.insert(0, piece[len(view) :])
        return min(len(piece), len(view))

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_error: object) -> None:
        for sock in self.sockets:
            sock.close()


class Kept(Pieces):
    """A channel that keeps what is sent, each call of `send` as one."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def send_now(self, view: memoryview) -> int:
        self.sent.append(bytes(view))
        return len(view)
