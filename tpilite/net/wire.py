"""Frames: what ranks say to each other, as bytes, with no socket in sight.

A frame is

    offset  bytes  what
    0       3      magic, "TPI"
    3       1      version of the protocol, 1
    4       4      H, length of the header, unsigned
    8       8      P, length of the payload, unsigned
    16      H      the header: one msgpack map
    16 + H  P      the payload: raw bytes

with integers in little-endian order. Magic and version keep their place in every version to come, so that
two nodes of different versions can tell each other so. The header has "type", the name of one of the
messages below, and exactly the fields of that message. It holds nil, booleans, numbers, UTF-8 strings,
byte strings, arrays and maps with string keys; extension types are refused, and so is anything behind the
map. Only `Broadcast`, `Gather` and `Reduce` have a payload: the elements of one array, C order,
little-endian.

The order of messages. On every connection, before anything else:

    client: Hello(nonce)                          server: Hello(nonce)
    client: Proof                                 server: Proof, or Refused and close

On a connection to the port of rank 0, then, either of

    control   Join -> Welcome or Refused; Heartbeat both ways from then on, whenever nothing else was
              sent for a while; Ready from the worker when it can compute; then, from rank 0, Refused or, when
              all are ready, Start; Goodbye is a clean end, Error a failure, both ways; nothing follows them
    data      Attach, naming the epoch of that Start, then Formed both ways. From there on both sides
              call the same operations in the same order: Broadcast from rank 0; Gather to rank 0; Barrier
              to rank 0 and back; Reduce

and between two workers a data connection that carries Attach and then Reduce only.

The decoder does no I/O. It offers a view of exactly the bytes that it wants next, so that a socket
receives straight into place, the payload into an array of the caller's:

    match decoder.next_event():
        case FrameStart(header, n_payload_bytes): ...       # payload_into(array), or it makes a buffer
        case FrameEnd(payload): ...                         # all of it is there
        case NEED_MORE: decoder.received(sock.recv_into(decoder.wanted()))

After a `ProtocolError` the stream has no meaning any more: close it.
"""

import dataclasses
import enum
import struct
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_origin

import msgpack

from tpilite.errors import ProtocolError

MAGIC = b"TPI"
VERSION = 1
PREFIX = struct.Struct("<3sBIQ")

# A pass's rows, the candidates' ids and config.json take some tens of KiB; what is larger goes as payload.
# A header of nothing but small numbers takes up to 9 times its length as Python objects.
MAX_HEADER_BYTES = 1 << 20
# The largest is the full logits of a prompt's chunk: 512 rows of 128 Ki float32.
MAX_PAYLOAD_BYTES = 1 << 28
# Before the token is proved, only Hello, Proof and Refused can come; the longest of them is below 100 bytes.
MAX_HANDSHAKE_BYTES = 256
# Ours nest 4 deep. Msgpack's own limit is 1024 levels, where Python's recursion would end first.
_MAX_DEPTH = 16


class Header:
    """The base of all messages. The type's name on the wire is the class's name in lower case."""


@dataclass(frozen=True)
class Hello(Header):
    """The first frame of both sides: a random nonce for the other's proof."""

    nonce: bytes


@dataclass(frozen=True)
class Proof(Header):
    """That the sender knows the token (`auth.prove`)."""

    proof: bytes


@dataclass(frozen=True)
class Refused(Header):
    """Why the sender will close; with `retry`, asking again later can help."""

    reason: str
    retry: bool = False


@dataclass(frozen=True)
class Join(Header):
    """A worker asks for a place: a rank or None for any, and what it holds already."""

    rank: int | None
    terms: dict[str, Any]


@dataclass(frozen=True)
class Welcome(Header):
    """The worker's place, how long silence may last, and what it needs to prepare."""

    rank: int
    world_size: int
    timeout_s: float
    info: dict[str, Any]


@dataclass(frozen=True)
class Ready(Header):
    """The worker can compute, under `terms`, and listens on `port` for other workers."""

    terms: dict[str, Any]
    port: int


@dataclass(frozen=True)
class Start(Header):
    """Every rank is ready. `peers[r]` is [host, port] of rank r, empty for rank 0."""

    epoch: int
    peers: list[Any]
    allreduce: str  # "star", or a way for which workers connect to each other too
    payload: str  # "f32", "f16" or "bf16"


@dataclass(frozen=True)
class Attach(Header):
    """This is the data connection of `rank` in the group of `epoch`."""

    epoch: int
    rank: int


@dataclass(frozen=True)
class Formed(Header):
    """Whether the sender's connections to the other workers stand, or why not. Rank 0 speaks for all."""

    mesh: bool
    reason: str = ""


