"""Slices brought over HTTP: whole, cut, damaged, killed."""

import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slice_transfer import (
    FIRST,
    NAMES,
    TOKEN,
    OnLog,
    Relay,
    assert_whole,
    fetch,
    make_slices,
    serving,
)

from tpilite.cluster import fetch as fetching
from tpilite.cluster import slice_server
from tpilite.cluster.fetch import fetch_slices
from tpilite.cluster.slice_server import SliceServer
from tpilite.errors import ConfigError, PeerLost, SliceError
from tpilite.net.http_server import Connection

# --- the transfer -----------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_whole_transfer_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = make_slices(tmp_path / "split")
    total = sum(map(len, contents.values()))
    reports: list[tuple[int, int]] = []
    with serving(tmp_path / "split") as server, Relay(server.port) as relay:
        folder = fetch(relay.port, tmp_path / "here", progress=lambda *report: reports.append(report))
        assert folder == tmp_path / "here" / "node_1"
        assert_whole(folder, contents)
        assert total < relay.n_bytes < total + 10_000
        assert reports == sorted(reports)
        assert reports[-1] == (total, total)

        monkeypatch.setattr(fetching._Fetch, "_hash", lambda *_: pytest.fail("read again"))
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
        assert relay.n_bytes < total + 10_000 + min(cut, fetching._BUFFER_BYTES)


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

    def restart(done: int, total: int) -> None:
        if done > 12_000_000 and not restarted:
            restarted.append(done % 8_000_000)
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

    def close(done: int, total: int) -> None:
        if done > 5_000_000:
            server.close()

    with pytest.raises(PeerLost, match=r"lost 127\.0\.0\.1:\d+ after [5-9]\d{6} of 10000010 bytes of rank 1"):
        fetch(server.port, tmp_path / "here", progress=close, patience_s=0.5)
    server.close()
    assert not (tmp_path / "here" / "node_1" / "manifest.json").exists()


def test_server_that_fails_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Connection.send_file

    def fail(self: Connection, file: io.FileIO, start: int, stop: int, *args: object) -> bool:
        if stop - start > 100_000:
            raise ConnectionResetError
        return send(self, file, start, stop, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Connection, "send_file", fail)
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
        "import sys, pathlib; from tpilite.cluster.fetch import fetch_slices\n"
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

    def interrupt(done: int, total: int) -> None:
        if done > after:
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
        fetch(server.port, tmp_path / "here", progress=lambda *_: fetch(server.port, tmp_path / "here"))


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
        with pytest.raises(SliceError, match=r"is full: .* rank 1 take 2\.50 MB more, and 2\.10 MB is free"):
            fetch(relay.port, small_disk)
        assert relay.n_bytes < 5_000


def test_disk_full_on_the_way(tmp_path: Path, small_disk: Path) -> None:
    contents = make_slices(tmp_path / "split")
    filler = small_disk / "filler"
    fill = lambda *_: filler.exists() or filler.write_bytes(bytes(1_000_000))  # noqa: E731
    with serving(tmp_path / "split") as server:
        with pytest.raises(SliceError, match=r"is full: .* take \d\.\d\d MB more, and 0\.\d\d MB is free"):
            fetch(server.port, small_disk, progress=fill)
        filler.unlink()
        assert_whole(fetch(server.port, small_disk), contents)


# --- what the server has ----------------------------------------------------------------------------------


def test_waits_for_slices_in_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_RETRY_AFTER_S", 0)
    logging.getLogger("tpilite.cluster").setLevel(logging.INFO)
    made: list[dict[str, bytes]] = []
    (tmp_path / "split").mkdir()
    with serving(tmp_path / "split") as server:

        def make() -> None:
            made.append(make_slices(tmp_path / "split"))
            server.publish(1, tmp_path / "split" / "node_1")

        with OnLog("waiting for", make):
            folder = fetch(server.port, tmp_path / "here")
    assert_whole(folder, made[0])


def test_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_RETRY_AFTER_S", 0)
    logging.getLogger("tpilite.cluster").setLevel(logging.INFO)
    contents = make_slices(tmp_path / "split")
    with SliceServer((1,), TOKEN, 0) as server:
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

        def change(done: int, total: int) -> None:
            if done > 400_000 and not anew:
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
    contents = make_slices(tmp_path / "split")
    logging.getLogger("tpilite.cluster").setLevel(logging.INFO)
    with serving(tmp_path / "split") as server:
        os.truncate(tmp_path / "split" / "node_1" / FIRST, 1000)

        def make_again() -> None:
            assert server.lost
            make_slices(tmp_path / "split")
            server.publish(1, tmp_path / "split" / "node_1")

        with OnLog("waiting for", make_again):
            assert_whole(fetch(server.port, tmp_path / "here"), contents)
        assert not server.lost
    assert "has 1000 bytes, its manifest says 300000" in caplog.text


@pytest.mark.parametrize("name", ["manifest.json", FIRST, ".verified.json"])
def test_a_folder_where_a_file_should_be_is_replaced(name: str, tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = fetch(server.port, tmp_path / "here")
        (folder / name).unlink()
        (folder / name / "inside").mkdir(parents=True)
        fetch(server.port, tmp_path / "here")
        assert {path: (folder / path).read_bytes() for path in contents} == contents
        assert (folder / "manifest.json").is_file()


def test_a_bit_that_changed_while_the_mtime_was_kept_is_fetched_again(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server:
        folder = fetch(server.port, tmp_path / "here")
        before = (folder / FIRST).stat()
        (folder / FIRST).write_bytes(contents[FIRST][:-1] + bytes([contents[FIRST][-1] ^ 1]))
        os.utime(folder / FIRST, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert_whole(fetch(server.port, tmp_path / "here"), contents)


def test_port_in_use(tmp_path: Path) -> None:
    with serving(tmp_path) as server, pytest.raises(ConfigError, match=rf"port {server.port}: .*--file_port"):
        serving(tmp_path, port=server.port).start()
