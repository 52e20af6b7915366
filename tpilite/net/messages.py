"""What ranks say to each other: the messages, their order, and how one is packed as a frame's header.

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

A header is one msgpack map: "type", the name of one of the messages below, and exactly the fields of that
message. It holds nil, booleans, numbers, UTF-8 strings, byte strings, arrays and maps with string keys;
extension types are refused, and so is anything behind the map. Only `Broadcast`, `Gather` and `Reduce` have
a payload behind the header: the elements of one array, C order, little-endian.
"""

import dataclasses
import types
from dataclasses import dataclass
from typing import Any, Final, get_origin

import msgpack

from tpilite.errors import ProtocolError

VERSION = 2  # of the protocol: of frames and messages together

# Ours nest 4 deep. Msgpack's own limit is 1024 levels, where Python's recursion would end first.
_MAX_DEPTH = 16


@dataclass(frozen=True)
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
    """A worker asks for a rank, or None for any, and what it holds already."""

    rank: int | None
    terms: dict[str, Any]


@dataclass(frozen=True)
class Welcome(Header):
    """The rank that the worker has, how long silence may last, and what it needs to prepare."""

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
    allreduce: str  # "star", or an algorithm for which workers connect to each other too
    payload: str  # a name of `codecs.CODECS`
    protect: bool  # whether a tag follows each Reduce, too


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


_TYPES: Final = {cls.__name__.lower(): cls for cls in Header.__subclasses__()}
WITH_PAYLOAD = (Broadcast, Gather, Reduce)


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


def pack(header: Header) -> bytes:
    """The header as it travels."""
    values: dict[str, Any] = {"type": type(header).__name__.lower()}
    for name in _FIELDS[type(header)]:
        values[name] = getattr(header, name)
    packed: bytes = msgpack.packb(values)
    return packed


def unpack(data: memoryview) -> Header:
    """The message that these bytes hold. Raises `ProtocolError`."""
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
