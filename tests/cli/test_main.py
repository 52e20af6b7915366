"""The command line as its users run it: real processes, their output, exit codes and ends."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.engine.compiled import why_not
from tpilite.version import __version__

NODE = [sys.executable, str(Path(__file__).parents[2] / "bin" / "tpilite-node")]
STORY = ["--model_path", "fable", "--prompt", "Once upon a time", "--temperature", "0", "--length", "20"]


def node(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60} | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run([*NODE, *args], check=False, **options)


def test_new_text_goes_to_stdout_and_all_else_to_stderr() -> None:
    done = node(*STORY)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert "tokens/s" in done.stderr
    assert "tokens/s" not in done.stdout
    echoed = node(*STORY, "--echo")
    assert echoed.stdout == "Once upon a time" + done.stdout


def test_expected_text_of_a_real_model(shared_models: Path) -> None:
    folder = shared_models / "stories260K"
    done = node("--model_path", str(folder), "--prompt", "", "--temperature", "0", "--length", "199")
    assert done.stdout == (folder / "expected.txt").read_text()


def test_stdin_is_the_prompt_and_hyphens_are_underscores() -> None:
    options = ["--model-path", "fable", "--temperature", "0", "--length=20"]
    assert node(*options, input="Once upon a time\n").stdout == node(*STORY).stdout
    assert node(*options, "--prefix", "Once upon", input=" a time").stdout == node(*STORY).stdout
    lines = node(*options, "--lines", input="Once upon a time\nOne day\n").stdout.splitlines()
    assert lines[0] == node(*STORY).stdout.splitlines()[0]
    assert len(lines) == 2


def test_fewer_bits_give_the_same_text_on_any_number_of_ranks(tmp_path: Path) -> None:
    options = [*STORY, "--quantize", "q8_0", "--save_dir", str(tmp_path)]
    alone, again, together = node(*options), node(*options), node(*options, "--local", "2")
    assert alone.returncode == together.returncode == 0, alone.stderr + together.stderr
    assert alone.stdout == again.stdout == together.stdout != ""
    manifests = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("**/manifest.json"))]
    assert [manifest["quantized"]["kind"] for manifest in manifests] == ["q8_0"] * 3
    assert node(*STORY, "--quantize", "q3_k").returncode == 2


def test_statistics_as_json(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    assert node(*STORY, "--stats", str(file)).returncode == 0
    stats = json.loads(file.read_text())
    assert stats["new_tokens"] == 20
    assert stats["finish_reason"] == "length"
    assert stats["versions"]["tpilite"]
    for name in ("prompt_tokens", "ttft_s", "token_s", "tokens_per_s", "peak_rss_bytes"):
        assert stats[name] > 0
    for name in ("read_bytes", "load_wait_s", "network_wait_s"):
        assert stats[name] >= 0
    failed = node(*STORY, "--stats", str(tmp_path / "no" / "stats.json"))
    assert failed.returncode == 2
    assert failed.stderr.count("\n") <= 2


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--prompt", "x"], "--model_path is missing"),
        (["--model_path", "/no/such"], "/no/such does not exist"),
        (["--model_path", "fable", "--prompt", "x", "--temperature", "nan"], "temperature must be"),
        (["--model_path", "fable", "--prompt", "x", "--p", "0"], "p must be above 0"),
        (["--model_path", "fable", "--prompt", "x", "--threads", "0"], "threads must be"),
        (["--model_path", "fable", "--prompt", "x " * 5000], "does not fit the model's context"),
        (["--model_path", "fable", "--prompt", "x", "--use_gpu"], "--use_gpu"),
        (
            ["--model_path", "fable", "--prompt", "x", "--model_type", "bert"],
            "bert is not supported; expected llama, mistral, qwen2",
        ),
        (["--model_path", "fable", "--prompt", "x", "--chat"], "not a chat model"),
        (["--model_path", "fable", "--prompt", "x", "--seed", "-1"], "seed must be"),
        (["--model_path", "fable", "--prompt", "x", "--length", "few"], "--length"),
        (["--modl_path", "fable"], "--modl_path"),
        (["--model_path", "/etc/passwd", "--prompt", "x"], "/etc/passwd is not a folder"),
        (["--model_path", "/etc", "--prompt", "x"], "config.json does not exist"),
        (["--rank", "1"], "--join"),
        (["--model_path", "fable", "--local", "2", "--ratio", "1,2,3"], "2 ranks, found 3"),
    ],
)
def test_mistakes_are_one_line_and_code_2(args: list[str], text: str) -> None:
    done = node(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_damaged_model_is_one_line_and_code_2(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config())
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    done = node("--model_path", str(folder), "--prompt", "x")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [("--local", "1"), ("--local", "2"), ("--quantize", "q8_0")])
def test_a_damaged_tokenizer_is_one_line_before_anything_is_sliced(
    tmp_path: Path, how: tuple[str, str]
) -> None:
    folder = write_checkpoint(tmp_path, tiny_config())
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    done = node("--model_path", str(folder), *how, "--prompt", "x")
    assert done.returncode == 2
    assert "Unigram" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("**/node_*"))


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_reason_to_fail(tmp_path: Path, stream: str) -> None:
    stats = tmp_path / "stats.json"
    command = " ".join([*NODE, "--model_path fable --prompt Once --length 3 --stats", str(stats), stream])
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert json.loads(stats.read_text())["new_tokens"] == 3


def started(*args: str) -> "subprocess.Popen[str]":
    """A node that is generating: its first text has come."""
    process = subprocess.Popen(
        [*NODE, "--model_path", "fable", "--prompt", "Once", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def endless(tmp_path: Path) -> list[str]:
    """A model that never ends by itself within a test's time, with fable's tokenizer."""
    fable = Path(__file__).parents[2] / "tpilite" / "shipped" / "fable"
    config = json.loads((fable / "config.json").read_text())
    model = tiny_config(
        vocab_size=config["vocab_size"], max_position_embeddings=1 << 20, eos_token_ids=(), bos_token_id=1
    )
    write_checkpoint(tmp_path, model)
    (tmp_path / "tokenizer.model").write_bytes((fable / "tokenizer.model").read_bytes())
    return ["--model_path", str(tmp_path)]


def test_ctrl_c_ends_cleanly_with_the_statistics(tmp_path: Path) -> None:
    process = started(*endless(tmp_path))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "prompt tokens" in errors
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    process = started(*endless(tmp_path))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


class Terminal:
    """A node on a pseudo-terminal: what it shows there is read until an expected text has come."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        self._shown = b""
        self.process = subprocess.Popen([*NODE, *args], stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, expected: str) -> str:
        """What is shown up to the expected text; what follows is for the next call."""
        while expected.encode() not in self._shown:
            self._shown += self._read(expected)
        found, _, self._shown = self._shown.partition(expected.encode())
        return found.decode(errors="replace") + expected

    def read_more(self) -> None:
        """Waits until anything more is shown."""
        while not self._shown:
            self._shown += self._read("anything")

    def _read(self, expected: str) -> bytes:
        ready, _, _ = select.select([self._master], [], [], 30)
        assert ready, f"expected {expected!r} on the terminal, found {self._shown.decode()!r}"
        return os.read(self._master, 65536)

    def end(self) -> int:
        return self.process.wait(timeout=30)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}<<SYS>>"


