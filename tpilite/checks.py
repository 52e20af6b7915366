"""What a number from a file or a user must be, said the same way everywhere."""

import json
from typing import Any

from tpilite.errors import ConfigError

_MAX_WHOLE = 2**31 - 1  # token ids and positions are int32
_MAX_FLOAT = 3.4e38  # the maths is float32


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises `ConfigError` unless `value` is a whole number from `least` on."""
    if type(value) is not int or not least <= value <= _MAX_WHOLE:
        raise ConfigError(f"{name} must be a whole number from {least} to {_MAX_WHOLE}, found {short(value)}")


def check_number(name: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is a number above 0 that float32 holds."""
    if type(value) not in (int, float) or not 0 < value <= _MAX_FLOAT:
        raise ConfigError(f"{name} must be a number above 0, found {short(value)}")


def short(value: Any) -> str:
    """A value as JSON, for a message: not more than a part of a line."""
    if isinstance(value, int) and abs(value) >= 1 << 200:  # Python itself refuses to write very long ones
        return "a number of too many digits"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
