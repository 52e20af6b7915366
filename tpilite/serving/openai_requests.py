"""Requests of OpenAI's API, read from JSON and checked.

Fields, defaults, error objects and status codes are those of OpenAI's reference, with `top_k`, `min_p` and
`repetition_penalty` beside them. The defaults of sampling are the service's own. A field that asks for what
is not supported is refused by its name; null means that a field is absent.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tpilite.checks import short
from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError
from tpilite.serving.errors import ApiError, Json
from tpilite.serving.openai_fields import (
    Fields,
    kind_of,
    ranged,
    read_documents,
    read_messages,
    read_tools,
    refuse,
    wrong,
)

Prompt = str | list[int]

# OpenAI's own limits.
_MAX_STOPS = 4
_MAX_CHOICES = 128
_MAX_TOP_CHAT, _MAX_TOP_TEXT = 20, 5
_MAX_BIASES = 1024
_DEFAULT_TEXT_TOKENS = 16

# Fields that only hint, label, log or speed up: accepted, and without effect on the answer.
_HINTS: dict[str, type] = {
    "cache_control": dict,
    "metadata": dict,
    "prompt_cache_key": str,
    "prompt_cache_options": dict,
    "prompt_cache_retention": str,
    "safety_identifier": str,
    "service_tier": str,
    "store": bool,
    "user": str,
}
_CHAT_HINTS: dict[str, type] = {
    **_HINTS,
    "prediction": dict,
    "reasoning_effort": str,  # models that think do so as their templates say
}
# Fields of what is not supported, with the values that ask for nothing beyond what is. Those of other
# servers are here with the values that their clients send where nobody asks for anything.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "cache_prompt": (True, False),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}
_REFUSED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **_REFUSED,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**_REFUSED, "suffix": ("",)}


@dataclass(frozen=True)
class Request:
    """A checked request: of `messages` (chat) or `prompts`, each answered `n` times."""

    model: str
    params: SamplingParams
    messages: tuple[Json, ...] | None = None
    variables: Json | None = None  # of the chat template
    tools: tuple[Json, ...] = ()
    one_call: bool = False  # at most, of tools
    documents: tuple[Json, ...] = ()
    continues: bool = False  # the last message, instead of answering it
    prompts: tuple[Prompt, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def parse_json(raw: bytes) -> Json:
    """The object in a request's body. Raises `ApiError` 400."""
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, found {kind_of(body)}", code="invalid_type")
    return body


def parse_chat(body: Mapping[str, Any], defaults: SamplingParams) -> Request:
    """The request in the body of a POST to /v1/chat/completions. Raises `ApiError` 400."""
    fields = Fields(body)
    model = fields.need("model", str)
    messages = read_messages(fields.need("messages", list))
    logprobs = fields.take("logprobs", bool)
    n_top = fields.whole("top_logprobs", 0, _MAX_TOP_CHAT)
    if n_top and not logprobs:
        wrong("top_logprobs", "needs 'logprobs' to be true")
    either, older = fields.whole("max_completion_tokens", 1), fields.whole("max_tokens", 1)
    if either is not None and older is not None and either != older:
        wrong("max_tokens", "is the older name of 'max_completion_tokens'; give one of the two")
    tools = read_tools(fields.take("tools", list) or [])
    if fields.peek("tool_choice") == "none":
        tools = ()  # which may not be used then
    if fields.peek("function_call") == "none":
        fields.take("functions", list)
    request = Request(
        model,
        _sampling(fields, defaults, either or older or defaults.length, (n_top or 0) if logprobs else None),
        messages=messages,
        variables=fields.take("chat_template_kwargs", dict),
        tools=tools,
        one_call=fields.take("parallel_tool_calls", bool) is False,
        documents=read_documents(fields.take("documents", list) or []),
        continues=_continues(fields),
        **_delivery(fields),
    )
    fields.finish(_REFUSED_IN_CHAT, _CHAT_HINTS)
    return request


