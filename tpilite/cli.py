"""The command line: what the user asks for, put together and run. The only file that knows all others."""

import argparse
import hashlib
import io
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tpilite.checkpoint import Checkpoint
from tpilite.config import ClusterConfig, EngineConfig
from tpilite.errors import ConfigError, TpiliteError
from tpilite.host import Host, own_address
from tpilite.llm import LLM, Completion, Session
from tpilite.local import LocalWorkers, end_with_stdin
from tpilite.models import SHIPPED, find_model
from tpilite.net.channel import format_address, parse_address
from tpilite.net.sums import CODECS, WAYS
from tpilite.net.token import checked_token, kept_token
from tpilite.partition import Partition
from tpilite.rank import physical_cores
from tpilite.sampling import SamplingParams
from tpilite.slices import ensure_slices, node_folder
from tpilite.terminal import Interrupt, answer, converse, progress_bar
from tpilite.version import __version__
from tpilite.worker import Worker, WorkerOptions

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
BROKEN_PIPE = 141  # likewise, for one whose reader went away
TERMINATED = 143  # and for one that was asked to end

_PORT = 29700

# Every block of a slice is an open file, and a map holds it once more; some systems begin with 256.
_OPEN_FILES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `tpilite-node` and gives its exit code: 0, 2 (what was asked for), 3 (the network), 130, 141."""
    args = parse(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="tpilite: %(message)s",
        stream=sys.stderr,
    )
    signal.signal(signal.SIGTERM, _terminate)
    _raise_file_limit()
    try:
        return run(args)
    except TpiliteError as error:
        print(f"tpilite-node: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Flushing stdout at the interpreter's end would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """Ends the program as an error would, with everything closed that is open."""
    sys.exit(TERMINATED)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, by the names of TPI-LLM; hyphens are accepted for underscores."""
    parser = _parser()
    known = {option for action in parser._actions for option in action.option_strings}

    def underscored(word: str) -> str:
        name, equals, value = word.partition("=")
        renamed = "--" + name[2:].replace("-", "_")
        return renamed + equals + value if name.startswith("--") and renamed in known else word

    return parser.parse_args([underscored(word) for word in argv])


def run(args: argparse.Namespace) -> int:
    """Does what the options ask for: a worker's part, rank 0's, or all of it on this machine."""
    if args.use_gpu:
        raise ConfigError("--use_gpu: tpilite computes on the CPU only; run without it")
    if args.model_type not in (None, "llama"):
        raise ConfigError(f"--model_type {args.model_type} is not supported; expected llama")
    rank = _number(args.rank, "RANK")
    world_size = _number(args.world_size, "WORLD_SIZE") or 1
    master = args.join or args.master_addr or os.environ.get("MASTER_ADDR")
    if args.join or (rank or 0) > 0:
        return work(args, master, rank)
    if args.model_path is None:
        raise ConfigError("--model_path is missing: give a model's folder, or 'fable' for the one that ships")
    params, folder = sampling_params(args), find_model(args.model_path)
    if args.local is not None:
        world_size = args.local
    if args.split_only:
        return split(args, folder, world_size)
    if world_size == 1:
        with LLM(folder, threads=args.threads) as llm:
            return converse_or_complete(llm, args, params)
    with ExitStack() as stack:
        host = stack.enter_context(hosted(args, folder, world_size, stack))
        session = Session(
            folder, host.config, host.rank, max_rows=EngineConfig().max_rows, recover=host.recover
        )
        return converse_or_complete(session, args, params)


def work(args: argparse.Namespace, master: str | None, rank: int | None) -> int:
    """A rank above 0, until it is told to end."""
    if master is None:
        raise ConfigError("a rank above 0 needs --join HOST[:PORT] (or --master_addr HOST) of rank 0")
    if args.until_eof:
        end_with_stdin()
    cluster = cluster_config(args, 1, make_token=False)
    folder = None if args.model_path is None else find_model(args.model_path)
    with progress_bar("fetching slices") as bar:
        options = WorkerOptions(
            save_dir=_save_dir(args, folder) if folder or args.save_dir else None,
            cache=_cache() / "slices",
            rank=rank,
            force_download=args.force_download,
            once=args.once,
            progress=lambda progress: bar(progress.done_bytes, progress.total_bytes),
        )
        Worker(
            parse_address(master, args.broadcast_port), cluster, EngineConfig(threads=args.threads), options
        ).run()
    return 0


