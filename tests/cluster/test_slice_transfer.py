"""Slices over HTTP: whole, cut, damaged, refused, killed; strangers and impostors."""

import contextlib
import hashlib
import hmac
import http.client
import io
import logging
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpilite.cluster import slice_client, slice_server
from tpilite.cluster.slice_client import Progress, fetch_slices
from tpilite.cluster.slice_server import SliceServer
from tpilite.config import LlamaConfig
from tpilite.errors import ConfigError, PeerLost, ProtocolError, SliceError, TpiliteError
from tpilite.net import auth
from tpilite.weights.partition import Partition
from tpilite.weights.slices import FileEntry, Manifest

TOKEN = "correct horse"
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


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    after = [thread for thread in threading.enumerate() if thread not in before]
    for thread in after:  # that of a connection may be about to end
        thread.join(5)
    left = [thread.name for thread in after if thread.is_alive()]
    assert not left, f"threads are left: {left}"


@pytest.fixture(autouse=True)
def _report_every_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_client, "_REPORT_EVERY_S", 0.0)


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
    folders: dict[int, Path | None] = {rank: root / f"node_{rank}" for rank in ranks or (1,)}
    return SliceServer(folders, TOKEN, port, tls)


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


# --- the transfer -----------------------------------------------------------------------------------------


def test_whole_transfer_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = make_slices(tmp_path / "split")
    total = sum(map(len, contents.values()))
    reports: list[Progress] = []
    with serving(tmp_path / "split") as server, Relay(server.port) as relay:
        folder = fetch(relay.port, tmp_path / "here", progress=reports.append)
        assert folder == tmp_path / "here" / "node_1"
        assert_whole(folder, contents)
        assert total < relay.n_bytes < total + 10_000
        assert [r.done_bytes for r in reports] == sorted(r.done_bytes for r in reports)
        assert reports[-1].done_bytes == reports[-1].total_bytes == total
        assert reports[-1].bytes_per_s > 0

        monkeypatch.setattr(slice_client._Fetch, "_hash", lambda *_: pytest.fail("read again"))
        n_before = relay.n_bytes
        fetch(relay.port, tmp_path / "here")
        assert relay.n_bytes - n_before < 5_000


