"""Ranks of `--local` that cannot work: the whole ends, with the rank's own words and its exit code."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Node, Nodes

from tpilite.cli import local

STORY = ("--model_path", "fable", "--prompt", "Once upon a time", "--temperature", "0")
SERVICE = ("--model_path", "fable", "--serve", "--api_port", 0)

# Found by every Python that starts: it decides what becomes of a worker.
CUSTOMIZE = """
import os, pathlib, sys
if "--until_eof" in sys.orig_argv and pathlib.Path({flag!r}).exists():
    {action}
"""
SAY_NO = (
    "sys.stderr.write('tpilite-node: the slice of rank 1 is damaged\\n'); sys.stderr.flush(); os._exit(2)"
)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as started:
        yield started


class Sabotage:
    """An environment in which workers do something else as soon as a flag is set."""

    def __init__(self, folder: Path, action: str) -> None:
        self.flag = folder / "flag"
        self.environment = {"PYTHONPATH": str(folder)}
        (folder / "sitecustomize.py").write_text(CUSTOMIZE.format(flag=str(self.flag), action=action))


def start(nodes: Nodes, sabotage: Sabotage, *args: object) -> Node:
    save_dir = nodes.folder / "split"
    return nodes.start(*args, "--local", 2, "--save_dir", save_dir, **sabotage.environment)


def kill_rank_1(node: Node) -> None:
    line = node.wait_for_line("rank 1 is process")
    os.kill(int(re.search(r"rank 1 is process (\d+)", line)[1]), signal.SIGKILL)


def test_a_rank_that_cannot_start_ends_the_whole(nodes: Nodes, tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path, SAY_NO)
    sabotage.flag.touch()
    node = start(nodes, sabotage, *STORY, "--length", 20)
    assert node.finish() == 2
    assert node.err.splitlines()[-1] == "tpilite-node: rank 1 cannot work: the slice of rank 1 is damaged"
    assert "Traceback" not in node.err
    assert node.out == ""


def test_a_budget_that_is_too_small_ends_the_whole(nodes: Nodes, tmp_path: Path) -> None:
    node = start(nodes, Sabotage(tmp_path, "pass"), *STORY, "--length", 20, "--memory_budget", "20MB")
    assert node.finish() == 2
    assert re.search(r"^tpilite-node: .*memory", node.err.splitlines()[-1])
    assert "started again" not in node.err


def test_a_rank_that_dies_each_time_ends_the_whole(nodes: Nodes, tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path, "os.kill(os.getpid(), 9)")
    sabotage.flag.touch()
    node = start(nodes, sabotage, *STORY, "--length", 20)
    assert node.finish() == 2
    assert node.err.splitlines()[-1] == (
        "tpilite-node: rank 1 ended 5 times before it had worked (exit code -9)"
    )
    assert node.err.count("is started again") == 4


def test_a_rank_that_had_worked_is_started_again_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_program", lambda: ["-c", "import os; os._exit(1)"])
    monkeypatch.setattr(local, "_RESTART_S", 0)
    monkeypatch.setattr(local, "_HEALTHY_S", -1)
    pids: set[int] = set()
    until_s = time.monotonic() + 60
    with local.LocalWorkers(1, [], "token", last_group_s=time.monotonic, on_failure=pytest.fail) as workers:
        while len(pids) < local._MAX_DEATHS + 3:
            pids |= {*workers.pids.values()}
            assert time.monotonic() < until_s
            time.sleep(0.001)


def test_a_service_ends_with_a_rank_that_cannot_come_back(nodes: Nodes, tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path, SAY_NO)
    node = start(nodes, sabotage, *SERVICE)
    node.wait_for_line("the page and the API are at")
    sabotage.flag.touch()
    kill_rank_1(node)
    assert node.finish() == 2
    assert node.err.splitlines()[-1] == "tpilite-node: rank 1 cannot work: the slice of rank 1 is damaged"
    assert "Traceback" not in node.err


def test_what_a_rank_says_is_passed_on(nodes: Nodes, tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path, "sys.stderr.write('tpilite, rank 1: a warning\\n')")
    sabotage.flag.touch()
    node = start(nodes, sabotage, *STORY, "--length", 20)
    assert node.finish() == 0, node.err
    assert "tpilite, rank 1: a warning" in node.lines
