"""The client's side of the proof, and TLS."""

import hashlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from slice_transfer import (
    FIRST,
    Relay,
    assert_whole,
    fetch,
    make_slices,
    serving,
)

from tpilite.cluster import slice_server
from tpilite.errors import PeerLost, TpiliteError
from tpilite.net import auth
from tpilite.weights.slices import Manifest

# --- impostors --------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_thread_left")


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


def challenge(version: int = 2, length: int = 0) -> Callable[[bytes], bytes]:
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
        ([challenge(version=3)], "serves slices by version 3, we read version 2; install the same tpilite"),
        ([challenge(), ok()], "cannot prove that it knows the token"),
        ([challenge(), ok(f"\r\nAuthentication-Info: proof={'0' * 64}")], "cannot prove"),
        ([challenge(), ok("\r\nAuthentication-Info: proof=")], "cannot prove"),
        ([challenge(), reflected], "cannot prove"),
        ([lambda _: b"SSH-2.0-OpenSSH_9.9\r\n\r\n"], "does not speak HTTP"),
        ([lambda _: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"], "does not speak HTTP"),
    ],
)
def test_impostor(tmp_path: Path, answers: list[Callable[[bytes], bytes]], error: str) -> None:
    with Impostor(*answers) as impostor, pytest.raises(PeerLost, match=error):
        fetch(impostor.port, tmp_path / "here", patience_s=0)
    assert list((tmp_path / "here" / "node_1").iterdir()) == []


def test_proof_covers_the_content(tmp_path: Path) -> None:
    """One in the middle, who lets both prove themselves, cannot pass off a manifest of its own."""
    make_slices(tmp_path / "split")
    digest = Manifest.read(tmp_path / "split" / "node_1").files[FIRST].sha256.encode()
    own = hashlib.sha256(b"its own").hexdigest().encode()
    with serving(tmp_path / "split") as server:
        with (
            Relay(server.port, change=lambda packet: packet.replace(digest, own)) as relay,
            pytest.raises(PeerLost, match="is not the one that it vouches for"),
        ):
            fetch(relay.port, tmp_path / "here", patience_s=0)

        raw = (tmp_path / "split" / "node_1" / "manifest.json").read_bytes()
        tags = [hashlib.sha256(text).hexdigest().encode() for text in (raw, raw.replace(digest, own))]
        with (
            Relay(server.port, change=lambda packet: packet.replace(digest, own).replace(*tags)) as relay,
            pytest.raises(PeerLost, match="cannot prove"),
        ):
            fetch(relay.port, tmp_path / "here", patience_s=0)
    assert list((tmp_path / "here" / "node_1").iterdir()) == []


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
        with pytest.raises(PeerLost, match="refuses our token"):
            fetch(server.port, tmp_path / "here", tls=client_tls, token="another-of-these", patience_s=0)
        other = auth.client_tls(at("other.pem"), None, None)
        with pytest.raises(PeerLost, match=r"no TLS with 127\.0\.0\.1.*CERTIFICATE_VERIFY_FAILED"):
            fetch(server.port, tmp_path / "here", tls=other, patience_s=0)
        # The refusal of a client without certificate may be overtaken by the end of the connection.
        with pytest.raises(TpiliteError):
            fetch(server.port, tmp_path / "x", tls=auth.client_tls(at("ca.pem"), None, None), patience_s=0.3)
        with pytest.raises(PeerLost):
            fetch(server.port, tmp_path / "x", patience_s=0.3)
    assert list((tmp_path / "x" / "node_1").iterdir()) == []


def test_tls_against_a_server_without(tmp_path: Path, certificates: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    client_tls = auth.client_tls(certificates / "ca.pem", None, None)
    with serving(tmp_path / "split") as server, pytest.raises(PeerLost, match="TLS"):
        fetch(server.port, tmp_path / "here", tls=client_tls, patience_s=0.3)


def test_tls_handshake_that_never_comes(
    tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_server, "_AUTHENTICATION_S", 0.2)
    contents = make_slices(tmp_path / "split")
    server_tls = auth.server_tls(certificates / "server.pem", certificates / "server.key", None)
    client_tls = auth.client_tls(certificates / "ca.pem", None, None)
    with serving(tmp_path / "split", tls=server_tls) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
            assert silent.recv(1) == b""
        assert_whole(fetch(server.port, tmp_path / "here", tls=client_tls), contents)
