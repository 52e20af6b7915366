"""What can be asked for on the command line: the options, by groups."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tpilite.cluster.config import ClusterConfig
from tpilite.engine.compiled import why_not
from tpilite.engine.config import EngineConfig
from tpilite.engine.sampling import DEFAULTS
from tpilite.errors import ConfigError
from tpilite.model.kept import KV_DTYPES
from tpilite.net.codecs import CODECS
from tpilite.net.sums import ALGORITHMS
from tpilite.quantize.recipe import KINDS
from tpilite.serving.config import ServerConfig
from tpilite.version import __version__

# argparse has no public name for what `add_argument_group` gives.
_Group = argparse._ArgumentGroup


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
    products = f"by NumPy ({why_not()})" if why_not() else "compiled"
    parser.add_argument("--version", action="version", version=f"tpilite {__version__}, products {products}")
    parser.add_argument("--verbose", action="store_true", help="log what happens in detail")
    _add_model(parser.add_argument_group("the model"))
    cluster = parser.add_argument_group("the cluster")
    _add_ranks(cluster)
    _add_slices(cluster)
    _add_network(cluster)
    _add_service(parser.add_argument_group("the service"))
    _add_text(parser.add_argument_group("the text"))
    _add_choice(parser.add_argument_group("the choice of tokens"))
    return parser


def _add_model(group: _Group) -> None:
    """Adds the options that say which model runs, and what it may use of this machine."""
    add = group.add_argument
    add(
        "--model_path",
        metavar="PATH",
        help="a model's Hugging Face folder or GGUF file, its name on the Hub, or 'fable', which ships",
    )
    add("--model_type", metavar="TYPE", help="not needed: a model's files say it")
    add("--use_gpu", action="store_true", help="refused: tpilite computes on the CPU")
    add("--threads", type=int, metavar="N", help="threads to compute with (physical cores within the quota)")
    add(
        "--memory_budget",
        default=EngineConfig.memory_budget,
        metavar="SIZE",
        help="memory of this process, as 700MB or 2GiB; auto: what is free, or unlimited (%(default)s)",
    )
    add("--memory_window", type=int, metavar="W", help="only W blocks of weights in memory, 2 or more")
    add("--memory_report", type=Path, metavar="FILE", help="write memory and loads over time as CSV")
    add(
        "--kv_dtype",
        default=EngineConfig.kv_dtype,
        choices=KV_DTYPES,
        help="f16 halves the memory of a long text, q8_0 takes 0.27 of it (%(default)s)",
    )


def _add_ranks(group: _Group) -> None:
    """Adds the options that say which ranks there are, and how they find each other."""
    add, defaults = group.add_argument, ClusterConfig
    add("--world_size", type=int, metavar="N", help="ranks in all; this is rank 0 (1)")
    add("--local", type=int, metavar="N", help="N ranks, all of them on this machine")
    add("--join", metavar="HOST[:PORT]", help="work for the rank 0 there; needs no model")
    add("--rank", type=int, metavar="I", help="the rank to have (a free one)")
    add("--master_addr", metavar="HOST", help="where rank 0 is, for a start with --rank")
    add("--token_file", type=Path, metavar="FILE", help="holds the cluster's secret, for this user alone")
    add("--token", metavar="T", help="the secret itself, which ps shows (TPILITE_TOKEN, or made and kept)")
    add("--host", default=defaults.host, metavar="ADDRESS", help="where rank 0 listens (everywhere)")
    add("--broadcast_port", type=int, default=defaults.broadcast_port, metavar="P", help="(%(default)s)")
    add("--file_port", type=int, default=defaults.file_port, metavar="P", help="for slices (%(default)s)")


def _add_slices(group: _Group) -> None:
    """Adds the options that say how the model is shared out, and where each rank's part is kept."""
    add = group.add_argument
    add("--ratio", type=_ratio, metavar="2,1,1", help="the ranks' shares of the work (even)")
    add(
        "--save_dir",
        type=Path,
        metavar="DIR",
        help="where slices are, from the model's folder (split; NAME.split for a GGUF)",
    )
    add(
        "--quantize",
        choices=tuple(KINDS),
        help="slice the model into blocks of fewer bits (as it is stored)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE.txt",
        help="with --quantize: columns count by what this text puts into them",
    )
    add(
        "--export",
        type=Path,
        metavar="FILE.gguf",
        help="write the model as one GGUF file, with --quantize in fewer bits, and end",
    )
    add("--split_bin", action="store_true", help="slice the model anew")
    add("--split_only", action="store_true", help="slice the model for --world_size ranks, and end")
    add("--force_download", action="store_true", help="fetch this rank's slices anew")
    add("--verify", action="store_true", help="read all weights and slices again, to find what is damaged")
    add("--clean", action="store_true", help="show slices that are no longer needed, remove them, and end")
    add("--yes", action="store_true", help="do so without a question")


