"""Frames: messages as bytes, with no socket in sight.

A frame is

    offset  bytes  what
    0       3      magic, "TPI"
    3       1      version of the protocol, 1
    4       4      H, length of the header, unsigned
    8       8      P, length of the payload, unsigned
    16      H      the header: one msgpack map
    16 + H  P      the payload: raw bytes

with integers in little-endian order. Magic and version keep their place in every version to come, so that
two nodes of different versions can tell each other so. `messages` says what a header can hold, and which
messages have a payload.

The decoder does no I/O. It offers a view of exactly the bytes that it wants next, so that a socket
receives straight into place, the payload into an array of the caller's:

    match decoder.next_event():
        case FrameStart(header, n_payload_bytes): ...       # payload_into(array), or it makes a buffer
        case FrameEnd(payload): ...                         # all of it is there
        case NEED_MORE: decoder.received(sock.recv_into(decoder.wanted()))

After a `ProtocolError` the stream has no meaning any more: close it.
"""

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from tpilite.errors import ProtocolError
from tpilite.net.messages import VERSION, WITH_PAYLOAD, Header, pack, unpack

MAGIC = b"TPI"
PREFIX = struct.Struct("<3sBIQ")

# A pass's rows, the candidates' ids and config.json take some tens of KiB; what is larger goes as payload.
# A header of nothing but small numbers takes up to 9 times its length as Python objects.
MAX_HEADER_BYTES = 1 << 20
# The largest is the full logits of a prompt's chunk: 512 rows of 128 Ki float32.
MAX_PAYLOAD_BYTES = 1 << 28
# Before the token is proved, only Hello, Proof and Refused can come; the longest of them is below 100 bytes.
MAX_HANDSHAKE_BYTES = 256


def encode(header: Header, n_payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame, which `n_payload_bytes` of payload will follow."""
    packed = pack(header)
    assert len(packed) <= MAX_HEADER_BYTES, "large values travel as payload"
    assert n_payload_bytes <= MAX_PAYLOAD_BYTES, "prompts go in chunks"
    return PREFIX.pack(MAGIC, VERSION, len(packed), n_payload_bytes) + packed


class OtherVersion(ProtocolError):
    """The peer is a tpilite node, of another version of the protocol."""


class _NeedMore(enum.Enum):
    NEED_MORE = "NEED_MORE"


NEED_MORE: Final = _NeedMore.NEED_MORE


@dataclass(frozen=True)
class FrameStart:
    """A header came; `n_payload_bytes` follow it."""

    header: Header
    n_payload_bytes: int


@dataclass(frozen=True)
class FrameEnd:
    """The whole frame came; the payload is in the buffer given to `payload_into`, or in one of its own."""

    payload: memoryview


@dataclass
class Decoder:
    """Bytes in, frames out; the limits are checked before anything is allocated."""

    max_header_bytes: int = MAX_HEADER_BYTES
    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    _part: Literal["prefix", "header", "payload", "end"] = field(default="prefix", init=False)
    _buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(PREFIX.size)), init=False)
    _filled: int = field(default=0, init=False)
    _n_payload_bytes: int = field(default=0, init=False)
    _failure: ProtocolError | None = field(default=None, init=False)

    @property
    def between_frames(self) -> bool:
        return self._part == "prefix" and not self._filled

    @property
    def progress(self) -> str:
        """How far the stream came, for an error's text."""
        if self.between_frames:
            return "between two frames"
        part = "payload" if self._part == "end" else self._part
        return f"after {self._filled} of {len(self._buffer)} bytes of a frame's {part}"

    def wanted(self) -> memoryview:
        """Where the next bytes belong: exactly those that are missing of the part at hand."""
        return self._buffer[self._filled :]

    def received(self, n_bytes: int) -> None:
        """Says that the first `n_bytes` of `wanted()` are filled."""
        self._filled += n_bytes
        assert self._filled <= len(self._buffer)

    def payload_into(self, buffer: memoryview) -> None:
        """Has the payload that follows the last `FrameStart` received into these bytes, of its length."""
        assert self._part == "payload", "only a FrameStart has a payload behind it"
        assert len(buffer) == self._n_payload_bytes
        self._buffer = buffer

    def next_event(self) -> FrameStart | FrameEnd | Literal[_NeedMore.NEED_MORE]:
        """What the bytes received so far hold. Raises `ProtocolError`, and from then on again each time."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._next_event()
        except ProtocolError as error:
            self._failure = error
            raise

    def feed(self, data: bytes) -> Iterator[FrameStart | FrameEnd]:
        """The events of `data`, for bytes that are at hand already; to be consumed whole."""
        rest = memoryview(data)
        while True:
            while (event := self.next_event()) is not NEED_MORE:
                yield event
            if not rest:
                return
            room = self.wanted()
            n_bytes = min(len(room), len(rest))
            room[:n_bytes] = rest[:n_bytes]
            self.received(n_bytes)
            rest = rest[n_bytes:]

    def _next_event(self) -> FrameStart | FrameEnd | Literal[_NeedMore.NEED_MORE]:
        if self._part == "prefix":
            self._check_start()
        if self._part == "payload" and len(self._buffer) != self._n_payload_bytes:
            self._buffer = memoryview(bytearray(self._n_payload_bytes))
        if self._filled < len(self._buffer):
            return NEED_MORE
        if self._part == "prefix":
            _, _, n_header_bytes, self._n_payload_bytes = PREFIX.unpack(self._buffer)
            if not 0 < n_header_bytes <= self.max_header_bytes:
                raise ProtocolError(
                    f"expected a header of 1 to {self.max_header_bytes} bytes, found {n_header_bytes}"
                )
            if self._n_payload_bytes > self.max_payload_bytes:
                raise ProtocolError(
                    f"expected at most {self.max_payload_bytes} bytes of payload, "
                    f"found {self._n_payload_bytes}"
                )
            self._expect("header", n_header_bytes)
            return NEED_MORE
        if self._part == "header":
            header = unpack(self._buffer)
            if self._n_payload_bytes and not isinstance(header, WITH_PAYLOAD):
                raise ProtocolError(
                    f"expected no payload with {type(header).__name__}, found {self._n_payload_bytes} bytes"
                )
            self._part, self._buffer, self._filled = "payload", memoryview(b""), 0
            return FrameStart(header, self._n_payload_bytes)
        payload = self._buffer
        self._expect("prefix", PREFIX.size)
        return FrameEnd(payload)

    def _expect(self, part: Literal["prefix", "header"], n_bytes: int) -> None:
        self._part, self._buffer, self._filled = part, memoryview(bytearray(n_bytes)), 0

    def _check_start(self) -> None:
        """Refuses what is no tpilite node at its first bytes: one that sends three may never send sixteen."""
        start = bytes(self._buffer[: min(self._filled, len(MAGIC) + 1)])
        if start[: len(MAGIC)] != MAGIC[: len(start)]:
            raise ProtocolError(f"expected a tpilite node, which begins with {MAGIC!r}, found {start!r}")
        if len(start) > len(MAGIC) and start[len(MAGIC)] != VERSION:
            raise OtherVersion(
                f"this node speaks protocol version {VERSION}, the other {start[len(MAGIC)]}; "
                "install the same tpilite on both"
            )
