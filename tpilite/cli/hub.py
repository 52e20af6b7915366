"""Models that others brought: those on this machine, and those of the Hugging Face Hub by their names."""

import itertools
import json
import os
import re
from pathlib import Path

from tpilite.config.hugging_face import MODEL_TYPES
from tpilite.errors import ConfigError
from tpilite.formats.gguf import is_gguf
from tpilite.formats.model_files import ModelFiles, ggufs_in, is_for_pictures

_CACHE = "~/.cache/huggingface/hub"
_MAX_FOLDERS = 2000  # looked into, so that a start in a huge folder stays a start
_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<kind>[\w-]+))?")
# How a GGUF's name ends, after what publishers call the kind of its weights: "Q4_K_M", "f16".
_KIND = re.compile(r"(?:.*[-._])?(?P<kind>I?Q\d\w*|B?F16|F32)(-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE)
# What the engine reads; other formats of the same weights would double the download.
_WANTED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "original/tokenizer.model",
]


def find_models(current: Path | None = None, cache: Path | None = None) -> dict[str, Path]:
    """The models in Hugging Face's cache, in the current folder and in the folders of it, by name."""
    current = current or _current_folder()
    folders = (current, *_folders(current))
    here = [*filter(_is_model, folders), *filter(is_gguf, itertools.chain(*map(ggufs_in, folders)))]
    found = {path.resolve(): (str(path.relative_to(current)), path) for path in here}
    # Other than a Path's, this one leaves the name as it is for a user without a home.
    for repository in _folders(cache or Path(os.path.expanduser(_CACHE))):
        if repository.name.startswith("models--"):
            snapshots = _snapshots(repository)
            folder = next(filter(_is_model, snapshots), None)
            if folder is not None:
                found.setdefault(folder.resolve(), (model_name(folder), folder))
            for path in _ggufs_below(snapshots[0]) if snapshots else ():
                name, kind = model_name(snapshots[0]), _KIND.fullmatch(path.name)
                found.setdefault(path.resolve(), (f"{name}:{kind['kind']}" if kind else path.name, path))
    return dict(sorted(found.values()))


def model_name(folder: Path) -> str:
    """What people call the model of a folder: its name on the Hub where it lies in the Hub's cache."""
    folder = folder.absolute()
    if folder.is_file():
        return ModelFiles.find(folder).name
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def is_hub_name(name: str) -> bool:
    """Whether this is no path here and what the Hub calls a model, "owner/name" or "owner/name:Q4_K_M"."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def resolve(name: str) -> Path:
    """The folder, or the GGUF, that the Hub has under this name, downloaded where it is not here.

    What was cut off goes on where it ended. Raises `ConfigError` without huggingface_hub (the `hub` extra),
    where the Hub refuses or does not answer, and where it has no such GGUF, or nothing but GGUFs.
    """
    match = _HUB_NAME.fullmatch(name)
    assert match, name
    repository, kind = match["repository"], match["kind"]
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ConfigError(
            f"{name} is no folder here; to fetch it from the Hugging Face Hub: pip install 'tpilite[hub]'"
        ) from None
    try:
        wanted = _WANTED if kind is None else _patterns(kind)
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
        found = [path for path in _ggufs_below(folder) if _is_of_kind(path, kind)]
        if found:
            return found[0] if len(found) == 1 else found[0].parent  # where the user is told of several
        if kind is None and any(folder.glob("*.safetensors")):
            return folder
        there = {
            match["kind"]
            for path in huggingface_hub.list_repo_files(repository)
            if (match := _KIND.fullmatch(path)) and not is_for_pictures(path)
        }
    # The errors of the Hub and of the connection to it are OSErrors.
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{name} cannot be fetched from the Hugging Face Hub: {reason[0] if reason else error!r}"
        ) from error
    if kind is None and not there:
        return folder
    has = f"has no GGUF of kind {kind}" if kind else "has GGUF files only"
    raise ConfigError(
        f"{repository} on the Hugging Face Hub {has}; name one as in {repository}:Q4_K_M, of these: "
        f"{', '.join(sorted(there)) or 'none'}"
    )


def _patterns(kind: str) -> list[str]:
    """The names that the GGUF of a kind may have on the Hub, in any case, with its parts."""
    any_case = "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in kind)
    endings = (".gguf", "-?????-of-?????.gguf")
    return [before + any_case + ending for before in ("*[-._/]", "") for ending in endings]


def _is_of_kind(path: Path, kind: str | None) -> bool:
    ending = r"(-\d{5}-of-\d{5})?\.gguf"
    return kind is not None and bool(re.fullmatch(f"(.*[-._])?{kind}{ending}", path.name, re.IGNORECASE))


def _ggufs_below(folder: Path) -> list[Path]:
    """The GGUF models in a snapshot of the Hub's and in the folders of it."""
    return [*itertools.chain(*map(ggufs_in, (folder, *_folders(folder))))]


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return Path()


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder that are not hidden; none where it cannot be read."""
    try:
        entries = sorted(parent.iterdir())[:_MAX_FOLDERS]
    except OSError:
        return []
    return [entry for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry)]


def _snapshots(repository: Path) -> list[Path]:
    """A repository's snapshots, that of its main branch first, then the newest."""
    try:
        main = (repository / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    folders = _folders(repository / "snapshots")
    return sorted(folders, key=lambda folder: (folder.name != main, -folder.stat().st_mtime))


def _is_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        has_weights = any(folder.glob("*.safetensors"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES and has_weights
