"""The slices of every rank over HTTP, for those alone who know the cluster's token: see `slice_protocol`."""

import logging
import ssl
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path

from tpilite.closing import Closing
from tpilite.cluster.catalog import Catalog
from tpilite.cluster.slice_protocol import (
    CLIENT_ROLE,
    authentication_info,
    challenge,
    read_authorization,
    read_range,
    server_role,
)
from tpilite.errors import SliceError
from tpilite.net import auth
from tpilite.net.http import HttpError
from tpilite.net.http_server import Connection, HttpServer
from tpilite.net.listener import listen

_log = logging.getLogger(__name__)

# One request without a proof is how every client begins; a second may be a HEAD before it.
_MAX_CHALLENGES = 3
# A home cluster has up to some tens of machines with one connection each, beside dead ones not yet noticed.
_MAX_CONNECTIONS = 64
# The proof is one round trip after connecting; TLS adds two and, on the slowest machine, half a second.
_AUTHENTICATION_S = 10.0
_RETRY_AFTER_S = 2


class SliceServer(Closing):
    """Serves slice folders by rank until it is closed; a context manager.

    `ranks` are those that exist: until the slices of one come with `publish`, who asks for them is to wait.
    So it is again when they cannot be read any more, which `lost` tells. Port 0 takes a free one.
    `host` "" listens on every address of the machine, IPv6 and IPv4.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        token: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        host: str = "",
    ) -> None:
        self._catalog = Catalog(ranks)
        self._key, self._address, self._tls = auth.derive_key(token), (host, port), tls
        self._http: HttpServer | None = None

    @property
    def port(self) -> int:
        assert self._http is not None, "start() comes first"
        return self._http.port

    def publish(self, rank: int, folder: Path) -> None:
        """Serves `folder` as that rank's from now on, in place of what was. Raises `SliceError`."""
        self._catalog.publish(rank, folder)

    @property
    def lost(self) -> bool:
        """Whether slices that were published cannot be read any more."""
        return bool(self._catalog.lost)

    def start(self) -> None:
        """Listens. Raises `ConfigError` when the port cannot be had."""
        self._http = HttpServer(
            listen(self._address, "--file_port", "serve slices"),
            lambda: _Application(self._catalog, self._key),
            max_connections=_MAX_CONNECTIONS,
            tls=self._tls,
            proof_s=_AUTHENTICATION_S,
        )
        self._http.start()

    def close(self) -> None:
        """Closes the port and every connection, also in the middle of a file, and joins all threads."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def __enter__(self) -> "SliceServer":
        self.start()
        return self


class _Application:
    """The proof of the token over one connection, then any number of requests."""

    def __init__(self, catalog: Catalog, key: bytes) -> None:
        self._catalog, self._key = catalog, key
        self._server_nonce, self._client_nonce = auth.new_nonce(), b""
        self._n_challenges = 0

    def respond(self, connection: Connection) -> None:
        """Answers a request of a client that has proved the token, or asks it to."""
        if connection.request.has_body or connection.request.is_http_1_0:
            raise HttpError(HTTPStatus.BAD_REQUEST, "a request for slices is HTTP/1.1 and has no body")
        if connection.request.method not in ("GET", "HEAD"):
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "slices are read by GET and HEAD alone")
        if connection.is_authenticated or self._authenticate(connection):
            self._answer(connection)

    def refuse(self, connection: Connection, error: HttpError) -> None:
        """Answers by the status, without a word of what was said."""
        _log.debug("%s: %d %s", connection.peer, error.status, error)
        self._send_empty(connection, error.status)

    def _authenticate(self, connection: Connection) -> bool:
        claim = connection.request.headers.get("authorization")
        if claim is None:
            self._n_challenges += 1
            if self._n_challenges >= _MAX_CHALLENGES:
                connection.cut()
            asked = {"WWW-Authenticate": challenge(self._server_nonce)}
            self._send_empty(connection, HTTPStatus.UNAUTHORIZED, asked)
            return False
        found = read_authorization(claim)
        if found:
            self._client_nonce, proof = found
            if auth.verify(self._key, CLIENT_ROLE, self._server_nonce, self._client_nonce, proof):
                connection.authenticate()
                return True
        connection.problem = "its proof is wrong: it has another token" if found else "its proof is malformed"
        connection.cut()
        self._send_empty(connection, HTTPStatus.UNAUTHORIZED)
        return False

    def _answer(self, connection: Connection) -> None:
        request = connection.request
        found = self._catalog.find(request.target)
        if isinstance(found, HTTPStatus):
            waiting = found == HTTPStatus.SERVICE_UNAVAILABLE
            return self._send_empty(
                connection, found, {"Retry-After": str(_RETRY_AFTER_S)} if waiting else {}
            )
        status, start, stop = HTTPStatus.OK, 0, found.size
        headers = {"Accept-Ranges": "bytes", "ETag": found.etag}
        if request.method == "GET" and request.headers.get("if-range", found.etag) == found.etag:
            asked = read_range(request.headers.get("range", ""), found.size)
            if asked is not None:
                status, (start, stop) = HTTPStatus.PARTIAL_CONTENT, asked
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
                if start == stop:
                    none = {"Content-Range": f"bytes */{found.size}"}
                    return self._send_empty(connection, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, none)
        try:
            file = found.open()
        except (OSError, SliceError) as error:
            _log.error("cannot serve %s: %s", request.target, error)
            self._catalog.lose(request.target)
            return self._send_empty(
                connection, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(_RETRY_AFTER_S)}
            )
        with file:
            headers |= self._proof(connection, status, found.etag)
            if not connection.send_file(file, start, stop, status, headers):
                _log.error("%s became shorter while it was sent", request.target)
        return None

    def _send_empty(
        self, connection: Connection, status: int, headers: Mapping[str, str] | None = None
    ) -> None:
        proof = self._proof(connection, status, "")
        connection.send_empty(status, {"Content-Length": "0", **(headers or {}), **proof})

    def _proof(self, connection: Connection, status: int, etag: str) -> dict[str, str]:
        """The header by which the server proves itself, and vouches for the answer, to who has done so."""
        if not connection.is_authenticated:
            return {}
        role = server_role(status, connection.request.target, etag)
        proof = auth.prove(self._key, role, self._server_nonce, self._client_nonce)
        return {"Authentication-Info": authentication_info(proof)}
