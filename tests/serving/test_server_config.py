"""What the server's settings must be."""

from pathlib import Path
from typing import Any

import pytest

from tpilite.errors import ConfigError
from tpilite.serving.config import ServerConfig, read_api_key


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 70000},
        {"api_key": ""},
        {"api_key": "a b"},
        {"max_waiting": -1},
        {"grace_s": float("nan")},
        {"cors_origins": ("example.org",)},
    ],
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**fields)


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_api_key(path)
    path.write_text("s3cret\n")
    assert read_api_key(path) == "s3cret"
