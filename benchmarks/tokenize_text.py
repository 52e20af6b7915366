"""How long a tokenizer.json takes to load and a text to encode, here and by the library `tokenizers`.

    python benchmarks/tokenize_text.py [--rounds 5] FOLDER ...

Each FOLDER holds a tokenizer.json. The text is English, the language reference that comes with Python
(`pydoc_data.topics`), cut or repeated to a million characters; "one letter" and the like are a million
characters without a place to cut. In each round both load anew, so that neither knows a word yet, and both
use one thread. Needs `tokenizers`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is imported

from tokenizers import Tokenizer

from tpilite.formats.model_files import ModelFiles
from tpilite.text.load import load_tokenizer

_N_CHARS = 1_000_000
GOAL_RATIO = 3.0


def texts() -> dict[str, str]:
    english = "\n".join(topics[name] for name in sorted(topics))
    return {
        "English": (english * (_N_CHARS // len(english) + 1))[:_N_CHARS],
        "one letter": "a" * _N_CHARS,
        "spaces": " " * _N_CHARS,
        "one Han character": "漢" * _N_CHARS,
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def _ours(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = load_tokenizer(ModelFiles(folder), 10**6)
    assert tokenizer is not None
    return tokenizer.encode


def _theirs(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text).ids


def measure(folder: Path, rounds: int) -> bool:
    """Prints a line for each text. True where the ids are the same and English is within the goal."""
    loads: dict[str, list[float]] = {"ours": [], "theirs": []}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in texts()}
    same = True
    for _ in range(rounds):
        load_s, ours = _timed(lambda: _ours(folder))
        loads["ours"].append(load_s)
        load_s, theirs = _timed(lambda: _theirs(folder))
        loads["theirs"].append(load_s)
        for name, text in texts().items():
            found_s, found = _timed(lambda text=text, ours=ours: ours(text))
            right_s, right = _timed(lambda text=text, theirs=theirs: theirs(text))
            runs[name].append((found_s, right_s))
            same = same and found == right
    print(f"{folder.name}: load {_spread(loads['ours'])} s, tokenizers {_spread(loads['theirs'])} s")
    for name, pairs in runs.items():
        ratio = statistics.median(found / right for found, right in pairs)
        found_s, right_s = (_spread(column) for column in zip(*pairs, strict=True))
        print(f"  {name}: {found_s} s, tokenizers {right_s} s, ratio {ratio:.2f}")
    print(f"  ids {'the same' if same else 'DIFFER'}", flush=True)
    english = statistics.median(found / right for found, right in runs["English"])
    return same and english <= GOAL_RATIO


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    return int(not all(measure(folder, options.rounds) for folder in options.folders))


if __name__ == "__main__":
    sys.exit(main())
