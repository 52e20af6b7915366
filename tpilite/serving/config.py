"""Where the service listens, and whom it serves."""

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError

# A name or an address, as it stands in a Host header and in an origin.
ORIGIN_HOST = r"\[[0-9A-Fa-f:.]+\]|[^\[\]:/@*\s]+"
_ALLOWED_ORIGIN = re.compile(rf"\*|[a-z][a-z0-9+.-]*://(?:{ORIGIN_HOST})(?::(?:[0-9]{{1,5}}|\*))?")


@dataclass(frozen=True)
class ServerConfig:
    """Where the service listens and whom it serves.

    `host_names` are names by which browsers reach it, beside this machine's own. `cors_origins` are those of
    pages that may use it, "*" for all, with ":*" for any port. `proxies` are the addresses of those whose
    X-Forwarded-Host counts. `defaults` hold for what a request does not say.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    model_name: str | None = None  # None: the name of the model's folder
    api_key: str | None = None
    host_names: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
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
            if not _ALLOWED_ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "--cors_origin must be * or like https://example.org, app://name or http://localhost:* "
                    f"(any port), found {origin!r}"
                )
        for proxy in self.proxies:
            try:
                ipaddress.ip_address(proxy)
            except ValueError:
                raise ConfigError(f"--api_proxy must be an address like 127.0.0.1, found {proxy!r}") from None

    @property
    def is_open(self) -> bool:
        """Whether others than this machine may use it, without a key."""
        try:
            is_local = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_local = False
        return self.api_key is None and not is_local


def read_api_key(path: Path) -> str:
    """The key that a file holds, for `ServerConfig`. Raises `ConfigError`."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file {path} cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api_key_file {path} is empty; write the key into it")
    return key
