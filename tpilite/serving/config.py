"""Where the service listens, and whom it serves."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Where the service listens and whom it serves.

    `host_names` are names by which browsers reach it, beside this machine's own. `cors_origins` are those of
    pages that may use it, "*" for all. `defaults` hold for what a request does not say.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    model_name: str | None = None  # None: the name of the model's folder
    api_key: str | None = None
    host_names: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 64
    grace_s: float = 30.0
    defaults: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--api_port must be from 0 to 65535, found {self.port}")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ConfigError("the API key must be printable ASCII without spaces, and not empty")
        if self.max_waiting < 0:
            raise ConfigError(f"--max_waiting must be 0 or more, found {self.max_waiting}")
        if not 0 <= self.grace_s < 1e9:
            raise ConfigError(f"--grace must be a number of seconds from 0, found {self.grace_s}")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(f"--cors_origin must be * or like https://example.org, found {origin!r}")


def read_api_key(path: Path) -> str:
    """The key that a file holds, for `ServerConfig`. Raises `ConfigError`."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file {path} cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api_key_file {path} is empty; write the key into it")
    return key
