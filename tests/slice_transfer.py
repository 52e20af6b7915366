"""Slices of random bytes, their server and clients, and what stands between the two."""

import contextlib
import functools
import hashlib
import hmac
import http.client
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from tpilite.cluster.fetch import fetch_slices
from tpilite.cluster.slice_server import SliceServer
from tpilite.config.llama import LlamaConfig
from tpilite.weights.partition import Partition
from tpilite.weights.slices import FileEntry, Manifest

TOKEN = "correct horse battery"
CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=64,
)
NAMES = [f"layers.{i}.{part}.safetensors" for i in range(2) for part in ("attn", "mlp")] + [
    "head.safetensors"
]
FIRST = NAMES[0]


def make_slices(root: Path, rank: int = 1, seed: int = 0, size: int = 300_000) -> dict[str, bytes]:
    """Writes node_{rank} with files of about `size` random bytes; returns their contents."""
    draw = random.Random(seed * 100 + rank)
    contents = {name: draw.randbytes(size + i) for i, name in enumerate(NAMES)}
    folder = root / f"node_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: FileEntry(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    manifest = Manifest(rank, Partition.of(CONFIG, 4), f"{seed:064x}", CONFIG, files)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return contents


def serving(root: Path, *ranks: int, port: int = 0, tls: ssl.SSLContext | None = None) -> SliceServer:
    server = SliceServer(ranks or (1,), TOKEN, port, tls)
    for rank in ranks or (1,):
        if (root / f"node_{rank}" / "manifest.json").exists():
            server.publish(rank, root / f"node_{rank}")
    return server


def fetch(port: int, save_dir: Path, rank: int = 1, token: str = TOKEN, **options: object) -> Path:
    options = {"timeout_s": 5.0, "patience_s": 5.0, **options}
    return fetch_slices("127.0.0.1", port, rank, token, save_dir, **options)  # type: ignore[arg-type]


def assert_whole(folder: Path, contents: dict[str, bytes]) -> None:
    found = {path.name for path in folder.iterdir()}
    assert found == {*contents, "manifest.json", ".verified.json"}
    for name, content in contents.items():
        assert (folder / name).read_bytes() == content, name
    assert set(Manifest.read(folder).files) == set(contents)


class Relay:
    """Passes connections on to a port and counts what comes back.

    `cuts` says after how many bytes from the server each connection in turn is closed; `hold_after`, after
    how many it falls silent; `change` what becomes of each packet from the server.
    """

    def __init__(
        self,
        port: int,
        cuts: tuple[int, ...] = (),
        hold_after: int | None = None,
        change: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self._port, self._cuts, self._hold_after, self._change = port, list(cuts), hold_after, change
        self.n_bytes = self.n_connections = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def __enter__(self) -> "Relay":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._threads[0].join()
        self._listener.close()
        for end in self._sockets:
            _shut(end)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            near, _ = self._listener.accept()
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                _shut(near)
                continue
            self._sockets.append(far)
            self.n_connections += 1
            self._start(self._up, near, far)
            self._start(self._down, far, near, self._cuts.pop(0) if self._cuts else None)

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while packet := near.recv(65536):
                far.sendall(packet)
        _shut(far)

    def _down(self, far: socket.socket, near: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while left != 0 and (packet := far.recv(min(65536, left or 65536))):
                near.sendall(self._change(packet))
                self.n_bytes += len(packet)
                left = left and left - len(packet)
                if self._hold_after is not None and self.n_bytes >= self._hold_after:
                    self._closing.wait()
        _shut(near)
        _shut(far)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class OnLog(logging.Handler):
    """Calls a function when the slice client or server logs a line with a given text in it."""

    def __init__(self, text: str, then: Callable[[], object]) -> None:
        super().__init__()
        self._text, self._then = text, then

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self._then()

    def __enter__(self) -> "OnLog":
        logging.getLogger("tpilite.cluster").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("tpilite.cluster").removeHandler(self)


def proof(role: str, server_nonce: bytes, client_nonce: bytes, token: str = TOKEN) -> str:
    """Written from the description of the exchange, not by calling `auth`."""
    message = f"tpilite {role}".encode() + b"\0" + server_nonce + client_nonce
    return hmac.new(_key(token), message, "sha256").hexdigest()


@functools.cache
def _key(token: str) -> bytes:
    return hashlib.scrypt(token.encode(), salt=b"tpilite cluster token", n=16384, r=8, p=1, dklen=32)


def log_in(port: int) -> http.client.HTTPConnection:
    """A connection over which the token was proved, and the server's proof checked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert (response.status, response.read()) == (401, b"")
    scheme, version, nonce = response.headers["WWW-Authenticate"].split()
    assert (scheme, version) == ("TPILITE", "version=2,")
    server_nonce, client_nonce = bytes.fromhex(nonce.removeprefix("nonce=")), bytes(range(32))
    answer = proof("slice client", server_nonce, client_nonce)
    headers = {"Authorization": f"TPILITE client_nonce={client_nonce.hex()}, proof={answer}"}
    connection.request("GET", "/nothing", headers=headers)
    response = connection.getresponse()
    assert (response.status, response.read()) == (404, b"")
    expected = proof("slice server 404 /nothing ", server_nonce, client_nonce)
    assert response.headers["Authentication-Info"] == f"proof={expected}"
    return connection


def ask(
    connection: http.client.HTTPConnection, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request(method, path, headers={name.replace("_", "-"): v for name, v in headers.items()})
    response = connection.getresponse()
    return response, response.read()


def raw_exchange(port: int, request: bytes) -> bytes:
    """All that the server answers to these bytes until it closes, or is asked for nothing more."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        answer = b""
        with contextlib.suppress(OSError):  # the server may have had enough before all is sent
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            while packet := peer.recv(65536):
                answer += packet
    return answer