def chat_model(tmp_path: Path) -> str:
    """fable as if it were made for chat: it answers nonsense, but it takes conversations."""
    fable = Path(__file__).parents[2] / "tpilite" / "shipped" / "fable"
    for name in ("config.json", "model.safetensors", "tokenizer.model", "generation_config.json"):
        (tmp_path / name).write_bytes((fable / name).read_bytes())
    settings = json.loads((fable / "tokenizer_config.json").read_text()) | {"chat_template": CHAT_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(tmp_path)


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    with Terminal("--model_path", chat_model(tmp_path), "--length", "5", "--temperature", "0") as terminal:
        terminal.read_until("> ")
        terminal.type("Hello there\n")
        first = terminal.read_until("> ")
        assert "5 new" in first
        n_first = int(first.split(" prompt tokens")[0].split("[")[-1])
        terminal.type("And then?\n")
        second = terminal.read_until("> ")
        assert int(second.split(" prompt tokens")[0].split("[")[-1]) > n_first
        terminal.type("/reset\n")
        terminal.read_until("> ")
        terminal.type("/help\n")
        assert "/reset" in terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    with Terminal(*endless(tmp_path)) as terminal:
        assert "not made for chat" in terminal.read_until("> ")
        terminal.type("Once\n")
        terminal.read_until("Once\r\n")
        terminal.read_more()
        terminal.type("\x03")
        # Up to the figures: what the random model writes may look like the prompt for the next line.
        assert "new" in terminal.read_until("peak memory")
        terminal.read_until("> ")
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_version_and_help_name_the_program() -> None:
    products = f"by NumPy ({why_not()})" if why_not() else "compiled"
    assert node("--version").stdout == f"tpilite {__version__}, products {products}\n"
    text = node("--help").stdout
    for option in ("--model_path", "--prompt", "--temperature", "--k", "--p", "--seed", "--stats"):
        assert option in text


@pytest.mark.parametrize("program", [NODE, [sys.executable, "-m", "tpilite"]])
def test_a_blas_is_told_its_threads_before_numpy_is_imported(tmp_path: Path, program: list[str]) -> None:
    (tmp_path / "numpy.py").write_text("import os; raise SystemExit(os.environ['VECLIB_MAXIMUM_THREADS'])")
    for said, expected in (({}, "1"), ({"VECLIB_MAXIMUM_THREADS": "3"}, "3")):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), **said}
        done = subprocess.run(
            program, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
        assert done.stderr.strip() == expected


def test_a_package_that_is_missing_is_named_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "msgpack.py").write_text("raise ModuleNotFoundError(name='msgpack')")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = node("--version", env=environment)
    assert done.returncode == 2
    assert "the package msgpack is missing" in done.stderr
    assert "Traceback" not in done.stderr
