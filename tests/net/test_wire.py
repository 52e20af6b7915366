"""Frames in any pieces; everything that a peer could send instead of one."""

import contextlib
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import Pieces

from tpilite.errors import PeerLost, ProtocolError
from tpilite.net import messages, wire

BROADCAST = messages.Broadcast({"step": 3, "ids": [1, 2], "text": "é", "p": 0.5, "none": None}, "<f4", [2, 2])
FRAMES: list[tuple[messages.Header, bytes]] = [
    (messages.Hello(bytes(range(32))), b""),
    (messages.Join(None, {"dtype": "bf16"}), b""),
    (messages.Welcome(1, 3, 10, {"file_port": 29600}), b""),
    (BROADCAST, bytes(range(16))),
    (messages.Reduce("f32"), b"\1\2\3\4"),
    (messages.Barrier(), b""),
    (messages.Error("no", 2), b""),
]
STREAM = b"".join(wire.encode(header, len(payload)) + payload for header, payload in FRAMES)


def frames(*pieces: bytes) -> list[tuple[messages.Header, bytes]]:
    """All frames, up to an end that must be between two of them."""
    found = []
    with Pieces(*pieces) as channel:
        while channel.pieces:
            header, payload = channel.receive()
            found.append((header, bytes(payload)))
        with pytest.raises(PeerLost, match="closed the connection between two frames"):
            channel.receive()
    return found


def raw(values: Any, n_payload_bytes: int = 0) -> bytes:
    packed = values if isinstance(values, bytes) else msgpack.packb(values)
    return struct.pack("<3sBIQ", b"TPI", 2, len(packed), n_payload_bytes) + packed


def test_the_layout_is_that_of_the_specification() -> None:
    packed = msgpack.packb({"type": "reduce", "payload": "f32"})
    expected = b"TPI\x02" + len(packed).to_bytes(4, "little") + (8).to_bytes(8, "little") + packed
    assert wire.encode(messages.Reduce("f32"), 8) == expected


def test_whole() -> None:
    assert frames(STREAM) == FRAMES


def test_byte_by_byte() -> None:
    assert frames(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == FRAMES


def test_cut_at_every_offset() -> None:
    for cut in range(len(STREAM)):
        assert frames(STREAM[:cut], STREAM[cut:]) == FRAMES


def test_trailing_bytes_belong_to_the_next_frame() -> None:
    frame = wire.encode(BROADCAST, 16) + bytes(16)
    with Pieces(frame + frame[:5]) as channel:
        assert channel.receive() == (BROADCAST, bytes(16))
        with pytest.raises(PeerLost, match="after 5 of 16 bytes of a frame"):
            channel.receive()


def test_nothing_of_the_next_part_is_read() -> None:
    with Pieces(wire.encode(BROADCAST, 16) + bytes(16)) as channel:
        channel.receive()
        assert channel.wanted == [16, len(wire.encode(BROADCAST)) - 16, 16]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "begins with b'TPI', found b'GET '"),
        (b"S", "found b'S'"),
        (b"TPI\x03", "this node speaks protocol version 2, the other 3; install the same tpilite on both"),
        (struct.pack("<3sBIQ", b"TPI", 2, 0, 0), "1 to 1048576 bytes, found 0"),
        (struct.pack("<3sBIQ", b"TPI", 2, 2**32 - 1, 0), "1 to 1048576 bytes, found 4294967295"),
        (struct.pack("<3sBIQ", b"TPI", 2, 9, 2**64 - 1), "at most 268435456 bytes of payload, found 1844"),
        (raw({"type": "barrier"}, 1) + b"x", "expected no payload with Barrier, found 1 bytes"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, text: str) -> None:
    with Pieces(data) as channel, pytest.raises(ProtocolError) as caught:
        channel.receive()
    assert text in str(caught.value)


def test_a_handshake_has_tighter_limits() -> None:
    with Pieces(wire.encode(messages.Hello(bytes(1000)))[:16]) as channel:
        channel.limit_frames(wire.MAX_HANDSHAKE_BYTES, 0)
        with pytest.raises(ProtocolError, match="1 to 256 bytes, found 1021"):
            channel.receive()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(
    headers=st.lists(
        st.tuples(st.dictionaries(st.text(), plain, max_size=4), st.binary(max_size=60)),
        min_size=1,
        max_size=4,
    ),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
def test_any_values_in_any_pieces(headers: list[tuple[dict[str, Any], bytes]], cuts: list[int]) -> None:
    expected: list[tuple[messages.Header, bytes]] = [
        (messages.Gather(values, "|u1", [len(payload)]), payload) for values, payload in headers
    ]
    stream = b"".join(wire.encode(header, len(payload)) + payload for header, payload in expected)
    ends = [*sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert frames(*pieces) == expected


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), offset=st.integers(0, len(STREAM)), n_kept=st.integers(0, 40))
def test_damage_gives_frames_or_a_protocol_error(data: bytes, offset: int, n_kept: int) -> None:
    damaged = STREAM[:offset] + data + STREAM[offset + n_kept :]
    for stream in (data, raw(data) if data else b"", damaged):
        with Pieces(stream) as channel, contextlib.suppress(ProtocolError, PeerLost):
            channel.limit_frames(wire.MAX_HEADER_BYTES, 1 << 16)
            while True:
                channel.receive()
