"""tpilite beside transformers and llama.cpp: the same weights, cores and run, all in memory.

    python benchmarks/peers.py --install        # once: the peers, into this Python's environment
    python benchmarks/peers.py --model llama3.2-1b --json out.json

The package llama-cpp-python is built from source, which takes a quarter of an hour on two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from engines import ENGINES, add_run_options, conditions, in_turns, report
from models import add_model_options, model_of

PEERS = ["torch", "transformers", "llama-cpp-python", "gguf"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_run_options(parser, list(ENGINES))
    parser.add_argument("--install", action="store_true", help="install the peers and end")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--new", type=int, default=24, help="new tokens (%(default)s)")
    args = parser.parse_args()
    if args.install:
        subprocess.run([sys.executable, "-m", "pip", "install", *PEERS], check=True)
        sys.exit()
    folder = model_of(args)
    if "llama.cpp" in args.engines:
        from to_gguf import write_gguf

        write_gguf(folder, Path(f"{folder}.gguf"))
    found = in_turns(args.engines, folder, args.threads, args.prompt, args.new, args.rounds)
    where = conditions(args) | {"prompt tokens": args.prompt, "new tokens": args.new}
    report(found, ["tokens_per_s", "prompt_tokens_per_s", "peak_rss_mib", "load_s"], where, args.json)
