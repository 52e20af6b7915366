"""Frames in any pieces; everything that a peer could send instead of one."""

import contextlib
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.errors import ProtocolError
from tpilite.net import messages, wire
from tpilite.net.wire import Decoder, FrameEnd, FrameStart

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


def frames(events: list[FrameStart | FrameEnd]) -> list[tuple[messages.Header, bytes]]:
    pairs = zip(events[::2], events[1::2], strict=False)
    result = []
    for start, end in pairs:
        assert isinstance(start, FrameStart)
        assert isinstance(end, FrameEnd)
        assert start.n_payload_bytes == len(end.payload)
        result.append((start.header, bytes(end.payload)))
    return result


def raw(values: Any, n_payload_bytes: int = 0) -> bytes:
    packed = values if isinstance(values, bytes) else msgpack.packb(values)
    return struct.pack("<3sBIQ", b"TPI", 1, len(packed), n_payload_bytes) + packed


def test_the_layout_is_that_of_the_specification() -> None:
    packed = msgpack.packb({"type": "reduce", "payload": "f32"})
    expected = b"TPI\x01" + len(packed).to_bytes(4, "little") + (8).to_bytes(8, "little") + packed
    assert wire.encode(messages.Reduce("f32"), 8) == expected


def test_whole() -> None:
    decoder = Decoder()
    assert frames(list(decoder.feed(STREAM))) == FRAMES
    assert decoder.between_frames


def test_byte_by_byte() -> None:
    decoder = Decoder()
    events = [event for i in range(len(STREAM)) for event in decoder.feed(STREAM[i : i + 1])]
    assert frames(events) == FRAMES


def test_cut_at_every_offset() -> None:
    for cut in range(len(STREAM)):
        decoder = Decoder()
        events = list(decoder.feed(STREAM[:cut]))
        events += decoder.feed(STREAM[cut:])
        assert frames(events) == FRAMES


def test_trailing_bytes_belong_to_the_next_frame() -> None:
    decoder = Decoder()
    frame = wire.encode(BROADCAST, 16) + bytes(16)
    assert frames(list(decoder.feed(frame + frame[:5]))) == [(BROADCAST, bytes(16))]
    assert not decoder.between_frames
    assert decoder.progress == "after 5 of 16 bytes of a frame's prefix"


def test_a_payload_is_received_into_the_buffer_of_the_caller() -> None:
    decoder, target = Decoder(), bytearray(16)
    for event in decoder.feed(wire.encode(BROADCAST, 16) + bytes(range(16))):
        if isinstance(event, FrameStart):
            decoder.payload_into(memoryview(target))
    assert target == bytes(range(16))


def test_wanted_never_reaches_into_the_next_part() -> None:
    decoder, sizes, rest = Decoder(), [], memoryview(wire.encode(BROADCAST, 16) + bytes(16))
    while rest:
        while decoder.next_event() is not wire.NEED_MORE:
            pass
        room = decoder.wanted()
        sizes.append(len(room))
        room[:] = rest[: len(room)]
        rest = rest[len(room) :]
        decoder.received(len(room))
    assert sizes == [16, len(wire.encode(BROADCAST)) - 16, 16]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "begins with b'TPI', found b'GET '"),
        (b"S", "found b'S'"),
        (b"TPI\x02", "this node speaks protocol version 1, the other 2; install the same tpilite on both"),
        (struct.pack("<3sBIQ", b"TPI", 1, 0, 0), "1 to 1048576 bytes, found 0"),
        (struct.pack("<3sBIQ", b"TPI", 1, 2**32 - 1, 0), "1 to 1048576 bytes, found 4294967295"),
        (struct.pack("<3sBIQ", b"TPI", 1, 9, 2**64 - 1), "at most 268435456 bytes of payload, found 1844"),
        (raw({"type": "barrier"}, 1), "expected no payload with Barrier, found 1 bytes"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, text: str) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError) as caught:
        list(decoder.feed(data))
    assert text in str(caught.value)
    with pytest.raises(ProtocolError, match=r"expected|speaks"):
        decoder.next_event()


def test_a_handshake_has_tighter_limits() -> None:
    decoder = Decoder(wire.MAX_HANDSHAKE_BYTES, 0)
    with pytest.raises(ProtocolError, match="1 to 256 bytes, found 1021"):
        list(decoder.feed(wire.encode(messages.Hello(bytes(1000)))[:16] + b""))


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
    decoder, start = Decoder(), 0
    events: list[FrameStart | FrameEnd] = []
    for cut in [*sorted(cuts), len(stream)]:
        events += decoder.feed(stream[start:cut])
        start = max(start, cut)
    assert frames(events) == expected


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), offset=st.integers(0, len(STREAM)), n_kept=st.integers(0, 40))
def test_damage_gives_frames_or_a_protocol_error(data: bytes, offset: int, n_kept: int) -> None:
    damaged = STREAM[:offset] + data + STREAM[offset + n_kept :]
    for stream in (data, raw(data) if data else b"", damaged):
        with contextlib.suppress(ProtocolError):
            list(Decoder(max_payload_bytes=1 << 16).feed(stream))
