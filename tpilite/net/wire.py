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
"""

import struct

from tpilite.errors import ProtocolError
from tpilite.net.messages import VERSION, WITH_PAYLOAD, Header, pack, unpack

MAGIC = b"TPI"
# How others begin, where it helps to say who they are.
_TLS = "TLS: start both sides with it or without"
_OTHERS = {b"HTTP": "an HTTP server", b"SSH": "an SSH server", b"\x15\x03": _TLS, b"\x16\x03": _TLS}
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


def check_start(start: memoryview) -> None:
    """Refuses what is no tpilite node at its first bytes: one that sends three may never send sixteen."""
    magic, version = bytes(start[: len(MAGIC)]), start[len(MAGIC) : len(MAGIC) + 1]
    if magic != MAGIC[: len(magic)]:
        found = magic + version
        kind = next((f" ({kind})" for begin, kind in _OTHERS.items() if found.startswith(begin)), "")
        raise ProtocolError(f"expected a tpilite node, which begins with {MAGIC!r}, found {found!r}{kind}")
    if version and version[0] != VERSION:
        raise OtherVersion(
            f"this node speaks protocol version {VERSION}, the other {version[0]}; "
            "install the same tpilite on both"
        )


def decode_prefix(prefix: memoryview, max_header_bytes: int, max_payload_bytes: int) -> tuple[int, int]:
    """The lengths of the header and of the payload that follow, within these limits."""
    _, _, n_header_bytes, n_payload_bytes = PREFIX.unpack(prefix)
    if not 0 < n_header_bytes <= max_header_bytes:
        raise ProtocolError(f"expected a header of 1 to {max_header_bytes} bytes, found {n_header_bytes}")
    if n_payload_bytes > max_payload_bytes:
        raise ProtocolError(f"expected at most {max_payload_bytes} bytes of payload, found {n_payload_bytes}")
    return n_header_bytes, n_payload_bytes


def decode_header(packed: memoryview, n_payload_bytes: int) -> Header:
    """The message in these bytes, which may have a payload of so many."""
    header = unpack(packed)
    if n_payload_bytes and not isinstance(header, WITH_PAYLOAD):
        raise ProtocolError(
            f"expected no payload with {type(header).__name__}, found {n_payload_bytes} bytes"
        )
    return header
