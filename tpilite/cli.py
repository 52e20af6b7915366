"""The command line: what the user asks for, put together and run. The only file that knows all others."""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpilite.errors import ConfigError, TpiliteError
from tpilite.llm import LLM, Completion
from tpilite.models import find_model
from tpilite.sampling import SamplingParams
from tpilite.terminal import Interrupt, answer, converse
from tpilite.version import __version__

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
BROKEN_PIPE = 141  # likewise, for one whose reader went away


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
    """Does what the options ask for on this machine."""
    if args.use_gpu:
        raise ConfigError("--use_gpu: tpilite computes on the CPU only; run without it")
    if args.model_type not in (None, "llama"):
        raise ConfigError(f"--model_type {args.model_type} is not supported; expected llama")
    if args.model_path is None:
        raise ConfigError("--model_path is missing: give a model's folder, or 'fable' for the one that ships")
    params = sampling_params(args)
    with LLM(find_model(args.model_path), threads=args.threads) as llm:
        if args.prompt is None and sys.stdin.isatty():
            if llm.chat_format is None:
                raise ConfigError(f"{args.model_path} is not a chat model; give it a text with --prompt")
            converse(llm, params, args.system, lambda completion: _report(args, completion))
            return 0
        return complete(llm, args, params)


def complete(llm: LLM, args: argparse.Namespace, params: SamplingParams) -> int:
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
