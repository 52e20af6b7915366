"""Slices that the options ask for: made to be carried, or to be used here in fewer bits."""

import argparse
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tpilite.cli.calibration import importance_in
from tpilite.cli.configs import engine_config, save_dir_of
from tpilite.cli.terminal import progress_bar
from tpilite.cluster.splits import Split
from tpilite.errors import ConfigError
from tpilite.export.gguf_file import export_gguf
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.stored import StoredTensor
from tpilite.quantize.recipe import Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import EMBEDDING, LM_HEAD, Partition
from tpilite.weights.slices import SliceFolder


def recipe_of(args: argparse.Namespace, files: ModelFiles | None) -> Recipe | None:
    """What becomes of the weights of `files` by the options; None where they stay as they are.

    Raises `ConfigError` where --calibrate names what cannot be used.
    """
    if args.calibrate is None:
        return None if args.quantize is None else Recipe(args.quantize)
    if args.quantize is None or files is None or not files.has_weights:
        raise ConfigError("--calibrate needs --quantize, and the model that is to read the text")
    try:
        raw = args.calibrate.read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibrate {args.calibrate} cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise ConfigError(f"--calibrate {args.calibrate} is empty; expected some pages of text")
    weigh = functools.partial(importance_in, files, text, engine_config(args))
    return Recipe(args.quantize, hashlib.sha256(raw).hexdigest(), weigh)


def checkpoint_of(args: argparse.Namespace, files: ModelFiles, world_size: int) -> Checkpoint:
    """The model to slice, as the options want its weights."""
    save_dir = save_dir_of(args, files, world_size)
    return Checkpoint(files, save_dir, trust=not args.verify, recipe=recipe_of(args, files))


def split(args: argparse.Namespace, files: ModelFiles, world_size: int) -> int:
    """Makes the slices of all ranks, to be carried to their machines, and nothing else."""
    with checkpoint_of(args, files, world_size) as checkpoint:
        partition = checkpoint.partition(world_size, args.ratio)
        with _made(args, checkpoint, partition, "slicing the model") as slices:
            print(
                "tpilite: carry each node_I to the machine of rank I, into the folder named there with "
                "--save_dir",
                file=sys.stderr,
            )
            for rank in range(world_size):
                print(slices.node(rank))
    return 0


@contextmanager
def _made(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    partition: Partition,
    what: str,
    *,
    embedding: bool = True,
) -> Iterator[Split]:
    """All slices of a partition, made where they are missing, under a bar that says `what`."""
    save_dir = save_dir_of(args, checkpoint.files, partition.world_size)
    replace = args.save_dir is None
    with Split.of(checkpoint, partition, save_dir, force=args.split_bin, replace=replace) as slices:
        with progress_bar(what) as bar:
            slices.make(checkpoint, partition, embedding=embedding, verify=args.verify, progress=bar)
        yield slices


def export(args: argparse.Namespace, files: ModelFiles) -> int:
    """Writes the model as a GGUF file, and nothing else."""
    if files.gguf_paths and args.quantize is None:
        raise ConfigError(f"{files.path} is a GGUF already: give --quantize to make one of fewer bits of it")
    with (
        Checkpoint(files, recipe=recipe_of(args, files)) as checkpoint,
        progress_bar("writing the model") as bar,
    ):
        export_gguf(checkpoint, args.export, bar)
    print(args.export)
    return 0


def whole_slice(
    args: argparse.Namespace, checkpoint: Checkpoint, stack: ExitStack
) -> Mapping[str, StoredTensor]:
    """The slice of the only rank there is, made where it is missing, and open until the end of `stack`.

    Where embedding and lm_head are one, the slice has them once.
    """
    own = not checkpoint.config.tie_word_embeddings
    made = _made(args, checkpoint, checkpoint.partition(1), "quantizing the model", embedding=own)
    tensors = stack.enter_context(SliceFolder(stack.enter_context(made).node(0))).tensors
    return {EMBEDDING: tensors[LM_HEAD], **tensors}
