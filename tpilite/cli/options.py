"""What can be asked for on the command line: the options, by groups."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tpilite.engine.config import KV_DTYPES
from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError
from tpilite.native import products as compiled
from tpilite.net.sums import CODECS, WAYS
from tpilite.version import __version__

PORT = 29700


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, by the names of TPI-LLM; hyphens are accepted for underscores."""
    parser = _parser()
    known = {option for action in parser._actions for option in action.option_strings}

    def underscored(word: str) -> str:
        name, equals, value = word.partition("=")
        renamed = "--" + name[2:].replace("-", "_")
        return renamed + equals + value if name.startswith("--") and renamed in known else word

    return parser.parse_args([underscored(word) for word in argv])


def _ratio(text: str) -> tuple[float, ...]:
    """The shares in a text like 2,1,1."""
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number for each rank, as in 2,1,1, found {text!r}"
        ) from None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all of ours are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (tpilite-node --help names all options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tpilite-node",
        description="Runs a Llama model on this machine, or together with others as one of its ranks.",
        epilog="The new text goes to stdout, everything else to stderr. Exit codes: 0 done, 2 something is "
        "wrong with what was asked for or with a file, 3 a peer was lost or misbehaved, 130 interrupted.",
        allow_abbrev=False,
    )
    products = "by NumPy" if compiled.load() is None else "compiled"
    parser.add_argument("--version", action="version", version=f"tpilite {__version__}, products {products}")
    parser.add_argument("--verbose", action="store_true", help="log what happens in detail")

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model_path", metavar="DIR", help="a Hugging Face folder of a Llama model, or 'fable', which ships"
    )
    model.add_argument("--model_type", metavar="TYPE", help="llama, the only type there is")
    model.add_argument("--use_gpu", action="store_true", help="refused: tpilite computes on the CPU")
    model.add_argument("--threads", type=int, metavar="N", help="threads to compute with (physical cores)")

    model.add_argument(
        "--memory_budget",
        default="auto",
        metavar="SIZE",
        help="memory of this process, as 700MB or 2GiB; auto: what is free, or unlimited (%(default)s)",
    )
    model.add_argument(
        "--memory_window", type=int, metavar="W", help="only W blocks of weights in memory, 2 or more"
    )
    model.add_argument(
        "--memory_report", type=Path, metavar="FILE", help="write memory and loads over time as CSV"
    )
    model.add_argument(
        "--kv_dtype",
        default="f32",
        choices=KV_DTYPES,
        help="f16 halves the memory of a long text (%(default)s)",
    )

    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--world_size", type=int, metavar="N", help="ranks in all; this is rank 0 (1)")
    cluster.add_argument("--local", type=int, metavar="N", help="N ranks, all of them on this machine")
    cluster.add_argument("--join", metavar="HOST[:PORT]", help="work for the rank 0 there; needs no model")
    cluster.add_argument("--rank", type=int, metavar="I", help="the rank to have (a free one)")
    cluster.add_argument("--master_addr", metavar="HOST", help="where rank 0 is, for a start with --rank")
    cluster.add_argument(
        "--token", metavar="T", help="the cluster's secret (TPILITE_TOKEN, or made and kept)"
    )
    cluster.add_argument("--broadcast_port", type=int, default=PORT, metavar="P", help="(%(default)s)")
    cluster.add_argument("--file_port", type=int, default=29600, metavar="P", help="for slices (%(default)s)")
    cluster.add_argument("--ratio", type=_ratio, metavar="2,1,1", help="the ranks' shares of the work (even)")
    cluster.add_argument(
        "--save_dir", type=Path, metavar="DIR", help="where slices are, from the model's folder (split)"
    )
    cluster.add_argument("--split_bin", action="store_true", help="slice the model anew")
    cluster.add_argument(
        "--split_only", action="store_true", help="slice the model for --world_size ranks, and end"
    )
    cluster.add_argument("--force_download", action="store_true", help="fetch this rank's slices anew")
    cluster.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="longest silence of a rank (%(default)s s)"
    )
    cluster.add_argument(
        "--rejoin_timeout", type=float, metavar="S", help="longest wait for a lost rank (for ever)"
    )
    cluster.add_argument("--once", action="store_true", help="a worker ends with its session")
    cluster.add_argument("--until_eof", action="store_true", help=argparse.SUPPRESS)
    cluster.add_argument(
        "--allreduce", default="auto", choices=("auto", *WAYS), help="how ranks sum (%(default)s)"
    )
    cluster.add_argument(
        "--payload", default="f32", choices=tuple(CODECS), help="numbers on the wire (%(default)s)"
    )
    cluster.add_argument(
        "--tls_cert", type=Path, metavar="PEM", help="TLS on all connections: this node's certificate,"
    )
    cluster.add_argument("--tls_key", type=Path, metavar="PEM", help="its key,")
    cluster.add_argument(
        "--tls_ca", type=Path, metavar="PEM", help="and the authority that signed all nodes' ones"
    )

    service = parser.add_argument_group("the service")
    service.add_argument("--serve", action="store_true", help="serve the page and OpenAI's API over HTTP")
    service.add_argument("--api_host", default="127.0.0.1", metavar="ADDR", help="(%(default)s)")
    service.add_argument("--api_port", type=int, default=8080, metavar="P", help="(%(default)s)")
    service.add_argument("--api_key", metavar="KEY", help="what clients must show (nothing)")
    service.add_argument("--api_key_file", type=Path, metavar="FILE", help="a file that holds the key")
    service.add_argument(
        "--api_name", action="append", default=[], metavar="NAME", help="a name browsers use; repeatable"
    )
    service.add_argument(
        "--cors_origin", action="append", default=[], metavar="URL", help="pages that may call; repeatable"
    )
    service.add_argument(
        "--max_waiting", type=int, default=64, metavar="N", help="requests in line (%(default)s)"
    )
    service.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="for open requests at the end (%(default)s s)"
    )

    text = parser.add_argument_group("the text")
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; without it stdin is read, or a chat begins on a terminal",
    )
    text.add_argument("--prefix", default="", metavar="TEXT", help="put before every prompt")
    text.add_argument("--lines", action="store_true", help="every line of stdin is a prompt of its own")
    text.add_argument("--chat", action="store_true", help="the prompt is a message to a chat model")
    text.add_argument("--system", metavar="TEXT", help="what a chat model is told before everything else")
    text.add_argument("--echo", action="store_true", help="show the prompt before the new text")
    text.add_argument("--length", type=int, metavar="N", help="the most new tokens (until the text ends)")
    text.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the text where it appears; repeatable",
    )
    text.add_argument("--stats", type=Path, metavar="FILE", help="write the figures of the text as JSON")

    choice = parser.add_argument_group("the choice of tokens")
    defaults = SamplingParams()
    choice.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="X",
        help="0 is greedy (%(default)s)",
    )
    choice.add_argument(
        "--k",
        type=int,
        default=defaults.k,
        metavar="N",
        help="choose among the N best; 0 for all (%(default)s)",
    )
    choice.add_argument(
        "--p",
        type=float,
        default=defaults.p,
        metavar="X",
        help="and the likeliest that reach X (%(default)s)",
    )
    choice.add_argument(
        "--min_p", type=float, default=defaults.min_p, metavar="X", help="and X times the best (%(default)s)"
    )
    choice.add_argument(
        "--repetition_penalty",
        type=float,
        default=defaults.repetition_penalty,
        metavar="X",
        help="above 1, tokens that were there become less likely (%(default)s)",
    )
    choice.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (random)")
    return parser
