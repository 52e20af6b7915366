"""Connections to the server of slices, proved in both directions before anything is taken from them."""

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from tpilite.closing import Closing
from tpilite.cluster.slice_protocol import (
    AUTH_VERSION,
    CLIENT_ROLE,
    authorization,
    read_authentication_info,
    read_challenge,
    server_role,
)
from tpilite.errors import PeerLost, TpiliteError
from tpilite.net import auth


class Unreachable(PeerLost):
    """No connection to the server can be made."""


class SliceClient(Closing):
    """Connections to one server, one at a time, each proved in both directions before anything is read.

    Raises `PeerLost`, whatever answers there: only who has proved the token can end a worker for good.
    """

    def __init__(
        self, host: str, port: int, token: str, tls: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self.name = f"{host}:{port}"
        self._host, self._port, self._key = host, port, auth.derive_key(token)
        self._tls, self._timeout_s = tls, timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._server_nonce = self._client_nonce = b""

    def get(self, path: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """The answer, its status and content vouched for by a server that knows the token."""
        with self._translated():
            if self._connection is None:
                self._connection = self._connect()
                headers = {**headers, "Authorization": self._answer_challenge(self._connection, path)}
            response = self._request(self._connection, path, headers)
            if response.status == HTTPStatus.UNAUTHORIZED:
                raise PeerLost(
                    f"{self.name} refuses our token; take the --token that its first machine shows"
                )
            proof = read_authentication_info(response.getheader("Authentication-Info", ""))
            role = server_role(response.status, path, response.getheader("ETag", ""))
            if not auth.verify(self._key, role, self._server_nonce, self._client_nonce, proof):
                raise PeerLost(
                    f"{self.name} cannot prove that it knows the token, so nothing was taken from it; "
                    "is it the first machine of this cluster?"
                )
            return response

    def read(self, response: http.client.HTTPResponse, max_bytes: int) -> bytes:
        """The whole body, which must be announced and not longer than `max_bytes`."""
        if response.length is None or response.length > max_bytes:
            self.close()
            raise PeerLost(
                f"{self.name} sends {response.length or 'any number of'} bytes where at most "
                f"{max_bytes} make sense"
            )
        body = bytearray(response.length)
        view = memoryview(body)
        while view:
            view = view[self.read_into(response, view) :]
        # Where the body is empty, http.client has not noticed that the connection is free again.
        response.close()
        return bytes(body)

    def read_into(self, response: http.client.HTTPResponse, view: memoryview) -> int:
        """The number of bytes read, at least one."""
        with self._translated():
            n = response.readinto(view)
            if not n:
                raise PeerLost(f"{self.name} closed the connection in the middle of an answer")
            return n

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._response is not None:
            self._response.close()
            self._response = None

    def _request(
        self, connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        connection.request("GET", path, headers=dict(headers))
        # Kept to be closed: with an answer that ends the connection, http.client lets go of both.
        self._response = connection.getresponse()
        return self._response

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout_s, context=self._tls
            )
        connection.response_class = _Response
        try:
            connection.connect()
        except ssl.SSLError:
            raise
        except OSError as error:
            raise Unreachable(f"{self.name} cannot be reached: {error.strerror or error}") from error
        # A connection opened behind our back would not be proved.
        connection.auto_open = 0
        return connection

    def _answer_challenge(self, connection: http.client.HTTPConnection, path: str) -> str:
        """The Authorization header for this connection."""
        response = self._request(connection, path, {})
        found = read_challenge(response.getheader("WWW-Authenticate", ""))
        if response.status != HTTPStatus.UNAUTHORIZED or not found or response.length != 0:
            raise PeerLost(
                f"{self.name} answers {response.status} without asking for the token; "
                "is that the --file_port of the cluster's first machine?"
            )
        version, self._server_nonce = found
        if version != AUTH_VERSION:
            raise PeerLost(
                f"{self.name} serves slices by version {version}, we read version {AUTH_VERSION}; "
                "install the same tpilite on both machines"
            )
        response.read()
        self._client_nonce = auth.new_nonce()
        proof = auth.prove(self._key, CLIENT_ROLE, self._server_nonce, self._client_nonce)
        return authorization(self._client_nonce, proof)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where the network's exceptions become ours. After any, the connection is closed."""
        try:
            yield
        except TpiliteError:
            self.close()
            raise
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            self.close()
            raise PeerLost(f"{self.name} closed the TLS connection; is TLS on there, too?") from error
        except ssl.SSLError as error:
            self.close()
            raise PeerLost(
                f"no TLS with {self.name}: {error.reason or error}; "
                "--tls_cert, --tls_key and --tls_ca must fit together on both machines"
            ) from error
        except (OSError, http.client.IncompleteRead) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise PeerLost(f"no answer from {self.name}: {reason}") from error
        except http.client.HTTPException as error:
            self.close()
            raise PeerLost(
                f"{self.name} does not speak HTTP ({type(error).__name__}); "
                "is that the --file_port, and is TLS on at both ends?"
            ) from error


class _Reader(io.BufferedReader):
    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise ConnectionResetError("it closed the connection before the end of its answer")
        return line


class _Response(http.client.HTTPResponse):
    """An answer whose head is whole: `http.client` takes one that was cut off for a shorter one."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = _Reader(self.fp.detach())
