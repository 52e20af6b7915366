"""`tpilite-node --clean`: what it shows, when it asks, and what it removes."""

import io
import os
import shutil
from pathlib import Path

import pytest

from tpilite.cli.main import main
from tpilite.shipped import find_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    folder = shutil.copytree(find_model("fable"), tmp_path / "model")
    for n in (2, 3):
        assert main(["--model_path", str(folder), "--world_size", str(n), "--split_only"]) == 0
    os.utime(folder / "split" / ".used", (1000, 1000))
    return folder


def clean(folder: Path, *options: str) -> int:
    return main(["--clean", "--model_path", str(folder), *options])


def test_without_a_terminal_it_only_shows(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert clean(model) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert f" MB  {model / 'split'}: made for 2 ranks, last used 1970-01-01" in line
    assert "--clean --yes removes these, " in err
    assert (model / "split" / "node_0").exists()


def test_with_yes_it_removes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(model, "--yes") == 0
    assert not list((model / "split").glob("node_*"))
    assert len(list((model / "split").glob("*/node_*"))) == 3
    capsys.readouterr()
    assert clean(model, "--yes") == 0
    assert capsys.readouterr().err == "tpilite: nothing to clean: all slices are needed\n"


@pytest.mark.parametrize(("answer", "stays"), [("\n", True), ("n\n", True), ("y\n", False)])
def test_on_a_terminal_it_asks(
    model: Path, answer: str, stays: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert clean(model) == 0
    assert " in all? [y/N] " in capsys.readouterr().err
    assert (model / "split" / "node_0").exists() == stays


def test_a_folder_that_is_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(tmp_path / "nothing") == 2
    assert "does not exist" in capsys.readouterr().err