@dataclass(frozen=True)
class Broadcast(Header):
    """Rank 0's message to all: plain values and an array of `dtype` (none where empty) as payload."""

    header: dict[str, Any]
    dtype: str
    shape: list[Any]


@dataclass(frozen=True)
class Gather(Header):
    """A worker's message to rank 0, as `Broadcast`."""

    header: dict[str, Any]
    dtype: str
    shape: list[Any]


@dataclass(frozen=True)
class Reduce(Header):
    """A part of a sum, or the sum: the payload's elements are of type `payload`."""

    payload: str


@dataclass(frozen=True)
class Barrier(Header):
    """The sender has come to the barrier; from rank 0: all have."""


@dataclass(frozen=True)
class Heartbeat(Header):
    """The sender lives."""


@dataclass(frozen=True)
class Goodbye(Header):
    """The sender ends the session; nothing failed."""


@dataclass(frozen=True)
class Error(Header):
    """The sender cannot go on; `rank` is the rank that it misses, where that is the cause."""

    reason: str
    rank: int | None = None


_TYPES: Final = {
    cls.__name__.lower(): cls
    for cls in (
        Hello, Proof, Refused, Join, Welcome, Ready, Start, Attach, Formed,
        Broadcast, Gather, Reduce, Barrier, Heartbeat, Goodbye, Error,
    )
}  # fmt: skip
_WITH_PAYLOAD = (Broadcast, Gather, Reduce)


def _runtime_type(annotation: Any) -> Any:
    """What isinstance takes: `dict` of `dict[str, Any]`, unions as they are."""
    origin = get_origin(annotation)
    if annotation is float:
        return int | float  # 10 and 10.0 are the same to a sender in another language
    return annotation if origin in (None, types.UnionType) else origin


_FIELDS: Final[dict[type[Header], dict[str, Any]]] = {
    cls: {f.name: _runtime_type(f.type) for f in dataclasses.fields(cls)} for cls in _TYPES.values()
}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as a peer would receive them: tuples become lists."""
    received: dict[str, Any] = msgpack.unpackb(msgpack.packb(values))
    return received


def encode(header: Header, n_payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame, which `n_payload_bytes` of payload will follow."""
    values: dict[str, Any] = {"type": type(header).__name__.lower()}
    for name in _FIELDS[type(header)]:
        values[name] = getattr(header, name)
    packed: bytes = msgpack.packb(values)
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
            header = _decode_header(self._buffer)
            if self._n_payload_bytes and not isinstance(header, _WITH_PAYLOAD):
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
        """Refuses a stranger at its first bytes: one that sends three may never send sixteen."""
        start = bytes(self._buffer[: min(self._filled, len(MAGIC) + 1)])
        if start[: len(MAGIC)] != MAGIC[: len(start)]:
            raise ProtocolError(f"expected a tpilite node, which begins with {MAGIC!r}, found {start!r}")
        if len(start) > len(MAGIC) and start[len(MAGIC)] != VERSION:
            raise OtherVersion(
                f"this node speaks protocol version {VERSION}, the other {start[len(MAGIC)]}; "
                "install the same tpilite on both"
            )


def _decode_header(data: memoryview) -> Header:
    try:
        values = msgpack.unpackb(data, ext_hook=_refuse_extension)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(
            f"expected a msgpack map as a frame's header: {error or 'it is cut off'}"
        ) from None
    if not isinstance(values, dict):
        raise ProtocolError(f"expected a msgpack map as a frame's header, found {type(values).__name__}")
    name = values.pop("type", None)
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ProtocolError(f"expected a message type of protocol version {VERSION}, found {name!r:.60}")
    fields = _FIELDS[cls]
    if values.keys() != fields.keys():
        raise ProtocolError(
            f"expected {cls.__name__} to have {', '.join(fields) or 'no fields'}; "
            f"found {', '.join(map(repr, values)) or 'none':.200}"
        )
    for key, expected in fields.items():
        value = values[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ProtocolError(
                f"expected {cls.__name__}.{key} to be {getattr(expected, '__name__', expected)}, "
                f"found {type(value).__name__}"
            )
        _check_plain(value, _MAX_DEPTH)
    return cls(**values)


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _check_plain(value: Any, depth: int) -> None:
    """Refuses what is not plain: msgpack makes timestamps (type -1) without asking its hook."""
    if value is None or isinstance(value, str | bytes | int | float):
        return
    if not isinstance(value, list | dict):
        raise ProtocolError(f"expected plain values in a frame's header, found {type(value).__name__}")
    if depth == 0:
        raise ProtocolError(f"expected at most {_MAX_DEPTH} levels in a frame's header")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ProtocolError(f"expected string keys in a frame's header, found {type(key).__name__}")
            _check_plain(item, depth - 1)
    else:
        for item in value:
            _check_plain(item, depth - 1)
