"""Frames: messages as bytes, with no socket in sight.

A frame is

    offset  bytes  what
    0       3      magic, "TPI"
    3       1      version of the protocol, 2
    4       4      H, length of the header, unsigned
    8       8      P, length of the payload, unsigned
    16      H      the header: one msgpack map
    16 + H  P      the payload: raw bytes
    16+H+P  16     the tag, from the end of the handshake on

with integers in little-endian order. The tag is BLAKE2b (RFC 7693) of 16 bytes over the frame's number and
then all of it that stands before the tag; the number, 8 bytes that are not sent, counts the tagged frames of
this direction of this connection from 0. The key is what `auth.prove` gives for the role "client frames" or
"server frames", after who sends. So a frame that was changed, repeated, left out, moved or sent back to its
sender does not fit, and the connection ends. Of sums (`Reduce`), only those of a group whose `Start` says so
have tags and numbers.

Magic and version keep their place in every version to come, so that
two nodes of different versions can tell each other so. `messages` says what a header can hold, and which
messages have a payload.
"""

import hashlib
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
TAG_BYTES = 16
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


class Seal:
    """The tags of the frames of one direction, in their order, for who sends them and for who checks them."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_BYTES)
        self._n_frames = 0

    def tag(self, *parts: bytearray | memoryview) -> bytes:
        """The tag of the next frame, which consists of these parts."""
        mac = self._keyed.copy()
        mac.update(self._n_frames.to_bytes(8, "little"))
        for part in parts:
            mac.update(part)
        self._n_frames += 1
        return mac.digest()
