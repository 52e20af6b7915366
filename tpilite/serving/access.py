"""Who may ask: names of this machine, origins of pages, a proxy before it, and the API key."""

import hmac
import ipaddress
import re
from collections.abc import Collection

from tpilite.net.http import HttpError
from tpilite.net.http_server import Connection
from tpilite.serving.config import ORIGIN_HOST, ServerConfig
from tpilite.serving.errors import ApiError

_HOST = re.compile(rf"({ORIGIN_HOST})(?::[0-9]{{1,5}})?")
_ORIGIN = re.compile(rf"(null|(?:[A-Za-z][A-Za-z0-9+.-]*)://({ORIGIN_HOST})?)(?::[0-9]{{1,5}})?")


class Access:
    """Checks requests before anything is done for them.

    `host_names` are those by which browsers reach this machine, in lower case, beside its addresses.
    """

    def __init__(self, config: ServerConfig, host_names: Collection[str]) -> None:
        self._config, self._host_names = config, host_names

    def check(self, connection: Connection) -> str | None:
        """The origin of the page that asks, where it is an allowed one of another site.

        Raises `ApiError`, or `HttpError` where a host or an origin is none.
        Names that are not this machine's are refused: a page elsewhere could point its own name here. So are
        pages of other sites: they could make the server work without reading its answers.
        """
        headers = connection.request.headers
        host = headers.get("host", "")
        if connection.peer.rpartition(":")[0].strip("[]") in self._config.proxies:
            host = headers.get("x-forwarded-host", host).rpartition(",")[2].strip()
        self._check_host(host)
        origin = headers.get("origin")
        if origin is None:
            return None
        match = _ORIGIN.fullmatch(origin)
        if not match:
            raise HttpError(400, "the Origin header is not one origin, like https://example.org")
        if origin.partition("://")[2].lower() == host.lower():
            return None
        if not {origin, f"{match[1]}:*", "*"} & set(self._config.cors_origins):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; --cors_origin allows them",
                code="origin_not_allowed",
            )
        return origin

    def check_key(self, connection: Connection) -> None:
        """Raises `ApiError` where the request does not show the key that is needed."""
        key = self._config.api_key
        if key is None:
            return
        how = {"WWW-Authenticate": "Bearer"}
        kind, _, given = connection.request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'", headers=how)
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key", headers=how)
        connection.authenticate()

    def shows_key(self, connection: Connection) -> bool:
        """Whether a key is needed, and the request shows it."""
        try:
            self.check_key(connection)
        except ApiError:
            return False
        return self._config.api_key is not None

    def _check_host(self, host: str) -> None:
        match = _HOST.fullmatch(host)
        if not match:
            raise HttpError(400, "a request needs one Host header with a name or an address")
        # By an address nobody else's page can be reached, so addresses are right whatever they are.
        name = match[1].strip("[]").rstrip(".").lower()
        if name in self._host_names or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                f"{name[:100]!r} is not a name of this server: use its address, or start it with --api_name",
                code="host_not_allowed",
            ) from None
