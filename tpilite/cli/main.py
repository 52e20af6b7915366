"""The command line: what the user asks for, put together and run. Only this file may import all others."""

import argparse
import gc
import json
import logging
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import FrameType
from typing import NoReturn

from tpilite.cli.clean import clean
from tpilite.cli.configs import (
    cluster_config,
    engine_config,
    in_cache,
    own_save_dir,
    rank_0_of,
    rank_of,
    same_named,
    sampling_params,
    save_dir_of,
    server_config,
    shows_token,
    world_size_of,
)
from tpilite.cli.hub import find_models, is_hub_name, model_name, resolve
from tpilite.cli.local import LocalWorkers, end_with_stdin, share_of, worker_options
from tpilite.cli.memory_report import MemoryReport, paging_columns
from tpilite.cli.options import parse
from tpilite.cli.slicing import checkpoint_of, export, recipe_of, split, whole_slice
from tpilite.cli.streams import PROGRAM, set_up_streams
from tpilite.cli.terminal import Interrupt, answer, converse, interruptible, progress_bar
from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.host import Host, own_address
from tpilite.cluster.worker import Worker, WorkerOptions
from tpilite.collective import Solo
from tpilite.config.hugging_face import MODEL_TYPES
from tpilite.engine.config import EngineConfig
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import SamplingParams, taken_from
from tpilite.engine.session import Completion, Session, TextFormat
from tpilite.errors import ConfigError, TpiliteError
from tpilite.formats.model_files import ModelFiles
from tpilite.llm import LLM
from tpilite.net.address import format_address, parse_address
from tpilite.serving.server import serve
from tpilite.serving.service import Recovery
from tpilite.shipped import find_model

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
BROKEN_PIPE = 141  # likewise, for one whose reader went away
TERMINATED = 143  # and for one that was asked to end

