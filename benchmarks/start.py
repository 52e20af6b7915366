"""A whole process from its start to its first token and to its end, the weights in the page cache.

    python benchmarks/start.py [--tokenizer tokenizer.model] [--rounds 5]

With a tokenizer that is `tpilite-node` on a text of four tokens; without one, and for the others, a Python
program that loads the model and is given the four ids. "cold" has nothing of what an earlier start has
measured and kept about this machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engines import ONE_THREAD, add_run_options, conditions, report
from models import add_model_options, model_of

GOAL_S = 1.0

ROOT = Path(__file__).resolve().parents[1]
_PROMPT = "Once upon a"  # behind the token that begins a text
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from engines import ENGINES
tokens = ENGINES[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))
print(next(tokens([1, 12805, 5304, 264], 1)), flush=True)
"""


def with_tokenizer(folder: Path, tokenizer: Path, into: Path) -> Path:
    """A folder below `into` with the model's files, as links, and the tokenizer."""
    linked = into / folder.name
    linked.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (linked / path.name).symlink_to(path.resolve())
    (linked / tokenizer.name).write_bytes(tokenizer.read_bytes())
    return linked


def environment(**changes: str) -> dict[str, str]:
    """Ours, but Python may keep what it compiles, as it does for users."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return inherited | changes


def started(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    """The seconds from starting a process to the first byte of its text, and to its end."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=variables) as process:
        assert process.stdout is not None
        found = process.stdout.read(1)
        first = time.perf_counter()
        process.stdout.read()
    if not found or process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    return {"first_token_s": first - start, "end_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    add_run_options(parser, ["tpilite"])
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model that fits the model")
    args = parser.parse_args()
    folder = model_of(args)
    with tempfile.TemporaryDirectory() as temporary:
        commands: dict[str, list[str]] = {}
        variables: dict[str, dict[str, str]] = {}
        for engine in args.engines:
            arguments = [str(Path(__file__).parent), engine, str(folder), str(args.threads)]
            commands[engine] = [sys.executable, "-c", _PROGRAM, *arguments]
            variables[engine] = environment(**(ONE_THREAD if engine.startswith("tpilite") else {}))
        if args.tokenizer and "tpilite" in commands:
            model = with_tokenizer(folder, args.tokenizer, Path(temporary))
            options = ["--model_path", str(model), "--prompt", _PROMPT, "--length", "1"]
            options += ["--threads", str(args.threads)]
            commands["tpilite"] = [sys.executable, str(ROOT / "bin" / "tpilite-node"), *options]
            variables["tpilite"] = environment()
        for engine, command in commands.items():  # the files into the page cache, and what is made once
            started(command, variables[engine])
        if "tpilite" in commands:
            commands["tpilite cold"] = commands["tpilite"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for i in range(args.rounds):
            for name, command in commands.items():
                home = {"HOME": f"{temporary}/{i}"} if name == "tpilite cold" else {}
                found[name].append(started(command, variables[name.split()[0]] | home))
    report(found, ["first_token_s", "end_s"], conditions(args), args.json)
    if "tpilite" in found:
        first = statistics.median(row["first_token_s"] for row in found["tpilite"])
        print(f"goal: the first token below {GOAL_S} s: {first:.2f} s  {'ok' if first < GOAL_S else 'OVER'}")


if __name__ == "__main__":
    main()
