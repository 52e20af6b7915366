"""A model as GGUF: its start beside llama.cpp's, and its decoding beside that of the same folder.

    python benchmarks/gguf.py --tokenizer tokenizer.model [--rounds 5] [--engines tpilite llama.cpp]

The first is a whole process up to its first token, on a file in 4.5 bits with Llama 3's 128 thousand tokens,
in the page cache. llama.cpp is llama-cpp-python's own class; tpilite-numpy has nothing that is compiled.
The second decodes bfloat16 from a GGUF and from the folder that it was made of, in turns.
"""

import argparse
import statistics
import sys
from pathlib import Path

from engines import add_run_options, conditions, in_turns, report
from models import add_model_options, model_of
from start import ROOT, environment, started
from to_gguf import write_gguf

_PROMPT = "Once upon a"
_LLAMA_CPP = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), verbose=False)
for piece in llm(sys.argv[3], max_tokens=1, temperature=0, stream=True):
    print(piece["choices"][0]["text"], flush=True)
"""
_START_GOAL, _SAME_GOAL = 1.5, 0.03


def starts(args: argparse.Namespace, model: Path) -> None:
    """Prints the time to the first token of each engine, and our ratio to llama.cpp's."""
    threads = str(args.threads)
    node = [
        sys.executable,
        str(ROOT / "bin" / "tpilite-node"),
        "--model_path",
        str(model),
        "--threads",
        threads,
    ]
    node += ["--prompt", _PROMPT, "--length", "1", "--temperature", "0"]
    commands = {
        "tpilite": (node, environment()),
        "tpilite-numpy": (node, environment(TPILITE_NATIVE="0")),
        "llama.cpp": ([sys.executable, "-c", _LLAMA_CPP, str(model), threads, _PROMPT], environment()),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.engines}
    for i in range(args.rounds + 1):
        for name in args.engines:
            run = started(*commands[name])
            if i:  # the first brings the file into the page cache, and measures this machine once
                found[name].append(run)
    report(found, ["first_token_s", "end_s"], conditions(args), args.json)
    if {"tpilite", "llama.cpp"} <= found.keys():
        ours, theirs = ([run["first_token_s"] for run in found[name]] for name in ("tpilite", "llama.cpp"))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        verdict = "ok" if ratio <= _START_GOAL else "OVER"
        print(f"goal: at most {_START_GOAL} times llama.cpp's: {ratio:.2f}  {verdict}")


def beside_the_folder(args: argparse.Namespace, folder: Path, model: Path) -> None:
    """Prints tokens a second and peak memory of a GGUF over those of the folder with the same weights."""
    runs = [
        [in_turns(["tpilite"], path, args.threads, 8, 16, 1)["tpilite"][0] for path in (model, folder)]
        for _ in range(args.rounds)
    ]
    for figure in ("tokens_per_s", "peak_rss_mib"):
        ratios = [ours[figure] / theirs[figure] for ours, theirs in runs]
        ratio = statistics.median(ratios)
        print(
            f"{figure}: GGUF {statistics.median(r[0][figure] for r in runs):.2f}, folder "
            f"{statistics.median(r[1][figure] for r in runs):.2f}, ratio {ratio:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})  {'ok' if abs(ratio - 1) <= _SAME_GOAL else 'OVER'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    add_run_options(parser, ["tpilite", "tpilite-numpy"])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.model of Llama 3")
    args = parser.parse_args()
    folder = model_of(args)
    few_bits = folder.with_name(f"{folder.name}-q4_k.gguf")
    starts(args, write_gguf(folder, few_bits, "Q4_K", args.tokenizer))
    if args.dtype == "BF16":
        same = folder.with_name(f"{folder.name}.gguf")
        beside_the_folder(args, folder, write_gguf(folder, same))


if __name__ == "__main__":
    main()
