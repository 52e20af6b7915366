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
    "parallel_tool_calls": bool,  # of tools, which are refused
    "prediction": dict,
    "reasoning_effort": str,  # of a reasoning that these models do not hide
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
    "add_generation_prompt": (True,),
    "audio": (),
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**_REFUSED, "suffix": ("",)}
# What comes with a message and is no part of what the model reads.
_MESSAGE_HINTS: dict[str, type] = {
    "annotations": list,
    "cache_control": dict,
    "id": str,
    "name": str,
    "reasoning": str,
    "reasoning_content": str,
}

_KINDS: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Request:
    """A checked request: of `messages` (chat) or `prompts`, each answered `n` times."""

    model: str
    params: SamplingParams
    messages: tuple[Json, ...] | None = None
    variables: Json | None = None  # of the chat template
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
        raise ApiError(400, f"the body must be a JSON object, found {_kind(body)}", code="invalid_type")
    return body


def parse_chat(body: Mapping[str, Any], defaults: SamplingParams) -> Request:
    """The request in the body of a POST to /v1/chat/completions. Raises `ApiError` 400."""
    fields = _Fields(body)
    model = fields.need("model", str)
    messages = _messages(fields.need("messages", list))
    logprobs = fields.take("logprobs", bool)
    n_top = fields.whole("top_logprobs", 0, _MAX_TOP_CHAT)
    if n_top is not None and not logprobs:
        _wrong("top_logprobs", "needs 'logprobs' to be true")
    either, older = fields.whole("max_completion_tokens", 1), fields.whole("max_tokens", 1)
    if either is not None and older is not None and either != older:
        _wrong("max_tokens", "is the older name of 'max_completion_tokens'; give one of the two")
    if fields.peek("tool_choice") == "none":
        fields.take("tools", list)  # which may not be used then
    if fields.peek("function_call") == "none":
        fields.take("functions", list)
    request = Request(
        model,
        _sampling(fields, defaults, either or older or defaults.length, (n_top or 0) if logprobs else None),
        messages=messages,
        variables=fields.take("chat_template_kwargs", dict),
        **_delivery(fields),
    )
    fields.finish(_REFUSED_IN_CHAT, _CHAT_HINTS)
    return request


def parse_completion(body: Mapping[str, Any], defaults: SamplingParams) -> Request:
    """The request in the body of a POST to /v1/completions. Raises `ApiError` 400."""
    fields = _Fields(body)
    model = fields.need("model", str)
    prompts = _prompts(fields.take("prompt", str, list))
    echo = fields.take("echo", bool) or False
    n_top = fields.whole("logprobs", 0, _MAX_TOP_TEXT)
    if echo and n_top is not None:
        _refuse("logprobs", "together with 'echo' (log-probabilities of the prompt)")
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
        _wrong("n", f"times the {len(prompts)} prompts must be at most {_MAX_CHOICES}, found {request.n}")
    fields.finish(_REFUSED_IN_COMPLETIONS, _HINTS)
    return request


class _Fields:
    """A request's fields, taken one by one; what is left at the end is refused by name."""

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str, *kinds: type) -> Any:
        """The field's value, of one of these types; None where it is absent."""
        value = self._left.pop(name, None)
        if value is None or type(value) in kinds:
            return value
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        _wrong(self._prefix + name, f"must be {expected}, found {_kind(value)}", code="invalid_type")

    def peek(self, name: str) -> Any:
        return self._left.get(name)

    def need(self, name: str, *kinds: type) -> Any:
        value = self.take(name, *kinds)
        if value is None:
            _wrong(self._prefix + name, "is missing", code="missing_required_parameter")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name, float, int)
        return None if value is None else _ranged(self._prefix + name, value, low, high)

    def whole(self, name: str, low: int, high: int = (1 << 31) - 1) -> int | None:
        value = self.take(name, int)
        return None if value is None else int(_ranged(self._prefix + name, value, low, high))

    def finish(
        self, refused: Mapping[str, tuple[Any, ...]] | None = None, hints: Mapping[str, type] | None = None
    ) -> None:
        """Raises `ApiError` for what is left, unless it is harmless."""
        for name, kind in (hints or {}).items():
            self.take(name, kind)
        for name, harmless in (refused or {}).items():
            value = self._left.pop(name, None)
            # Types are compared too: 1 == True.
            if value is not None and not any(value == v and type(value) is type(v) for v in harmless):
                _refuse(self._prefix + name)
        for name in self._left:
            shown = self._prefix + name[:100]
            message = f"Unrecognized request argument supplied: {shown}"
            raise ApiError(400, message, param=shown, code="unknown_parameter")


def _sampling(
    fields: _Fields, defaults: SamplingParams, length: int | None, logprobs: int | None
) -> SamplingParams:
    top_k = fields.whole("top_k", -1)
    top_p = fields.number("top_p", 0, 1)
    seed = fields.take("seed", int)
    if seed is not None and not -(1 << 63) <= seed < 1 << 64:
        _wrong("seed", f"must be a whole number of 64 bits, found {short(seed)}")
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


