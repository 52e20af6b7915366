"""Prompt tokens per second, against transformers on the same weights and cores, in the same run.

python benchmarks/prefill.py --model llama3.2-1b --prompt 128
"""

import argparse

from engines import add_run_options, compare
from models import add_model_options, model_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    add_run_options(parser, ["tpilite", "tpilite-fast", "transformers-bf16", "transformers-f32"])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (%(default)s)")
    args = parser.parse_args()
    compare(args, model_of(args), args.prompt, 1, ["prompt_tokens_per_s", "peak_rss_mib"])
