"""Every message packed and back; everything that a peer could send instead of one."""

import dataclasses
from typing import Any

import msgpack
import pytest

from tpilite.errors import ProtocolError
from tpilite.net import messages


def raw(values: Any) -> bytes:
    packed: bytes = values if isinstance(values, bytes) else msgpack.packb(values)
    return packed


def test_a_message_is_one_map_of_its_type_and_fields() -> None:
    assert messages.pack(messages.Attach(5, 2)) == msgpack.packb({"type": "attach", "epoch": 5, "rank": 2})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (raw(b"\xc1"), "expected a msgpack map as a frame's header"),
        (raw(b"\x81\xa4type"), "expected a msgpack map as a frame's header"),
        (raw([1, 2]), "expected a msgpack map as a frame's header, found list"),
        (raw(msgpack.packb({"type": "barrier"}) + b"\0"), "expected a msgpack map as a frame's header"),
        (raw({"type": "pickle"}), "expected a message type of protocol version 2, found 'pickle'"),
        (raw({"type": ["barrier"]}), "found ['barrier']"),
        (raw({}), "found None"),
        (raw({"type": "barrier", "more": 1}), "expected Barrier to have no fields; found 'more'"),
        (raw({"type": "hello"}), "expected Hello to have nonce; found none"),
        (raw({"type": "hello", "nonce": "text"}), "expected Hello.nonce to be bytes, found str"),
        (raw({"type": "attach", "epoch": True, "rank": 1}), "Attach.epoch to be int, found bool"),
        (raw({"type": "reduce", "payload": msgpack.ExtType(5, b"x")}), "extension type 5 is not allowed"),
        (raw({"type": "join", "rank": 1, "terms": {"a": msgpack.Timestamp(1)}}), "found Timestamp"),
        (
            raw({"type": "join", "rank": 1, "terms": {b"a": 1}}),
            "string keys in a frame's header, found bytes",
        ),
        (raw({"type": "join", "rank": 1, "terms": {7: 1}}), "int is not allowed for map key"),
        (raw(b"\x91" * 2000), "expected a msgpack map"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.unpack(memoryview(data))
    assert text in str(caught.value)


def test_deep_values_are_refused() -> None:
    value: Any = 1
    for _ in range(17):
        value = [value]
    with pytest.raises(ProtocolError, match="at most 16 levels"):
        messages.unpack(memoryview(raw({"type": "join", "rank": 1, "terms": {"a": value}})))


def test_every_message_comes_back_as_it_was() -> None:
    samples: dict[Any, Any] = {int: 7, str: "s", bytes: b"b", bool: True, float: 2.5, int | None: None}
    seen = 0
    for cls in messages.Header.__subclasses__():
        values = [
            samples.get(f.type, {"k": [1]} if "dict" in str(f.type) else [["host", 1]])
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        header = cls(*values)
        assert messages.unpack(memoryview(messages.pack(header))) == header
        seen += 1
    assert seen == 16