def _delivery(fields: _Fields) -> Json:
    """How the answer is to come: how often, at once or in a stream."""
    stream = fields.take("stream", bool) or False
    # Of an answer at once they say nothing. The obfuscation is a padding that nobody reads.
    inner = _Fields(fields.take("stream_options", dict) or {}, "stream_options.")
    include_usage = inner.take("include_usage", bool) or False
    inner.finish({"continuous_usage_stats": (False,)}, {"include_obfuscation": bool})
    return {"n": fields.whole("n", 1, _MAX_CHOICES) or 1, "stream": stream, "include_usage": include_usage}


def _messages(messages: list[Any]) -> tuple[Json, ...]:
    if not messages:
        _wrong("messages", "must hold at least one message, found none", code="empty_array")
    return tuple(_message(value, f"messages[{i}]") for i, value in enumerate(messages))


def _message(value: Any, where: str) -> Json:
    if not isinstance(value, dict):
        _wrong(where, f"must be an object, found {_kind(value)}", code="invalid_type")
    fields = _Fields(value, where + ".")
    role = fields.need("role", str)
    if role in ("tool", "function"):
        _refuse(where + ".role", f"({role!r})")
    if role not in ("system", "developer", "user", "assistant"):
        _wrong(
            where + ".role",
            f"must be 'system', 'developer', 'user' or 'assistant', found {short(role)}",
            code="invalid_value",
        )
    # An answer that is sent back as it came has these, empty, and may have no content.
    for name, kinds in (
        ("tool_calls", (list,)),
        ("audio", (dict,)),
        ("function_call", (dict,)),
        ("refusal", (str,)),
    ):
        if fields.take(name, *kinds):
            _refuse(f"{where}.{name}")
    content = fields.take("content", str, list) if role == "assistant" else fields.need("content", str, list)
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    fields.finish(hints=_MESSAGE_HINTS)
    return {"role": "system" if role == "developer" else role, "content": content or ""}


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        _wrong(where, f"must be an object, found {_kind(value)}", code="invalid_type")
    fields = _Fields(value, where + ".")
    kind = fields.need("type", str)
    if kind != "text":
        _refuse(where + ".type", f"({short(kind)}): this model reads text only")
    text: str = fields.need("text", str)
    fields.finish(hints={"annotations": list, "cache_control": dict, "prompt_cache_breakpoint": dict})
    return text


def _prompts(prompt: str | list[Any] | None) -> tuple[Prompt, ...]:
    if prompt is None:
        return ("",)
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        _wrong("prompt", "must not be an empty array", code="empty_array")
    if all(type(item) is int for item in prompt):
        return (prompt,)
    if len(prompt) > _MAX_CHOICES:
        _wrong("prompt", f"must be at most {_MAX_CHOICES} prompts, found {len(prompt)}")
    for i, item in enumerate(prompt):
        if not isinstance(item, str | list) or (isinstance(item, list) and not all(_is_id(t) for t in item)):
            _wrong(f"prompt[{i}]", "must be a text or an array of token ids", code="invalid_type")
    return tuple(prompt)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _stops(stop: str | list[Any] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > _MAX_STOPS:
        _wrong(
            "stop", f"must be at most {_MAX_STOPS} texts, found {len(stops)}", code="array_above_max_length"
        )
    for i, text in enumerate(stops):
        if not isinstance(text, str):
            _wrong(f"stop[{i}]", f"must be a text, found {_kind(text)}", code="invalid_type")
        if not text:
            _wrong("stop", "must not hold an empty text", code="invalid_value")
    return tuple(stops)


def _logit_bias(table: Mapping[str, Any] | None) -> dict[int, float] | None:
    if table is None:
        return None
    if len(table) > _MAX_BIASES:
        _wrong("logit_bias", f"must name at most {_MAX_BIASES} tokens, found {len(table)}")
    found = {}
    for name, bias in table.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            _wrong("logit_bias", f"must have token ids as its keys, found {short(name)}", code="invalid_type")
        if type(bias) not in (int, float):
            _wrong(f"logit_bias.{name}", f"must be a number, found {_kind(bias)}", code="invalid_type")
        found[int(name)] = _ranged(f"logit_bias.{name}", bias, -100, 100)
    return found


def _ranged(name: str, value: float, low: float, high: float) -> float:
    if low <= value <= high:
        return value
    kind = "integer" if type(value) is int else "decimal"
    code = f"{kind}_below_min_value" if value < low else f"{kind}_above_max_value"
    _wrong(name, f"must be from {low} to {high}, found {short(value)}", code=code)


def _refuse(name: str, detail: str = "") -> NoReturn:
    message = f"Unsupported parameter: {name!r} {detail}".rstrip()
    raise ApiError(
        400, f"{message} is not supported by this server", param=name, code="unsupported_parameter"
    )


def _wrong(name: str, what: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, f"{name!r} {what}", param=name, code=code)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "something else")