# Every block of a slice is an open file, and a map holds it once more; some systems begin with 256.
_OPEN_FILES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `tpilite-node` and gives its exit code: 0, 2 (what was asked for), 3 (the network), 130, 141."""
    # What is imported stays: looking through it for garbage took a tenth of a short run, most at its end.
    gc.freeze()
    set_up_streams()
    signal.signal(signal.SIGTERM, _terminate)
    _raise_file_limit()
    try:
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            _set_up_logging(args)
            return run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except (TpiliteError, OSError, MemoryError) as error:
        print(f"{PROGRAM}: {_sentence(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, TpiliteError) else ConfigError.exit_code


def _sentence(error: Exception) -> str:
    """What went wrong, in a line; with --verbose the log says where, if that is no error of ours."""
    if isinstance(error, TpiliteError):
        return str(error)
    logger.debug("where it happened:", exc_info=error)
    if isinstance(error, MemoryError):
        return "there is not enough memory: give it less to do, or a smaller --memory_budget"
    what = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    reason = error.strerror if isinstance(error, OSError) else None
    return f"the system refuses: {what}{reason or error}"


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """Ends the program as an error would, with everything closed that is open."""
    sys.exit(TERMINATED)


def _set_up_logging(args: argparse.Namespace) -> None:
    # A worker that `--local` started shares rank 0's terminal, so it reports only what is wrong.
    usual = logging.WARNING if args.until_eof else logging.INFO
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else usual,
        format=f"tpilite{'' if args.rank is None else f', rank {args.rank}'}: %(message)s",
        stream=sys.stderr,
    )


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(args: argparse.Namespace) -> int:
    """Does what the options ask for: a worker's part, rank 0's, or all of it on this machine."""
    if args.use_gpu:
        raise ConfigError("--use_gpu: tpilite computes on the CPU only; run without it")
    if args.model_type not in (None, *MODEL_TYPES):
        raise ConfigError(
            f"--model_type {args.model_type} is not supported; expected {', '.join(MODEL_TYPES)}, or none, "
            "as the model's files say it"
        )
    if args.clean:
        return clean(args, _local_files(args))
    rank, world_size = rank_of(args), world_size_of(args)
    if args.join or (rank or 0) > 0:
        return work(args, rank)
    if args.model_path is None:
        raise ConfigError(_no_model())
    params, files = sampling_params(args), _files_of(args.model_path)
    if args.export is not None:
        return export(args, files)
    if args.split_only:
        return split(args, files, world_size)
    if world_size == 1 and args.quantize is not None:
        return run_quantized(args, files, params)
    if world_size == 1:
        return run_alone(args, files, params)
    return run_as_rank_0(args, files, params, world_size)


def work(args: argparse.Namespace, rank: int | None) -> int:
    """A rank above 0, until rank 0 ends its session."""
    rank_0 = rank_0_of(args)
    if rank_0 is None:
        raise ConfigError("a rank above 0 needs --join HOST[:PORT] (or --master_addr HOST) of rank 0")
    if args.until_eof:
        end_with_stdin()
    cluster = cluster_config(args, 1, make_token=False)
    files = _local_files(args)
    save_dir = own_save_dir(args, files)
    with progress_bar("fetching slices") as bar:
        options = WorkerOptions(
            save_dir=save_dir,
            cache=save_dir or in_cache("slices"),
            model=files,
            recipe=recipe_of(args, files),
            rank=rank,
            force_download=args.force_download,
            verify=args.verify,
            once=args.once,
            progress=bar,
        )
        Worker(parse_address(rank_0, args.broadcast_port), cluster, engine_config(args), options).run()
    return 0


def run_alone(args: argparse.Namespace, files: ModelFiles, params: SamplingParams) -> int:
    """The whole model in this process."""
    with LLM(files, **same_named(EngineConfig, args)) as llm:
        return answer_all(llm, args, params)


def run_quantized(args: argparse.Namespace, files: ModelFiles, params: SamplingParams) -> int:
    """The whole model in this process, from a slice that holds all of it in fewer bits."""
    with ExitStack() as stack:
        with checkpoint_of(args, files, 1) as checkpoint:
            config = checkpoint.config
            text_format = TextFormat.of(files, config)  # before minutes of quantizing, as with more ranks
            tensors = whole_slice(args, checkpoint, stack)
        rank = stack.enter_context(Rank(config, tensors, 0, Solo(), engine_config(args)))
        session = stack.enter_context(Session(files, config, rank, text_format=text_format))
        session.open()
        return answer_all(session, args, params)


def run_as_rank_0(
    args: argparse.Namespace, files: ModelFiles, params: SamplingParams, world_size: int
) -> int:
    """This process as the rank that the others join, and that talks to people and programs."""
    with ExitStack() as stack:
        host, text_format = hosted(args, files, world_size, stack)
        recovery = Recovery(interruptible(host.recover), lambda: host.states)
        session = Session(files, host.config, host.rank, text_format=text_format, recover=recovery)
        session.open()
        return answer_all(session, args, params, recovery)


def hosted(
    args: argparse.Namespace, files: ModelFiles, world_size: int, stack: ExitStack
) -> tuple[Host, TextFormat]:
    """Rank 0 with all others connected, until the end of `stack`. With `--local` they are started here.

    Slicing may take minutes: what is wrong with the files of the model's texts is said before.
    """
    cluster, engine = cluster_config(args, world_size, make_token=True), engine_config(args)
    save_dir = save_dir_of(args, files, world_size)
    if args.local is not None:
        cluster = replace(
            cluster, host="127.0.0.1", broadcast_port=0, file_port=0, encrypt=False
        )  # any free ones
        engine = share_of(engine, world_size)

    host = Host(
        files,
        save_dir,
        cluster,
        engine,
        force=args.split_bin,
        replace=args.save_dir is None,
        verify=args.verify,
        recipe=recipe_of(args, files),
    )
    stack.enter_context(host)
    host.listen()
    text_format = TextFormat.of(files, host.config)
    if args.local is None:
        print(_invitation(host, cluster, shows_token(args)), file=sys.stderr)
    else:
        options = worker_options(host.broadcast_port, host.split_folder, engine, cluster)
        workers = LocalWorkers(
            world_size - 1,
            options,
            cluster.token,
            last_group_s=lambda: host.formed_s,
            on_failure=host.give_up,
        )
        stack.enter_context(workers)
        stack.callback(host.close)  # then they leave by themselves
    with progress_bar("slicing the model") as bar:
        host.start(bar)
    return host, text_format


def answer_all(
    session: Session, args: argparse.Namespace, params: SamplingParams, recovery: Recovery | None = None
) -> int:
    """The service, a conversation with the person at the terminal, or the texts that follow the prompts."""
    if taken := taken_from(session.defaults, params):
        said = ", ".join(f"{name} {value:g}" for name, value in taken.items())
        logger.debug("from the model's generation_config.json: %s", said)
    with ExitStack() as stack:
        if args.memory_report is not None:
            stack.enter_context(MemoryReport(args.memory_report, lambda: paging_columns(session.usage)))
        if args.serve:
            serve(
                session,
                server_config(args, model_name(session.files.path), session.completed(params)),
                ready=lambda url: print(f"tpilite: the page and the API are at {url}", file=sys.stderr),
                recovery=recovery,
            )
            return 0
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
        with Interrupt().listening() as interrupt:
            try:
                completion = answer(llm, request, sys.stdout, interrupt)
            finally:
                print(flush=True)
        _report(args, completion)
        if interrupt.requested:
            return INTERRUPTED
    return 0


def _invitation(host: Host, cluster: ClusterConfig, shows: bool) -> str:
    """The line to run on the other machines. A token in its environment is not seen by `ps`."""
    address = cluster.host or own_address()
    if host.broadcast_port != ClusterConfig.broadcast_port:
        address = format_address((address, host.broadcast_port))
    tls = " --tls_cert CERT --tls_key KEY --tls_ca CA" if cluster.tls_ca else ""
    how = "" if shows else ", with the same token in TPILITE_TOKEN or in a --token_file,"
    token = f"TPILITE_TOKEN={cluster.token} " if shows else ""
    tls = " --encrypt" if cluster.encrypt else tls
    is_safe = cluster.protect or tls
    sums = "" if is_safe else "\nSums are not protected against changes on their way: see --protect.\n"
    return (
        f"tpilite: this is rank 0 of {cluster.world_size}; on each other machine{how} run\n\n"
        f"    {token}tpilite-node --join {address}{tls}\n{sums}"
    )


def _no_model() -> str:
    """What to do without a model: which ones there are."""
    text = "--model_path is missing: give a model's folder or GGUF file, or 'fable' for the one that ships"
    found = find_models()
    listed = ", ".join(f"{name} ({folder})" for name, folder in found.items())
    return f"{text}; found here: {listed}" if found else text


def _files_of(name: str) -> ModelFiles:
    """The files of a model named by its path, as one that ships, or as on the Hub."""
    path = find_model(name)
    return ModelFiles.find(resolve(name) if not path.exists() and is_hub_name(name) else path)


def _local_files(args: argparse.Namespace) -> ModelFiles | None:
    """The model that the options name, without asking the Hub; None where they name none."""
    return None if args.model_path is None else ModelFiles.find(find_model(args.model_path))


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