def hosted(args: argparse.Namespace, folder: Path, world_size: int, stack: ExitStack) -> Host:
    """Rank 0 of a cluster, complete; the other ranks started here with `--local`."""
    cluster = cluster_config(args, world_size, make_token=True)
    save_dir = _save_dir(args, folder)
    threads = args.threads
    if args.local is not None:
        cluster = replace(cluster, broadcast_port=0, file_port=0)
        threads = threads or max(1, physical_cores() // world_size)

    def invite(host: Host) -> None:
        if args.local is None:
            print(_invitation(host, cluster), file=sys.stderr)
            return
        options = ["--join", f"127.0.0.1:{host.broadcast_port}", "--threads", str(threads), "--once"]
        options += ["--save_dir", str(save_dir)]
        for name in ("tls_cert", "tls_key", "tls_ca"):
            if getattr(args, name) is not None:
                options += [f"--{name}", str(getattr(args, name))]
        stack.enter_context(LocalWorkers(world_size - 1, options, cluster.token))

    with progress_bar("slicing the model") as bar:
        return Host(
            folder,
            save_dir,
            cluster,
            EngineConfig(threads=threads),
            force=args.split_bin,
            listening=invite,
            progress=bar,
        )


def split(args: argparse.Namespace, folder: Path, world_size: int) -> int:
    """Makes the slices of all ranks, to be carried to their machines, and nothing else."""
    save_dir = _save_dir(args, folder)
    with Checkpoint(folder) as checkpoint, progress_bar("slicing the model") as bar:
        partition = Partition.of(checkpoint.config, world_size, args.ratio)
        ensure_slices(checkpoint, partition, save_dir, force=args.split_bin, progress=bar)
    for rank in range(world_size):
        print(node_folder(save_dir, rank))
    return 0


def converse_or_complete(session: Session, args: argparse.Namespace, params: SamplingParams) -> int:
    """A conversation with the person at the terminal, or the texts that follow the prompts."""
    if args.prompt is None and sys.stdin.isatty():
        converse(session, params, args.system, lambda completion: _report(args, completion))
        return 0
    return complete(session, args, params)


def complete(llm: Session, args: argparse.Namespace, params: SamplingParams) -> int:
    """One prompt, from the option or from stdin, and the text that follows it."""
    for prompt in _prompts(args):
        if args.chat:
            system = [{"role": "system", "content": args.system}] if args.system else []
            request = llm.start_chat([*system, {"role": "user", "content": prompt}], params)
        else:
            request = llm.start(prompt, params)
        if args.echo:
            sys.stdout.write(prompt)
        with Interrupt().heard() as interrupt:
            completion = answer(llm, request, sys.stdout, interrupt)
        print(flush=True)
        _report(args, completion)
        if interrupt.wished:
            return INTERRUPTED
    return 0


def cluster_config(args: argparse.Namespace, world_size: int, *, make_token: bool) -> ClusterConfig:
    """The options that say how ranks find and trust each other."""
    return ClusterConfig(
        token=_token(args, make=make_token),
        world_size=world_size,
        ratio=args.ratio,
        broadcast_port=args.broadcast_port,
        file_port=args.file_port,
        timeout_s=args.timeout,
        rejoin_timeout_s=args.rejoin_timeout,
        allreduce=args.allreduce,
        payload=args.payload,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        tls_ca=args.tls_ca,
    )


def _token(args: argparse.Namespace, *, make: bool) -> str:
    if args.token is not None:
        return checked_token(args.token, "--token")
    if "TPILITE_TOKEN" in os.environ:
        return checked_token(os.environ["TPILITE_TOKEN"], "TPILITE_TOKEN")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    token = kept_token(config / "tpilite" / "token", make=make)
    if token is None:
        raise ConfigError("the cluster's token is missing: give --token, as rank 0 shows it at its start")
    return token


def _save_dir(args: argparse.Namespace, folder: Path | None) -> Path:
    """Where slices are: as `--save_dir` says, in the model's folder, or in the cache if that is not ours."""
    if args.save_dir is not None:
        return (folder or Path()) / args.save_dir
    assert folder is not None, "a worker without either uses its cache"
    ours = folder not in SHIPPED.values() and folder.is_dir() and folder.stat().st_mode & 0o222
    if ours and os.access(folder, os.W_OK):
        return folder / "split"
    key = f"{folder.resolve()} {args.local or args.world_size} {args.ratio}"
    return _cache() / "split" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpilite"


def _number(option: int | None, variable: str) -> int | None:
    """An option, or the environment's variable in its place."""
    if option is not None or not os.environ.get(variable):
        return option
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"{variable} must be a whole number, found {os.environ[variable]!r}") from None


