"""What each token adds to a text, as the decoder of a tokenizer.json has it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tpilite.text.normalizers import replacement
from tpilite.text.parts import Part
from tpilite.text.pretokenizers import from_byte_characters, metaspace_scheme

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")

Decode = Callable[[str | bytes], str | bytes]  # bytes are what is done already


@dataclass(frozen=True)
class Decoder:
    """Tokens to their bytes, one by one, so that text can be shown as it is made."""

    steps: tuple[Decode, ...]
    strips_space: bool  # a text loses one space where it begins

    def token_bytes(self, token: str) -> bytes:
        value: str | bytes = token
        for step in self.steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode(errors="replace")


def read_decoder(part: Part | None) -> Decoder:
    """The decoder that the part describes. Raises `CheckpointError` for what no stream of tokens can do."""
    if part is None:  # tokens are words, with spaces between them
        return Decoder((lambda token: f" {token}" if isinstance(token, str) else token,), True)
    steps: list[Decode] = []
    is_fused = strips_space = False
    for step in part.steps("decoders"):
        match step.kind:
            case "Fuse":
                is_fused = True
            case "Strip" if is_fused and step.text("content") == " " and step.number("stop") == 0:
                strips_space = strips_space or step.number("start") > 0
            case "Metaspace":
                strips_space = metaspace_scheme(step) != "never"
                steps.append(_of_text(_spaced(step.text("replacement"))))
            case "Replace" if not is_fused:
                steps.append(_of_text(replacement(step)))
            case "ByteFallback":
                steps.append(_of_text(_fallen_back))
            case "ByteLevel":
                steps.append(_of_text(_from_byte_level))
            case other:
                step.refuse(f"{other!r} as a step of its own")
    return Decoder(tuple(steps), strips_space)


def _of_text(step: Callable[[str], str | bytes]) -> Decode:
    return lambda value: step(value) if isinstance(value, str) else value


def _spaced(sign: str) -> Callable[[str], str]:
    return lambda token: token.replace(sign, " ")


def _fallen_back(token: str) -> str | bytes:
    return bytes.fromhex(token[3:5]) if _BYTE.fullmatch(token) else token


def _from_byte_level(token: str) -> bytes:
    try:
        return from_byte_characters(token)
    except UnicodeEncodeError:  # a token of none of the byte characters stands for itself
        return token.encode(errors="replace")