def _add_network(group: _Group) -> None:
    """Adds the options that say how long ranks wait for each other, and what they send."""
    add, defaults = group.add_argument, ClusterConfig
    add(
        "--timeout",
        type=float,
        default=defaults.timeout_s,
        metavar="S",
        help="longest silence of a rank (%(default)s s)",
    )
    add("--rejoin_timeout", type=float, metavar="S", help="longest wait for a lost rank (for ever)")
    add("--once", action="store_true", help="a worker ends with its session")
    add("--until_eof", action="store_true", help=argparse.SUPPRESS)
    add(
        "--allreduce",
        default=defaults.allreduce,
        choices=("auto", *ALGORITHMS),
        help="how ranks sum (%(default)s)",
    )
    add(
        "--payload",
        default=defaults.payload,
        choices=tuple(CODECS),
        help="numbers on the wire; q8 sends 0.27 of the bytes of f32 (%(default)s)",
    )
    add("--protect", action="store_true", help="protect sums, too, against changes on their way")
    add("--encrypt", action="store_true", help="TLS by the token on all connections; Python 3.13 or newer")
    add("--tls_cert", type=Path, metavar="PEM", help="TLS on all connections: this node's certificate,")
    add("--tls_key", type=Path, metavar="PEM", help="its key,")
    add("--tls_ca", type=Path, metavar="PEM", help="and the authority that signed all nodes' ones")


def _add_service(group: _Group) -> None:
    """Adds the options that say where the service listens, and whom it serves."""
    add, defaults = group.add_argument, ServerConfig
    add("--serve", action="store_true", help="serve the page and OpenAI's API over HTTP")
    add("--api_host", default=defaults.host, metavar="ADDR", help="(%(default)s)")
    add("--api_port", type=int, default=defaults.port, metavar="P", help="(%(default)s)")
    add("--api_key", metavar="KEY", help="what clients must show (nothing)")
    add("--api_key_file", type=Path, metavar="FILE", help="a file that holds the key")
    add("--api_name", action="append", default=[], metavar="NAME", help="a name browsers use; repeatable")
    add("--api_proxy", action="append", default=[], metavar="ADDR", help="a proxy to trust; repeatable")
    add("--cors_origin", action="append", default=[], metavar="URL", help="pages that may call; repeatable")
    add(
        "--max_waiting",
        type=int,
        default=defaults.max_waiting,
        metavar="N",
        help="requests in line (%(default)s)",
    )
    add(
        "--grace",
        type=float,
        default=defaults.grace_s,
        metavar="S",
        help="for open requests at the end (%(default)s s)",
    )


def _add_text(group: _Group) -> None:
    """Adds the options that say what is continued, and where that ends."""
    add = group.add_argument
    add(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; without it stdin is read, or a chat begins on a terminal",
    )
    add("--prefix", default="", metavar="TEXT", help="put before every prompt")
    add("--lines", action="store_true", help="every line of stdin is a prompt of its own")
    add("--chat", action="store_true", help="the prompt is a message to a chat model")
    add("--system", metavar="TEXT", help="what a chat model is told before everything else")
    add("--echo", action="store_true", help="show the prompt before the new text")
    add("--length", type=int, metavar="N", help="the most new tokens (until the text ends)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the text where it appears; repeatable",
    )
    add("--stats", type=Path, metavar="FILE", help="write the figures of the text as JSON")


def _add_choice(group: _Group) -> None:
    """Adds the options that say how each token is chosen."""

    def add(name: str, kind: type, metavar: str, what: str) -> None:
        whose = f" (the model's, else {DEFAULTS[name]:g})" if name in DEFAULTS else ""
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=what + whose)

    add("temperature", float, "X", "0 is greedy")
    add("k", int, "N", "choose among the N best; 0 for all")
    add("p", float, "X", "and the likeliest that reach X")
    add("min_p", float, "X", "and X times the best")
    add("repetition_penalty", float, "X", "above 1, tokens that were there become less likely")
    add("seed", int, "N", "the same seed gives the same text (random)")
