"""Decoders of a tokenizer.json: what each token adds to a text."""

from pathlib import Path
from typing import Any

import pytest

from tpilite.errors import CheckpointError
from tpilite.text.decoders import Decoder, read_decoder
from tpilite.text.parts import Part

_SIGNS = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def decoder(*steps: dict[str, Any]) -> Decoder:
    value = {"type": "Sequence", "decoders": list(steps)}
    return read_decoder(Part.of(Path("tokenizer.json"), "decoder", value))


def test_byte_level_tokens_are_bytes_and_others_stand_for_themselves() -> None:
    level = decoder({"type": "ByteLevel"})
    assert level.token_bytes("ĠÃ©") == " é".encode()
    assert level.token_bytes("漢") == "漢".encode()
    assert not level.strips_space


def test_sentencepiece_like_tokens() -> None:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    llama2 = decoder(_SIGNS, {"type": "ByteFallback"}, {"type": "Fuse"}, strip)
    assert [*map(llama2.token_bytes, ("▁a", "<0xE6>", "<0x0g>"))] == [b" a", b"\xe6", b"<0x0g>"]
    assert llama2.strips_space
    assert not decoder(_SIGNS, {"type": "Fuse"}).strips_space


@pytest.mark.parametrize(("scheme", "strips"), [("always", True), ("first", True), ("never", False)])
def test_metaspace(scheme: str, strips: bool) -> None:
    metaspace = decoder({"type": "Metaspace", "replacement": "_", "prepend_scheme": scheme})
    assert (metaspace.token_bytes("_a_"), metaspace.strips_space) == (b" a ", strips)


def test_without_a_decoder_tokens_are_words() -> None:
    assert (read_decoder(None).token_bytes("a"), read_decoder(None).strips_space) == (b" a", True)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "WordPiece"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
    ],
)
def test_what_no_stream_can_do_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{step['type']}.*not supported"):
        decoder(step)
