"""What it is started in: streams on a full disk, no home, a deleted folder. A sentence, and its code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NODE = [sys.executable, str(Path(__file__).parents[2] / "bin" / "tpilite-node")]
STORY = ["--model_path", "fable", "--prompt", "Once upon a time", "--temperature", "0", "--length", "20"]
# Somebody whom the system does not know and who may not write where others do: as whom containers run.
NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]

full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


Found = tuple[int, str, str]


def run(*args: str, prefix: list[str] | None = None, streams: str = "", **options: Any) -> Found:
    """The exit code, stdout and stderr of a node whose streams a shell sends elsewhere."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", *(prefix or []), *NODE, *args]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60} | options
    done = subprocess.run(command, check=False, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def is_error(found: Found, *texts: str) -> bool:
    """Whether a run ended with one line that has these texts, and with the code for it."""
    code, _, err = found
    last = err.splitlines()[-1]
    return code == 2 and last.startswith("tpilite-node: ") and all(text in last for text in texts)


@full_disk
@pytest.mark.parametrize("args", [STORY, [*STORY, "--echo"], ["--version"], ["--help"]], ids=" ".join)
def test_a_full_disk_under_stdout_is_a_sentence(args: list[str]) -> None:
    found = run(*args, streams=">/dev/full")
    assert is_error(found, "the text cannot be written to stdout: No space left on device")
    assert found[2].count("\n") == 1


@full_disk
def test_messages_that_cannot_be_written_change_nothing(tmp_path: Path) -> None:
    text = run(*STORY)[1]
    assert run(*STORY, streams="2>/dev/full") == (0, text, "")
    local = ("--local", "2", "--save_dir", str(tmp_path / "split"))
    assert run(*STORY, *local, streams="2>/dev/full") == (0, text, "")
    assert run("--nonsense", streams="2>/dev/full") == (2, "", "")
    assert run(*STORY, streams=">/dev/full 2>&1") == (2, "", "")


def test_what_the_system_refuses_is_a_sentence() -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs a file that opens and cannot be read")
    with Path("/proc/self/mem").open("rb") as unreadable:
        found = run("--model_path", "fable", "--length", "3", stdin=unreadable)
    assert is_error(found, "the system refuses: Input/output error")


@pytest.mark.parametrize("variables", [{}, {"TMPDIR": "/no/such/folder"}], ids=str)
def test_neither_the_folder_it_is_in_nor_a_temporary_one_is_needed(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    inside = ["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh"] if not variables else []
    environment = {**os.environ, **variables}
    local = ("--local", "2", "--save_dir", str(tmp_path / "split"))
    assert run(*STORY, *local, prefix=inside, env=environment)[:2] == (0, run(*STORY)[1])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "--model_path is missing"),
        (["--model_path", "relative", "--prompt", "x"], "relative does not exist"),
        (["--model_path", "relative", "--clean"], "relative does not exist"),
    ],
)
def test_mistakes_in_a_folder_that_is_gone_are_told_as_elsewhere(
    tmp_path: Path, args: list[str], text: str
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    inside = ["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh"]
    assert is_error(run(*args, prefix=inside), text)


def as_nobody(*args: str, **variables: str) -> Found:
    """A node of somebody without a home, with these environment variables alone."""
    if shutil.which("unshare") is None or subprocess.run([*NOBODY, "true"], check=False).returncode:
        pytest.skip("needs user namespaces")
    kept = {name: os.environ[name] for name in ("PATH", "TPILITE_NATIVE") if name in os.environ}
    return run(*args, prefix=NOBODY, env={**kept, **variables})


def test_nobody_needs_a_home_to_run_a_model() -> None:
    assert as_nobody(*STORY)[:2] == (0, run(*STORY)[1])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([*STORY, "--local", "2"], "give --save_dir, or set HOME"),
        ([*STORY, "--split_only"], "give --save_dir, or set HOME"),
        ([*STORY, "--world_size", "2"], "give one with --token, or set HOME"),
        (["--join", "127.0.0.1:1"], "the cluster's token is missing"),
        (["--join", "127.0.0.1:1", "--token", "of-this-test-alone"], "give --save_dir, or set HOME"),
        (["--model_path", "~/x", "--prompt", "x"], "~/x does not exist"),
        ([], "--model_path is missing"),
    ],
)
def test_who_needs_a_home_and_has_none_is_told_the_option(args: list[str], text: str) -> None:
    assert is_error(as_nobody(*args), text)


def test_nothing_is_kept_so_nothing_is_cleaned() -> None:
    assert as_nobody("--clean")[::2] == (0, "tpilite: nothing to clean: all slices are needed\n")


def test_ranks_of_one_machine_need_no_home(tmp_path: Path) -> None:
    found = as_nobody(*STORY, "--local", "2", "--save_dir", str(tmp_path / "split"))
    assert found[:2] == (0, run(*STORY)[1])


@pytest.mark.parametrize(
    "variables",
    [{"HOME": "/proc"}, {"HOME": "/dev/null"}, {"HOME": "/proc", "XDG_CACHE_HOME": "nonsense"}],
    ids=str,
)
def test_a_cache_that_cannot_be_written_names_the_option(tmp_path: Path, variables: dict[str, str]) -> None:
    assert is_error(as_nobody(*STORY, "--local", "2", **variables), "cannot write", "--save_dir")
    found = as_nobody(*STORY, "--local", "2", "--save_dir", str(tmp_path / "split"), **variables)
    assert found[:2] == (0, run(*STORY)[1])
