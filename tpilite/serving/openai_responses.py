"""Answers of OpenAI's API as dicts: whole ones, and the chunks of one that is streamed."""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tpilite.chat.answers import Part
from tpilite.engine.sequence import TokenLogprob
from tpilite.serving.errors import Json
from tpilite.version import __version__

Token = tuple[str, bytes | None]  # what it reads as, and its bytes where it stands for any

_FINGERPRINT = f"tpilite-{__version__}"


@dataclass(frozen=True)
class ResponseInfo:
    """The fields with which a whole answer and each of its chunks begin."""

    request_id: str
    created_s: int
    model: str
    is_chat: bool

    def to_dict(self, *, chunk: bool) -> Json:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
        }


def opening(info: ResponseInfo, n_choices: int, *, include_usage: bool) -> list[Json]:
    """The chunks before any text: in a chat, the one that names the speaker of each choice."""
    delta = {"role": "assistant", "content": "", "refusal": None}
    choices = [_choice(i, delta=dict(delta)) for i in range(n_choices)] if info.is_chat else []
    return [_chunk(info, [choice], include_usage) for choice in choices]


def chunk(
    info: ResponseInfo,
    index: int,
    part: Part,
    *,
    n_calls: int = 0,
    logprobs: Json | None = None,
    finish_reason: str | None = None,
    include_usage: bool = False,
) -> Json:
    """A chunk with a new part of one choice, or with the reason of its end.

    A call of a tool comes whole, after `n_calls` others.
    """
    if not info.is_chat:
        choice = _choice(index, text=part.text, logprobs=logprobs, finish_reason=finish_reason)
        return _chunk(info, [choice], include_usage)
    delta: Json = {}
    if part.thought:
        delta = {"reasoning_content": part.thought}
    elif part.tool:
        delta = {"tool_calls": [{"index": n_calls, **_call(part)}]}
    elif part.text or finish_reason is None:
        delta = {"content": part.text}
    choice = _choice(index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
    return _chunk(info, [choice], include_usage)


def closing(info: ResponseInfo, spent: Json) -> Json:
    """The last chunk of a stream whose usage was asked for."""
    return {**info.to_dict(chunk=True), "choices": [], "usage": spent}


def choice(
    info: ResponseInfo, index: int, parts: Iterable[Part], logprobs: Json | None, finish_reason: str
) -> Json:
    """One whole choice of an answer that is not streamed."""
    parts = list(parts)
    text = "".join(part.text for part in parts)
    if not info.is_chat:
        return _choice(index, text=text, logprobs=logprobs, finish_reason=finish_reason)
    calls = [_call(part) for part in parts if part.tool]
    thought = "".join(part.thought for part in parts)
    message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return _choice(index, message=message, logprobs=logprobs, finish_reason=finish_reason)


def response(info: ResponseInfo, choices: list[Json], spent: Json) -> Json:
    """A whole answer."""
    return {**info.to_dict(chunk=False), "choices": choices, "usage": spent}


def usage(n_prompt: int, n_new: int, n_thought: int | None = None) -> Json:
    """How many tokens an answer took, and of a model that thinks, how many of them its thoughts."""
    spent: Json = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    if n_thought is not None:
        spent["completion_tokens_details"] = {"reasoning_tokens": n_thought}
    return spent


def models(name: str, created_s: int) -> Json:
    """The list of the one model that is served."""
    return {"object": "list", "data": [model(name, created_s)]}


def model(name: str, created_s: int) -> Json:
    """One model, as the list and its own path describe it."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "tpilite"}


def chat_logprobs(tokens: Iterable[TokenLogprob], describe: Callable[[int], Token]) -> Json:
    """Log-probabilities as a chat's answer gives them."""

    def entry(token_id: int, logprob: float) -> Json:
        text, raw = describe(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}

    content = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    tokens: Iterable[TokenLogprob], describe: Callable[[int], Token], offset: int
) -> tuple[Json, int]:
    """Log-probabilities as a completion gives them, and where the text of the next token begins.

    `offset` is where in the text the first of these tokens begins, in characters.
    """
    found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        name = _byte_name(describe(token.token_id))
        top: dict[str, float] = {}
        for other_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(_byte_name(describe(other_id)), logprob)
        found["tokens"].append(name)
        found["token_logprobs"].append(token.logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(offset)
        offset += len(describe(token.token_id)[0])
    return found, offset


def _call(part: Part) -> Json:
    function = {"name": part.tool, "arguments": part.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _byte_name(token: Token) -> str:
    """The token's name in a completion's log-probabilities: its bytes where they are no whole text."""
    text, raw = token
    if raw is None or "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _choice(
    index: int, *, finish_reason: str | None = None, logprobs: Json | None = None, **content: Any
) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _chunk(info: ResponseInfo, choices: list[Json], include_usage: bool) -> Json:
    # With the usage asked for, every chunk has the field, null until the last.
    extra: Json = {"usage": None} if include_usage else {}
    return {**info.to_dict(chunk=True), "choices": choices, **extra}
