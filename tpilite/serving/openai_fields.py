"""What a request of OpenAI's API is made of, read field by field: messages, tools, and their parts."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from tpilite.checks import short
from tpilite.serving.errors import ApiError, Json

# What comes with a message, or with a part of one, and is nothing that the model reads.
_HINTS: dict[str, type] = {"annotations": list, "cache_control": dict, "id": str}
_MESSAGE_HINTS = _HINTS | {"name": str}
_PART_HINTS = _HINTS | {"index": int, "prompt_cache_breakpoint": dict}
_ROLES = ("system", "developer", "user", "assistant", "tool")

_KINDS: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


class Fields:
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
        wrong(self._prefix + name, f"must be {expected}, found {kind_of(value)}", code="invalid_type")

    def peek(self, name: str) -> Any:
        return self._left.get(name)

    def need(self, name: str, *kinds: type) -> Any:
        value = self.take(name, *kinds)
        if value is None:
            wrong(self._prefix + name, "is missing", code="missing_required_parameter")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name, float, int)
        return None if value is None else ranged(self._prefix + name, value, low, high)

    def whole(self, name: str, low: int, high: int = (1 << 31) - 1) -> int | None:
        value = self.take(name, int)
        return None if value is None else int(ranged(self._prefix + name, value, low, high))

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
                refuse(self._prefix + name)
        for name in self._left:
            shown = self._prefix + name[:100]
            message = f"Unrecognized request argument supplied: {shown}"
            raise ApiError(400, message, param=shown, code="unknown_parameter")


def read_messages(messages: list[Any]) -> tuple[Json, ...]:
    """Messages as chat templates take them. Raises `ApiError` 400."""
    if not messages:
        wrong("messages", "must hold at least one message, found none", code="empty_array")
    return tuple(_message(value, f"messages[{i}]") for i, value in enumerate(messages))


def read_tools(tools: list[Any]) -> tuple[Json, ...]:
    """The functions that a model may call, as chat templates take them. Raises `ApiError` 400."""
    return tuple(_tool(value, f"tools[{i}]") for i, value in enumerate(tools))


def read_documents(documents: list[Any]) -> tuple[Json, ...]:
    """Documents for a chat template, which knows what is in them. Raises `ApiError` 400."""
    for i, value in enumerate(documents):
        fields_of(value, f"documents[{i}]")
    return tuple(documents)


def fields_of(value: Any, where: str) -> Fields:
    """The fields of an object inside a request. Raises `ApiError` 400."""
    if not isinstance(value, dict):
        wrong(where, f"must be an object, found {kind_of(value)}", code="invalid_type")
    return Fields(value, where + ".")


def _message(value: Any, where: str) -> Json:
    fields = fields_of(value, where)
    role = fields.need("role", str)
    if role == "function":
        refuse(where + ".role", f"({role!r})")
    if role not in _ROLES:
        expected = "'system', 'developer', 'user', 'assistant' or 'tool'"
        wrong(where + ".role", f"must be {expected}, found {short(role)}", code="invalid_value")
    message: Json = {"role": "system" if role == "developer" else role}
    calls = [
        _call(call, f"{where}.tool_calls[{i}]")
        for i, call in enumerate(fields.take("tool_calls", list) or [])
    ]
    if calls and role != "assistant":
        wrong(where + ".tool_calls", "belongs to messages of the assistant")
    # An answer that is sent back as it came has these, empty, and may have no content.
    for name, kinds in (("audio", (dict,)), ("function_call", (dict,)), ("refusal", (str,))):
        if fields.take(name, *kinds):
            refuse(f"{where}.{name}")
    content = fields.take("content", str, list) if role == "assistant" else fields.need("content", str, list)
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    message["content"] = content if content or calls else ""
    older, newer = fields.take("reasoning", str), fields.take("reasoning_content", str)
    if role == "assistant" and (newer or older):
        message["reasoning_content"] = newer or older
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        named = {name: fields.take(name, str) for name in ("tool_call_id", "name")}
        message |= {name: text for name, text in named.items() if text is not None}
    fields.finish(hints=_MESSAGE_HINTS)
    return message


def _call(value: Any, where: str) -> Json:
    """A call of a tool in an answer that is sent back, its arguments as the object that templates write."""
    fields = fields_of(value, where)
    call_id, _ = fields.take("id", str), fields.take("index", int)
    if fields.take("type", str) not in (None, "function"):
        refuse(where + ".type")
    function = fields_of(fields.need("function", dict), where + ".function")
    name, text = function.need("name", str), function.take("arguments", str) or "{}"
    function.finish()
    fields.finish()
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        wrong(where + ".function.arguments", "must be a JSON object in a text")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call_id is None else {"id": call_id, **call}


def _tool(value: Any, where: str) -> Json:
    fields = fields_of(value, where)
    if fields.need("type", str) != "function":
        refuse(where + ".type")
    given = fields.need("function", dict)
    function = fields_of(given, where + ".function")
    if not function.need("name", str):
        wrong(where + ".function.name", "must not be empty")
    # That the arguments are as its parameters say cannot be promised, whatever `strict` asks for.
    function.finish(hints={"description": str, "parameters": dict, "strict": bool})
    fields.finish(hints={"cache_control": dict})
    shown = {name: entry for name, entry in given.items() if name != "strict" and entry is not None}
    return {"type": "function", "function": shown}


def _part(value: Any, where: str) -> str:
    fields = fields_of(value, where)
    kind = fields.need("type", str)
    if kind != "text":
        refuse(where + ".type", f"({short(kind)}): this model reads text only")
    text: str = fields.need("text", str)
    fields.finish(hints=_PART_HINTS)
    return text


def ranged(name: str, value: float, low: float, high: float) -> float:
    """The value. Raises `ApiError` 400 where it is out of its range."""
    if low <= value <= high:
        return value
    kind = "integer" if type(value) is int else "decimal"
    code = f"{kind}_below_min_value" if value < low else f"{kind}_above_max_value"
    wrong(name, f"must be from {low} to {high}, found {short(value)}", code=code)


def refuse(name: str, detail: str = "") -> NoReturn:
    """Raises `ApiError` 400 for what is not supported."""
    message = f"Unsupported parameter: {name!r} {detail}".rstrip()
    raise ApiError(
        400, f"{message} is not supported by this server", param=name, code="unsupported_parameter"
    )


def wrong(name: str, what: str, code: str = "invalid_value") -> NoReturn:
    """Raises `ApiError` 400 for what is not as it must be."""
    raise ApiError(400, f"{name!r} {what}", param=name, code=code)


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), "something else")
