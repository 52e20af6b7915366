"""`--clean`: slices that are no longer needed, shown, and removed where the user says so."""

import argparse
import sys

from tpilite.cli.configs import cache_folder, own_save_dir
from tpilite.cluster.clean import unneeded_of_cache, unneeded_of_model
from tpilite.formats.model_files import ModelFiles
from tpilite.machine import format_size
from tpilite.weights.checkpoint import Checkpoint


def clean(args: argparse.Namespace, files: ModelFiles | None) -> int:
    """Lists what is not needed of a model's slices and in the cache, and removes it after a yes."""
    cache = cache_folder()
    found = [] if cache is None else list(unneeded_of_cache(cache))
    save_dir = None if files is None else own_save_dir(args, files)
    if files is not None and save_dir is not None:
        origin = None
        if files.has_weights or not save_dir.is_dir():
            with Checkpoint(files, save_dir) as checkpoint:
                origin = checkpoint.origin if save_dir.is_dir() else None
        found += unneeded_of_model(save_dir, origin, own=args.save_dir is None)
    for one in found:
        print(f"{format_size(one.nbytes, fine=True)}  {one.folder}: {one.reason}")
    if not found:
        print("tpilite: nothing to clean: all slices are needed", file=sys.stderr)
    elif _wanted(args, format_size(sum(one.nbytes for one in found), fine=True)):
        for one in found:
            if not one.remove():
                print(f"tpilite: {one.folder} is in use by now and stays", file=sys.stderr)
    return 0


def _wanted(args: argparse.Namespace, size: str) -> bool:
    """Whether the user wants these removed: by the option, or asked on a terminal."""
    if args.yes:
        return True
    if not sys.stdin.isatty():
        print(f"tpilite: --clean --yes removes these, {size} in all", file=sys.stderr)
        return False
    print(f"Remove these, {size} in all? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