def _invitation(host: Host, cluster: ClusterConfig) -> str:
    """The line to run on the other machines."""
    address = (
        format_address((own_address(), host.broadcast_port))
        if host.broadcast_port != _PORT
        else own_address()
    )
    tls = " --tls_cert CERT --tls_key KEY --tls_ca CA" if cluster.tls_ca else ""
    return (
        f"tpilite: this is rank 0 of {cluster.world_size}; on each other machine run\n\n"
        f"    tpilite-node --join {address} --token {cluster.token}{tls}\n"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options that say how text is made."""
    return SamplingParams(
        temperature=args.temperature,
        k=args.k,
        p=args.p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        length=args.length,
        stop=tuple(args.stop),
    )


def _ratio(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts to answer, each after `--prefix`, read as they are needed."""
    if args.prompt is not None:
        yield args.prefix + args.prompt
    elif args.lines:
        for line in sys.stdin:
            yield args.prefix + line.removesuffix("\n")
    else:
        yield args.prefix + sys.stdin.read().removesuffix("\n")


def _report(args: argparse.Namespace, completion: Completion) -> None:
    """The figures of a text: a line for people, and a file for programs."""
    print(f"[{completion.stats}]", file=sys.stderr)
    if args.stats is not None:
        try:
            args.stats.write_text(json.dumps(completion.stats.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--stats {args.stats} cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpilite-node",
        description="Runs a Llama model on this machine, or together with others as one of its ranks.",
        epilog="The new text goes to stdout, everything else to stderr. Exit codes: 0 done, 2 something is "
        "wrong with what was asked for or with a file, 3 a peer was lost or misbehaved, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tpilite {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens in detail")

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model_path", metavar="DIR", help="a Hugging Face folder of a Llama model, or 'fable', which ships"
    )
    model.add_argument("--model_type", metavar="TYPE", help="llama, the only type there is")
    model.add_argument("--use_gpu", action="store_true", help="refused: tpilite computes on the CPU")
    model.add_argument("--threads", type=int, metavar="N", help="threads to compute with (physical cores)")

    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--world_size", type=int, metavar="N", help="ranks in all; this is rank 0 (1)")
    cluster.add_argument("--local", type=int, metavar="N", help="N ranks, all of them on this machine")
    cluster.add_argument("--join", metavar="HOST[:PORT]", help="work for the rank 0 there; needs no model")
    cluster.add_argument("--rank", type=int, metavar="I", help="the rank to have (a free one)")
    cluster.add_argument("--master_addr", metavar="HOST", help="where rank 0 is, for a start with --rank")
    cluster.add_argument(
        "--token", metavar="T", help="the cluster's secret (TPILITE_TOKEN, or made and kept)"
    )
    cluster.add_argument("--broadcast_port", type=int, default=_PORT, metavar="P", help="(%(default)s)")
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
