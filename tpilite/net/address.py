"""Where a node listens: host and port as users write them and as sockets have them."""

from collections.abc import Sequence
from typing import Any

from tpilite.errors import ConfigError

Address = tuple[str, int]


def parse_address(text: str, default_port: int) -> Address:
    """Host and port of HOST, HOST:PORT, [V6], [V6]:PORT or a bare IPv6 address. Raises `ConfigError`."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else rest
        valid = bool(bracket) and rest[:1] in ("", ":") and rest != ":"
    elif text.count(":") > 1:  # no port can follow: it could be the address's own last group
        host, port, valid = text, "", True
    else:
        host, colon, port = text.partition(":")
        valid = bool(port) or not colon
    valid = valid and bool(host) and not any(c.isspace() for c in host)
    if port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        valid = False
    if not valid:
        raise ConfigError(
            f"expected HOST, HOST:PORT or [IPV6]:PORT with a port of 1 to 65535, found {text!r}"
        )
    return host, int(port) if port else default_port


def format_address(address: Sequence[Any]) -> str:
    """What `parse_address` reads back, of a socket's address too."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def plain_host(host: str) -> str:
    """The host of a socket's address, an IPv4 one as such also where an IPv6 socket wraps it."""
    return host.removeprefix("::ffff:")