def test_by_ipv6(tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        assert_whole(fetch_slices("::1", server.port, 1, TOKEN, tmp_path / "here"), contents)


def test_three_workers_at_once(tmp_path: Path) -> None:
    ranks = (1, 2, 3)
    contents = {rank: make_slices(tmp_path / "split", rank) for rank in ranks}
    with serving(tmp_path / "split", *ranks) as server:
        threads = [threading.Thread(target=fetch, args=(server.port, tmp_path / "here", r)) for r in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for rank in ranks:
        assert_whole(tmp_path / "here" / f"node_{rank}", contents[rank])


# In the challenge, in the manifest's head and body, in the first file's head, within and between files.
CUTS = (1, 100, 400, 1_500, 2_900, 3_300, 3_400, 100_000, 302_000, 303_500, 900_000, 1_500_000)


@pytest.mark.parametrize("cut", CUTS)
def test_goes_on_after_a_cut(tmp_path: Path, cut: int) -> None:
    contents = make_slices(tmp_path / "split")
    total = sum(map(len, contents.values()))
    with serving(tmp_path / "split") as server, Relay(server.port, cuts=(cut,)) as relay:
        assert_whole(fetch(relay.port, tmp_path / "here"), contents)
        assert relay.n_connections == 2
        # One read of the client may be lost with the connection.
        assert relay.n_bytes < total + 10_000 + min(cut, slice_client._BUFFER_BYTES)


def test_many_cuts(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, Relay(server.port, cuts=CUTS) as relay:
        assert_whole(fetch(relay.port, tmp_path / "here"), contents)


def test_server_restarts_in_the_middle_of_a_file(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split", size=8_000_000)
    first = serving(tmp_path / "split")
    first.start()
    port = first.port
    second = serving(tmp_path / "split", port=port)
    restarted = []

    def restart(progress: Progress) -> None:
        if progress.done_bytes > 12_000_000 and not restarted:
            restarted.append(progress.done_bytes % 8_000_000)
            first.close()
            second.start()

    try:
        assert_whole(fetch(port, tmp_path / "here", progress=restart), contents)
    finally:
        first.close()
        second.close()
    assert 0 < restarted[0] < 8_000_000


def test_server_that_stays_away(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=2_000_000)
    server = serving(tmp_path / "split")
    server.start()

    def close(progress: Progress) -> None:
        if progress.done_bytes > 5_000_000:
            server.close()

    with pytest.raises(PeerLost, match=r"lost 127\.0\.0\.1:\d+ after [5-9]\d{6} of 10000010 bytes of rank 1"):
        fetch(server.port, tmp_path / "here", progress=close, patience_s=0.5)
    server.close()
    assert not (tmp_path / "here" / "node_1" / "manifest.json").exists()


def test_server_that_fails_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = slice_server._Handler._send_bytes

    def fail(self: slice_server._Handler, file: io.FileIO, start: int, stop: int) -> bool:
        if stop - start > 100_000:
            raise ConnectionResetError
        return send(self, file, start, stop)

    monkeypatch.setattr(slice_server._Handler, "_send_bytes", fail)
    make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, pytest.raises(PeerLost, match="after 0 of 1500010 bytes"):
        fetch(server.port, tmp_path / "here", patience_s=0.5)


def test_silent_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(PeerLost, match="timed out"):
        fetch(silent.getsockname()[1], tmp_path / "here", timeout_s=0.2, patience_s=0.5)


def test_killed_client_goes_on(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split", size=2_000_000)
    total = sum(map(len, contents.values()))
    here = tmp_path / "here" / "node_1"
    script = (
        "import sys, pathlib; from tpilite.cluster.slice_client import fetch_slices\n"
        "fetch_slices('127.0.0.1', int(sys.argv[1]), 1, sys.argv[2], pathlib.Path(sys.argv[3]))"
    )
    with serving(tmp_path / "split") as server:
        with Relay(server.port, hold_after=5_200_000) as relay:
            arguments = [sys.executable, "-c", script, str(relay.port), TOKEN, str(tmp_path / "here")]
            child = subprocess.Popen(arguments, cwd=Path(__file__).parents[2])
            third = here / (NAMES[2] + ".part")
            until = time.monotonic() + 30
            while not (third.exists() and third.stat().st_size > 500_000) and time.monotonic() < until:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait()
        n_here = sum(path.stat().st_size for path in here.glob("*.safetensors*"))
        assert 4_500_000 < n_here < 5_200_000
        assert not (here / "manifest.json").exists()
        with Relay(server.port) as relay:
            assert_whole(fetch(relay.port, tmp_path / "here"), contents)
            assert total - n_here < relay.n_bytes < total - n_here + 10_000


# --- what is on the disk ----------------------------------------------------------------------------------


def interrupted(port: int, save_dir: Path, after: int = 400_000) -> Path:
    """A folder as an interruption leaves it."""

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(port, save_dir, progress=interrupt)
    return save_dir / "node_1"


def test_damaged_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = interrupted(server.port, tmp_path / "here")
        (part,) = (path for path in folder.glob("*.part") if path.name != "manifest.json.part")
        part.write_bytes(b"\0" + part.read_bytes()[1:])
        assert_whole(fetch(server.port, tmp_path / "here"), contents)
    assert f"{NAMES[1]} came damaged" in caplog.text


def test_part_that_is_whole_or_too_long(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = interrupted(server.port, tmp_path / "here")
        (folder / (NAMES[2] + ".part")).write_bytes(contents[NAMES[2]])
        (folder / (NAMES[3] + ".part")).write_bytes(contents[NAMES[3]] + b"more")
        with Relay(server.port) as relay:
            assert_whole(fetch(relay.port, tmp_path / "here"), contents)
            assert relay.n_bytes < 900_000


def test_parts_of_another_model_are_not_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        interrupted(server.port, tmp_path / "here")
        contents = make_slices(tmp_path / "split", seed=1)
        server.publish(1, tmp_path / "split" / "node_1")
        assert_whole(fetch(server.port, tmp_path / "here"), contents)
    assert "damaged" not in caplog.text


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = fetch(server.port, tmp_path / "here")
        (folder / FIRST).write_bytes(b"\0" + contents[FIRST][1:])
        (folder / NAMES[1]).unlink()
        (folder / ".verified.json").write_bytes((folder / ".verified.json").read_bytes() + b"}")
        with Relay(server.port) as relay:
            assert_whole(fetch(relay.port, tmp_path / "here"), contents)
            assert 600_000 < relay.n_bytes < 610_000


def test_carried_by_hand(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    shutil.copytree(tmp_path / "split", tmp_path / "here")
    with serving(tmp_path / "split") as server, Relay(server.port) as relay:
        assert_whole(fetch(relay.port, tmp_path / "here"), contents)
        assert relay.n_bytes < 5_000


def test_old_slices_go_and_other_files_stay(tmp_path: Path) -> None:
    make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = fetch(server.port, tmp_path / "here")
        for name in ("layers.77.attn.safetensors", "layers.77.mlp.safetensors.part"):
            (folder / name).write_bytes(b"old")
        for name in ("notes.txt", "adapter.safetensors", "my.part"):
            (folder / name).write_bytes(b"mine")
        contents = make_slices(tmp_path / "split", seed=1)
        server.publish(1, tmp_path / "split" / "node_1")
        fetch(server.port, tmp_path / "here")
    for name in ("notes.txt", "adapter.safetensors", "my.part"):
        (folder / name).unlink()
    assert_whole(folder, contents)


def test_force_transfers_all_again(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, Relay(server.port) as relay:
        fetch(relay.port, tmp_path / "here")
        n_before = relay.n_bytes
        assert_whole(fetch(relay.port, tmp_path / "here", force=True), contents)
        assert relay.n_bytes - n_before > 1_500_000


def test_two_clients_in_one_folder(tmp_path: Path) -> None:
    make_slices(tmp_path / "split")
    with (
        serving(tmp_path / "split") as server,
        pytest.raises(SliceError, match="another process is fetching"),
    ):
        fetch(server.port, tmp_path / "here", progress=lambda _: fetch(server.port, tmp_path / "here"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or not mount or not sys.platform.startswith("linux"):
        pytest.skip("needs root on Linux to mount a small tmpfs")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_too_small_from_the_start(tmp_path: Path, small_disk: Path) -> None:
    make_slices(tmp_path / "split", size=500_000)
    with serving(tmp_path / "split") as server, Relay(server.port) as relay:
        with pytest.raises(SliceError, match=r"need 2\.5 MB more, the disk of .* has 2\.1 MB free"):
            fetch(relay.port, small_disk)
        assert relay.n_bytes < 5_000


def test_disk_full_on_the_way(tmp_path: Path, small_disk: Path) -> None:
    contents = make_slices(tmp_path / "split")
    filler = small_disk / "filler"
    fill = lambda _: filler.exists() or filler.write_bytes(bytes(1_000_000))  # noqa: E731
    with serving(tmp_path / "split") as server:
        with pytest.raises(SliceError, match=r"need \d\.\d MB more, the disk of .* has 0\.\d MB free"):
            fetch(server.port, small_disk, progress=fill)
        filler.unlink()
        assert_whole(fetch(server.port, small_disk), contents)


# --- what the server has ----------------------------------------------------------------------------------


def test_waits_for_slices_in_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_RETRY_AFTER_S", 0)
    logging.getLogger("tpilite.cluster").setLevel(logging.INFO)
    made: list[dict[str, bytes]] = []
    (tmp_path / "split").mkdir()
    make = OnLog("waiting for", lambda: made.append(make_slices(tmp_path / "split")))
    with serving(tmp_path / "split") as server, make:
        folder = fetch(server.port, tmp_path / "here")
    assert_whole(folder, made[0])


def test_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_RETRY_AFTER_S", 0)
    logging.getLogger("tpilite.cluster").setLevel(logging.INFO)
    contents = make_slices(tmp_path / "split")
    with SliceServer({1: None}, TOKEN, 0) as server:
        with OnLog("waiting for", lambda: server.publish(1, tmp_path / "split" / "node_1")):
            assert_whole(fetch(server.port, tmp_path / "here"), contents)
        with pytest.raises(SliceError, match="holds the slices of rank 1; expected rank 2"):
            server.publish(2, tmp_path / "split" / "node_1")
        with pytest.raises(SliceError, match="is not a complete slice"):
            server.publish(3, tmp_path / "split" / "node_3")
        with pytest.raises(SliceError, match="has no rank 2"):
            fetch(server.port, tmp_path / "here", rank=2)


def test_slices_made_anew_during_the_transfer(tmp_path: Path) -> None:
    make_slices(tmp_path / "split")
    anew: list[dict[str, bytes]] = []
    with serving(tmp_path / "split") as server:

        def change(progress: Progress) -> None:
            if progress.done_bytes > 400_000 and not anew:
                anew.append(make_slices(tmp_path / "other", seed=1))
                server.publish(1, tmp_path / "other" / "node_1")

        assert_whole(fetch(server.port, tmp_path / "here", progress=change), anew[0])


def test_damaged_on_the_way_once_or_always(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    source = tmp_path / "split" / "node_1" / NAMES[1]
    with serving(tmp_path / "split") as server:
        source.write_bytes(contents[NAMES[1]][:-1] + b"\0")
        with pytest.raises(
            SliceError, match=rf"{re.escape(NAMES[1])} came damaged .* 3 times: .*--split_bin"
        ):
            fetch(server.port, tmp_path / "here")
        folder = tmp_path / "here" / "node_1"
        assert not (folder / NAMES[1]).exists()
        assert not (folder / "manifest.json").exists()
        with OnLog("came damaged", lambda: source.write_bytes(contents[NAMES[1]])):
            assert_whole(fetch(server.port, tmp_path / "here"), contents)


def test_file_that_lost_its_end_on_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        os.truncate(tmp_path / "split" / "node_1" / FIRST, 1000)
        with pytest.raises(SliceError, match=f"answers 500 for /node_1/{re.escape(FIRST)}"):
            fetch(server.port, tmp_path / "here")
    assert "has 1000 bytes, its manifest says 300000" in caplog.text


def test_damaged_manifest_on_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_slices(tmp_path / "split")
    (tmp_path / "split" / "node_1" / "manifest.json").write_bytes(b"{}")
    with serving(tmp_path / "split") as server, pytest.raises(SliceError, match="answers 500"):
        fetch(server.port, tmp_path / "here")
    assert "cannot serve the slices of rank 1" in caplog.text


def test_port_in_use(tmp_path: Path) -> None:
    with serving(tmp_path) as server, pytest.raises(ConfigError, match=rf"port {server.port}: .*--file_port"):
        serving(tmp_path, port=server.port).start()


# --- who is let in ----------------------------------------------------------------------------------------


def proof(role: str, server_nonce: bytes, client_nonce: bytes, token: str = TOKEN) -> str:
    """Written from the description of the exchange, not by calling `auth`."""
    message = f"tpilite {role}".encode() + b"\0" + server_nonce + client_nonce
    return hmac.new(token.encode(), message, "sha256").hexdigest()


def log_in(port: int) -> http.client.HTTPConnection:
    """A connection over which the token was proved, and the server's proof checked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert (response.status, response.read()) == (401, b"")
    scheme, version, nonce = response.headers["WWW-Authenticate"].split()
    assert (scheme, version) == ("TPILITE", "version=1,")
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


def test_ranges(tmp_path: Path) -> None:
    content = make_slices(tmp_path / "split", size=1000)[FIRST]
    path, tag = f"/node_1/{FIRST}", f'"{hashlib.sha256(content).hexdigest()}"'
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        for asked, start, stop in (
            ("bytes=0-", 0, 1000),
            ("bytes=0-0", 0, 1),
            ("bytes=999-", 999, 1000),
            ("bytes=999-999", 999, 1000),
            ("bytes=10-5000", 10, 1000),
            ("bytes=0-999999999999999999", 0, 1000),
            ("bytes=-1", 999, 1000),
            ("bytes=-5000", 0, 1000),
        ):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (206, content[start:stop]), asked
            assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/1000"
            assert response.headers["ETag"] == tag
        for asked in ("bytes=1000-", "bytes=1000-1000", "bytes=999999999999999999-", "bytes=-0"):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (416, b""), asked
            assert response.headers["Content-Range"] == "bytes */1000"
        for asked in (
            "bytes=-",
            "bytes=5-4",
            "bytes=0-1,5-6",
            "bytes=a-b",
            "items=0-1",
            "bytes=\xb2-",
            "bytes=" + "9" * 5000 + "-",
            "",
        ):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (200, content), asked
            assert "Content-Range" not in response.headers
        response, body = ask(connection, path, Range="bytes=5-6", If_Range=tag)
        assert (response.status, body) == (206, content[5:7])
        response, body = ask(connection, path, Range="bytes=5-6", If_Range='"another"')
        assert (response.status, body) == (200, content)


def test_head(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        response, body = ask(connection, f"/node_1/{FIRST}", "HEAD", Range="bytes=5-6")
        assert (response.status, body) == (200, b"")
        assert response.headers["Content-Length"] == "1000"
        response, _ = ask(connection, "/node_1/manifest.json", "HEAD")
        assert response.status == 200
        assert ask(connection, "/node_1/nothing", "HEAD")[0].status == 404


STRANGE_PATHS = (
    "/",
    "/../",
    "//",
    "/node_1/",
    "/node_1",
    "/node_2/manifest.json",
    "/node_1/../node_1/manifest.json",
    "/node_1/secret.txt",
    "/node_1/%6danifest.json",
    "/node_1/manifest.json?x",
    "/node_1/manifest.json%00",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/node_1//etc/passwd",
    "http://127.0.0.1/node_1/manifest.json",
    "/node_-1/manifest.json",
    "/node_01/manifest.json",
)


def test_nothing_but_what_the_manifest_names(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    (tmp_path / "split" / "node_1" / "secret.txt").write_text("secret")
    make_slices(tmp_path / "split", rank=2)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        for path in STRANGE_PATHS:
            response, body = ask(connection, path)
            assert (response.status, body) == (404, b""), path


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


def without_what_varies(answer: bytes) -> bytes:
    return re.sub(rb"(nonce=|Date: )[^\r]*", b"", answer)


def test_without_a_proof_every_path_looks_the_same(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server:
        answers = {
            without_what_varies(raw_exchange(server.port, f"{method} {path} HTTP/1.1\r\n\r\n".encode()))
            for path in (*STRANGE_PATHS, "/node_1/manifest.json", f"/node_1/{FIRST}")
            for method in ("GET", "HEAD")
        }
    (answer,) = answers
    assert answer == (
        b"HTTP/1.1 401 Unauthorized\r\nServer: tpilite\r\n\r\n"
        b"Content-Length: 0\r\nWWW-Authenticate: TPILITE version=1, \r\n\r\n"
    )


@pytest.mark.parametrize(
    "claim",
    [
        "",
        "Basic dTpw",
        f"TPILITE client_nonce={'0' * 64}, proof={'0' * 64}",
        f"TPILITE client_nonce={'0' * 64}, proof=",
        f"TPILITE proof={'0' * 64}",
        f"TPILITE client_nonce={'é' * 64}, proof={'0' * 64}",
        f"TPILITE client_nonce={'0' * 64}, proof={proof('slice client', bytes(32), bytes(32))}",
    ],
)
def test_wrong_proofs(tmp_path: Path, claim: str) -> None:
    make_slices(tmp_path / "split", size=1000)
    request = f"GET /node_1/manifest.json HTTP/1.1\r\nAuthorization: {claim}\r\n\r\n".encode("latin-1")
    with serving(tmp_path / "split") as server:
        answer = raw_exchange(server.port, request * 2)
    # The second request is not even read.
    assert answer.count(b"HTTP/1.1") == answer.count(b"HTTP/1.1 401") == 1
    assert b"Authentication-Info" not in answer


def test_recorded_exchange_is_worth_nothing(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server:
        challenge = raw_exchange(server.port, b"GET / HTTP/1.1\r\n\r\n")
        match = re.search(rb"nonce=([0-9a-f]{64})", challenge)
        assert match
        answer = proof("slice client", bytes.fromhex(match[1].decode()), bytes(32))
        claim = f"TPILITE client_nonce={'0' * 64}, proof={answer}"
        again = raw_exchange(server.port, f"GET / HTTP/1.1\r\nAuthorization: {claim}\r\n\r\n".encode())
    assert b" 401 " in again


def test_wrong_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_slices(tmp_path / "split", size=1000)
    refusal = pytest.raises(ConfigError, match=r"127\.0\.0\.1:\d+ refuses our token; take the --token")
    with serving(tmp_path / "split") as server, refusal:
        fetch(server.port, tmp_path / "here", token="another")
    assert list((tmp_path / "here" / "node_1").iterdir()) == []
    assert re.search(r"refused a stranger at 127\.0\.0\.1:\d+: its proof is wrong", caplog.text)
    assert TOKEN not in caplog.text


# --- impostors --------------------------------------------------------------------------------------------


class Impostor:
    """Answers each request head with the next of some answers, made from the head."""

    def __init__(self, *answers: Callable[[bytes], bytes]) -> None:
        self._answers = answers

    def __enter__(self) -> "Impostor":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            for answer in self._answers:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += peer.recv(65536)
                peer.sendall(answer(head))
            peer.recv(1)


def ok(extra: str = "") -> Callable[[bytes], bytes]:
    body = b"x" * 100
    tag = hashlib.sha256(body).hexdigest()
    return lambda _: f'HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: "{tag}"{extra}\r\n\r\n'.encode() + body


def challenge(version: int = 1, length: int = 0) -> Callable[[bytes], bytes]:
    header = f"WWW-Authenticate: TPILITE version={version}, nonce={'0' * 64}"
    answer = f"HTTP/1.1 401 Unauthorized\r\n{header}\r\nContent-Length: {length}\r\n\r\n"
    return lambda _: answer.encode()


def reflected(head: bytes) -> bytes:
    """The client's own proof, sent back as the server's."""
    match = re.search(rb"proof=([0-9a-f]{64})", head)
    assert match
    return ok(f"\r\nAuthentication-Info: proof={match[1].decode()}")(head)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([ok()], "answers 200 without asking for the token"),
        ([challenge(length=1 << 40)], "answers 401 without asking for the token"),
        ([challenge(version=2)], "serves slices by version 2, we read version 1; install the same tpilite"),
        ([challenge(), ok()], "cannot prove that it knows the token"),
        ([challenge(), ok(f"\r\nAuthentication-Info: proof={'0' * 64}")], "cannot prove"),
        ([challenge(), ok("\r\nAuthentication-Info: proof=")], "cannot prove"),
        ([challenge(), reflected], "cannot prove"),
        ([lambda _: b"SSH-2.0-OpenSSH_9.9\r\n\r\n"], "does not speak HTTP"),
        ([lambda _: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"], "does not speak HTTP"),
    ],
)
def test_impostor(tmp_path: Path, answers: list[Callable[[bytes], bytes]], error: str) -> None:
    with Impostor(*answers) as impostor, pytest.raises(ProtocolError, match=error):
        fetch(impostor.port, tmp_path / "here")
    assert list((tmp_path / "here" / "node_1").iterdir()) == []


def test_proof_covers_the_content(tmp_path: Path) -> None:
    """One in the middle, who lets both prove themselves, cannot pass off a manifest of its own."""
    make_slices(tmp_path / "split")
    digest = Manifest.read(tmp_path / "split" / "node_1").files[FIRST].sha256.encode()
    own = hashlib.sha256(b"its own").hexdigest().encode()
    with serving(tmp_path / "split") as server:
        with (
            Relay(server.port, change=lambda packet: packet.replace(digest, own)) as relay,
            pytest.raises(ProtocolError, match="is not the one that it vouches for"),
        ):
            fetch(relay.port, tmp_path / "here")

        raw = (tmp_path / "split" / "node_1" / "manifest.json").read_bytes()
        tags = [hashlib.sha256(text).hexdigest().encode() for text in (raw, raw.replace(digest, own))]
        with (
            Relay(server.port, change=lambda packet: packet.replace(digest, own).replace(*tags)) as relay,
            pytest.raises(ProtocolError, match="cannot prove"),
        ):
            fetch(relay.port, tmp_path / "here")
    assert list((tmp_path / "here" / "node_1").iterdir()) == []


# --- strangers and slow ones ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SliceServer]:
    root = tmp_path_factory.mktemp("open")
    make_slices(root, size=1000)
    with serving(root) as server:
        yield server


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda a, b, c: a + b + b" HTTP/1.1\r\n" + c + b"\r\n\r\n",
        st.sampled_from([b"GET ", b"HEAD ", b"POST ", b"", b"get /", b"GET  "]),
        st.binary(max_size=30),
        st.binary(max_size=60),
    )
)
def test_garbage_gets_nothing(open_server: SliceServer, request_bytes: bytes) -> None:
    answer = raw_exchange(open_server.port, request_bytes)
    assert not answer or re.fullmatch(rb"HTTP/1\.1 [45]\d\d [^\r]+\r\n(?s:.)*\r\n\r\n", answer)
    assert b"200 OK" not in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"POST /node_1/manifest.json HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"DELETE / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 150 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\x00" * 10_000,
    ],
)
def test_what_no_client_of_ours_sends_ends_the_connection(
    open_server: SliceServer, request_bytes: bytes
) -> None:
    answer = raw_exchange(open_server.port, request_bytes + b"GET / HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1") <= 1
    assert b"TPILITE" not in answer


def test_strangers_are_logged_once_in_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as server:
        for _ in range(20):
            raw_exchange(server.port, b"garbage\x00\r\n\r\n")
        listener = server._listener
        assert listener is not None
        listener._last_line -= slice_server._LOG_EVERY_S
        raw_exchange(server.port, b"more \x1b[31m garbage\r\n\r\n")
    lines = [r.getMessage() for r in caplog.records if "refused a stranger" in r.getMessage()]
    assert len(lines) == 2
    assert "not a request of ours: b'garbage\\x00" in lines[0]
    assert "and 19 more since" in lines[1]
    assert "\x1b" not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_slow_stranger_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_STRANGER_S", 0.3)
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.settimeout(0.02)
        ended = False
        for _ in range(1000):
            with contextlib.suppress(TimeoutError):
                try:
                    slow.send(b"G")
                    ended = slow.recv(1) == b""
                except ConnectionError:
                    ended = True
            if ended:
                break
        assert ended
        assert_whole(fetch(server.port, tmp_path / "here"), contents)


def test_member_outlives_the_deadline_of_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_STRANGER_S", 0.2)
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.settimeout(10)
            assert stranger.recv(1) == b""
        assert ask(connection, f"/node_1/{FIRST}")[0].status == 200


def test_strangers_make_room_for_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_MAX_CONNECTIONS", 4)
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, contextlib.ExitStack() as stack:
        member = stack.enter_context(contextlib.closing(log_in(server.port)))
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(10)
        ]
        assert_whole(fetch(server.port, tmp_path / "here"), contents)
        assert strangers[0].recv(1) == b""
        assert ask(member, f"/node_1/{FIRST}")[0].status == 200
        n_threads = sum(thread.name == "slice-connection" for thread in threading.enumerate())
        assert n_threads <= 4


def test_member_that_takes_nothing_disturbs_nobody(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split", size=20_000_000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as stalled:
        stalled.request("GET", f"/node_1/{FIRST}")
        assert_whole(fetch(server.port, tmp_path / "here"), contents)


# --- TLS --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Authorities `ca` and `other`, and certificates `server` and `worker` signed by `ca`."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificates")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    for ca in ("ca", "other"):
        run("req", "-x509", *new_key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}")
    for name in ("server", "worker"):
        run("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed_by = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        run("x509", "-req", "-in", f"{name}.csr", *signed_by, "-out", f"{name}.pem")
    return folder


def test_tls(tmp_path: Path, certificates: Path) -> None:
    contents = make_slices(tmp_path / "split")
    at = certificates.joinpath
    server_tls = auth.server_tls(at("server.pem"), at("server.key"), at("ca.pem"))
    client_tls = auth.client_tls(at("ca.pem"), at("worker.pem"), at("worker.key"))
    with serving(tmp_path / "split", tls=server_tls) as server:
        with Relay(server.port, cuts=(700_000,)) as relay:
            assert_whole(fetch(relay.port, tmp_path / "here", tls=client_tls), contents)
        with pytest.raises(ConfigError, match="refuses our token"):
            fetch(server.port, tmp_path / "here", tls=client_tls, token="another")
        with pytest.raises(ConfigError, match=r"no TLS with 127\.0\.0\.1.*CERTIFICATE_VERIFY_FAILED"):
            fetch(server.port, tmp_path / "here", tls=auth.client_tls(at("other.pem"), None, None))
        # The refusal of a client without certificate may be overtaken by the end of the connection.
        with pytest.raises(TpiliteError):
            fetch(server.port, tmp_path / "x", tls=auth.client_tls(at("ca.pem"), None, None), patience_s=0.3)
        with pytest.raises(PeerLost):
            fetch(server.port, tmp_path / "x", patience_s=0.3)
    assert list((tmp_path / "x" / "node_1").iterdir()) == []


def test_tls_against_a_server_without(tmp_path: Path, certificates: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    client_tls = auth.client_tls(certificates / "ca.pem", None, None)
    with serving(tmp_path / "split") as server, pytest.raises((ConfigError, PeerLost), match="TLS"):
        fetch(server.port, tmp_path / "here", tls=client_tls, patience_s=0.3)


def test_tls_handshake_that_never_comes(
    tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_server, "_STRANGER_S", 0.2)
    contents = make_slices(tmp_path / "split")
    server_tls = auth.server_tls(certificates / "server.pem", certificates / "server.key", None)
    client_tls = auth.client_tls(certificates / "ca.pem", None, None)
    with serving(tmp_path / "split", tls=server_tls) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
            assert silent.recv(1) == b""
        assert_whole(fetch(server.port, tmp_path / "here", tls=client_tls), contents)