def parse_completion(body: Mapping[str, Any], defaults: SamplingParams) -> Request:
    """The request in the body of a POST to /v1/completions. Raises `ApiError` 400."""
    fields = Fields(body)
    model = fields.need("model", str)
    prompts = _prompts(fields.take("prompt", str, list))
    echo = fields.take("echo", bool) or False
    n_top = fields.whole("logprobs", 0, _MAX_TOP_TEXT)
    if echo and n_top is not None:
        refuse("logprobs", "together with 'echo' (log-probabilities of the prompt)")
    length = fields.whole("max_tokens", 0)
    if length is None:
        length = _DEFAULT_TEXT_TOKENS if defaults.length is None else defaults.length
    request = Request(
        model,
        _sampling(fields, defaults, length, n_top),
        prompts=prompts,
        echo=echo,
        **_delivery(fields),
    )
    if len(prompts) * request.n > _MAX_CHOICES:
        wrong("n", f"times the {len(prompts)} prompts must be at most {_MAX_CHOICES}, found {request.n}")
    fields.finish(_REFUSED_IN_COMPLETIONS, _HINTS)
    return request


def _continues(fields: Fields) -> bool:
    """Whether the last message is to be continued, which two fields say that must agree."""
    continues: bool = fields.take("continue_final_message", bool) or False
    answers = fields.take("add_generation_prompt", bool)
    if answers and continues:
        wrong("add_generation_prompt", "must be false where the final message is to be continued")
    if answers is False and not continues:
        refuse("add_generation_prompt", "(false) without 'continue_final_message'")
    return continues


def _sampling(
    fields: Fields, defaults: SamplingParams, length: int | None, logprobs: int | None
) -> SamplingParams:
    top_k = fields.whole("top_k", -1)
    top_p = fields.number("top_p", 0, 1)
    seed = fields.take("seed", int)
    if seed is not None and not -(1 << 63) <= seed < 1 << 64:
        wrong("seed", f"must be a whole number of 64 bits, found {short(seed)}")
    given: Json = {
        "temperature": fields.number("temperature", 0, 2),
        "k": None if top_k is None else max(top_k, 0),
        # With 0 only the likeliest token is left, as with any other value below its probability.
        "p": None if top_p is None else max(top_p, 1e-9),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "logit_bias": _logit_bias(fields.take("logit_bias", dict)),
        "seed": None if seed is None else seed % (1 << 64),
        "stop": _stops(fields.take("stop", str, list)),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return dataclasses.replace(defaults, **changes, length=length, logprobs=logprobs)
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def _delivery(fields: Fields) -> Json:
    """How the answer is to come: how often, at once or in a stream."""
    stream = fields.take("stream", bool) or False
    # Of an answer at once they say nothing. The obfuscation is a padding that nobody reads.
    inner = Fields(fields.take("stream_options", dict) or {}, "stream_options.")
    include_usage = inner.take("include_usage", bool) or False
    inner.finish({"continuous_usage_stats": (False,)}, {"include_obfuscation": bool})
    return {"n": fields.whole("n", 1, _MAX_CHOICES) or 1, "stream": stream, "include_usage": include_usage}


def _prompts(prompt: str | list[Any] | None) -> tuple[Prompt, ...]:
    if prompt is None:
        return ("",)
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        wrong("prompt", "must not be an empty array", code="empty_array")
    if all(type(item) is int for item in prompt):
        return (prompt,)
    if len(prompt) > _MAX_CHOICES:
        wrong("prompt", f"must be at most {_MAX_CHOICES} prompts, found {len(prompt)}")
    for i, item in enumerate(prompt):
        if not isinstance(item, str | list) or (isinstance(item, list) and not all(_is_id(t) for t in item)):
            wrong(f"prompt[{i}]", "must be a text or an array of token ids", code="invalid_type")
    return tuple(prompt)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _stops(stop: str | list[Any] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > _MAX_STOPS:
        wrong(
            "stop", f"must be at most {_MAX_STOPS} texts, found {len(stops)}", code="array_above_max_length"
        )
    for i, text in enumerate(stops):
        if not isinstance(text, str):
            wrong(f"stop[{i}]", f"must be a text, found {kind_of(text)}", code="invalid_type")
        if not text:
            wrong("stop", "must not hold an empty text", code="invalid_value")
    return tuple(stops)


def _logit_bias(table: Mapping[str, Any] | None) -> dict[int, float] | None:
    if table is None:
        return None
    if len(table) > _MAX_BIASES:
        wrong("logit_bias", f"must name at most {_MAX_BIASES} tokens, found {len(table)}")
    found = {}
    for name, bias in table.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            wrong("logit_bias", f"must have token ids as its keys, found {short(name)}", code="invalid_type")
        if type(bias) not in (int, float):
            wrong(f"logit_bias.{name}", f"must be a number, found {kind_of(bias)}", code="invalid_type")
        found[int(name)] = ranged(f"logit_bias.{name}", bias, -100, 100)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
