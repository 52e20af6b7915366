"""New tokens per second, against transformers on the same weights and cores, in the same run.

python benchmarks/decode.py --model llama3.2-1b
"""

import argparse

from engines import add_run_options, compare
from models import add_model_options, model_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    add_run_options(parser, ["tpilite", "tpilite-fast", "transformers-bf16"])
    parser.add_argument("--new", type=int, default=24, help="tokens per run (%(default)s)")
    args = parser.parse_args()
    compare(args, model_of(args), 4, args.new, ["tokens_per_s", "peak_rss_mib", "load_s"])
