"""The configurations that the options and the environment come to, and where this user's files are."""

import argparse
import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.token import checked_token, kept_token, new_token
from tpilite.engine.config import EngineConfig, parse_budget
from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError
from tpilite.formats.model_files import ModelFiles
from tpilite.serving.config import ServerConfig, read_api_key
from tpilite.shipped import SHIPPED


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options that say how text is made."""
    return SamplingParams(**same_named(SamplingParams, args) | {"stop": tuple(args.stop)})


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The options that say what this rank may use."""
    budget = parse_budget(args.memory_budget)
    return EngineConfig(**same_named(EngineConfig, args) | {"memory_budget": budget})


def cluster_config(args: argparse.Namespace, world_size: int, *, make_token: bool) -> ClusterConfig:
    """The options that say how ranks find and trust each other."""
    others = {
        "token": _token(args, make=make_token),
        "world_size": world_size,
        "timeout_s": args.timeout,
        "rejoin_timeout_s": args.rejoin_timeout,
    }
    return ClusterConfig(**same_named(ClusterConfig, args) | others)


def same_named(config: type, args: argparse.Namespace) -> dict[str, Any]:
    """The options that are called as fields of a configuration are."""
    return {field.name: getattr(args, field.name) for field in fields(config) if field.name in args}


def rank_of(args: argparse.Namespace) -> int | None:
    """The rank to have, None for any. Raises `ConfigError`."""
    rank = _number_of(args.rank, "RANK")
    if rank is not None and rank < 0:
        raise ConfigError(f"a rank must be a whole number from 0, found {rank}")
    return rank


def world_size_of(args: argparse.Namespace) -> int:
    """How many ranks there are. Raises `ConfigError`."""
    if args.local is None:
        world_size = _number_of(args.world_size, "WORLD_SIZE")
        return 1 if world_size is None else world_size
    if args.world_size not in (None, args.local):
        raise ConfigError(f"--local {args.local} and --world_size {args.world_size} differ: give only one")
    return int(args.local)


def rank_0_of(args: argparse.Namespace) -> str | None:
    """Where rank 0 is, None if nobody says it."""
    return args.join or args.master_addr or os.environ.get("MASTER_ADDR")


def _number_of(option: int | None, variable: str) -> int | None:
    """An option, or the environment's variable in its place."""
    if option is not None or not os.environ.get(variable):
        return option
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"{variable} must be a whole number, found {os.environ[variable]!r}") from None


def own_save_dir(args: argparse.Namespace, files: ModelFiles | None) -> Path | None:
    """Where slices are: as `--save_dir` says, in the model's folder, or beside a GGUF and named as it is.

    None where that is not the user's.
    """
    folder = None if files is None else files.folder
    if args.save_dir is not None:
        return Path(folder or "", args.save_dir)
    if files is None or folder is None or folder in SHIPPED.values():
        return None
    nearest = folder if folder.exists() else folder.parent
    # The superuser may write everywhere, but not where nobody is meant to.
    ours = nearest.is_dir() and nearest.stat().st_mode & 0o222 and os.access(nearest, os.W_OK)
    return folder / (f"{files.name}.split" if files.gguf_paths else "split") if ours else None


def save_dir_of(args: argparse.Namespace, files: ModelFiles, world_size: int) -> Path:
    """Where rank 0 has the slices: in the cache, if there is no other place."""
    own = own_save_dir(args, files)
    key = f"{files.path.resolve()} {world_size} {args.ratio}"
    return own or in_cache("split") / hashlib.sha256(key.encode()).hexdigest()[:16]


def in_cache(name: str) -> Path:
    """A place in the user's cache. Raises `ConfigError` where there is none."""
    folder = cache_folder()
    if folder is None:
        raise ConfigError("there is no home folder to keep slices in: give --save_dir, or set HOME")
    return folder / name


def cache_folder() -> Path | None:
    """Where this user's programs keep what can be made again; None where that is nowhere."""
    return _user_folder("XDG_CACHE_HOME", ".cache")


def _user_folder(variable: str, name: str) -> Path | None:
    """Our folder where the environment says, or else in the user's home; None for a user who has none."""
    said = Path(os.environ.get(variable, ""))
    if not said.is_absolute():  # the XDG specification has others ignored
        try:
            said = Path.home() / name
        except RuntimeError:  # a container may run as a user that it does not know
            return None
    return said / "tpilite" if said.is_absolute() else None


def _token(args: argparse.Namespace, *, make: bool) -> str:
    if args.token is not None:
        return checked_token(args.token, "--token")
    if args.token_file is not None:
        token = kept_token(args.token_file, make=False)
        if token is None:
            raise ConfigError(f"--token_file {args.token_file} does not exist")
        return token
    if "TPILITE_TOKEN" in os.environ:
        return checked_token(os.environ["TPILITE_TOKEN"], "TPILITE_TOKEN")
    folder, token = _user_folder("XDG_CONFIG_HOME", ".config"), None
    try:
        if folder is not None:
            token = kept_token(folder / "token", make=make)
    except ConfigError:
        if args.local is None:
            raise
    if token is None and args.local is not None:
        token = new_token()  # ranks of one machine need none that lasts
    if token is None and make:
        raise ConfigError("there is no home folder to keep a token in: give one with --token, or set HOME")
    if token is None:
        raise ConfigError("the cluster's token is missing: see what rank 0 says, or give --token")
    return token


def shows_token(args: argparse.Namespace) -> bool:
    """Whether the user may not know the token yet, as nobody gave it."""
    return args.token is None and args.token_file is None and "TPILITE_TOKEN" not in os.environ


def server_config(args: argparse.Namespace, model_name: str, params: SamplingParams) -> ServerConfig:
    """The options of the service; those of the text are what a request gets that does not say."""
    key = args.api_key
    if args.api_key_file is not None:
        if key is not None:
            raise ConfigError("--api_key and --api_key_file are both given; expected one of them")
        key = read_api_key(args.api_key_file)
    return ServerConfig(
        host=args.api_host,
        port=args.api_port,
        model_name=model_name,
        api_key=key,
        host_names=tuple(args.api_name),
        cors_origins=tuple(args.cors_origin),
        proxies=tuple(args.api_proxy),
        max_waiting=args.max_waiting,
        grace_s=args.grace,
        defaults=params,
    )
