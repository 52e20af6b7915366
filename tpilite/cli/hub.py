"""Models that others brought: those on this machine, and those of the Hugging Face Hub by their names."""

import json
import os
import re
from pathlib import Path

from tpilite.errors import ConfigError
from tpilite.formats.model_files import ModelFiles

_CACHE = "~/.cache/huggingface/hub"
_MAX_FOLDERS = 2000  # looked into, so that a start in a huge folder stays a start
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
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
    """The Llama models in Hugging Face's cache, in the current folder and in the folders of it, by name."""
    current = current or _current_folder()
    found = {
        folder.resolve(): (str(folder.relative_to(current)), folder)
        for folder in (current, *_folders(current))
        if _is_llama(folder)
    }
    # Other than a Path's, this one leaves the name as it is for a user without a home.
    for repository in _folders(cache or Path(os.path.expanduser(_CACHE))):
        if repository.name.startswith("models--"):
            folder = next(filter(_is_llama, _snapshots(repository)), None)
            if folder is not None:
                found.setdefault(folder.resolve(), (model_name(folder), folder))
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
    """Whether this is how a model on the Hub is called, "owner/name", and no folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def resolve(name: str) -> Path:
    """The folder of the model that the Hub has under this name, downloaded where it is not here.

    What was cut off goes on where it ended. Raises `ConfigError` without huggingface_hub (the `hub` extra)
    and where the Hub refuses or does not answer.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ConfigError(
            f"{name} is no folder here; to fetch it from the Hugging Face Hub: pip install 'tpilite[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    # The errors of the Hub and of the connection to it are OSErrors.
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{name} cannot be fetched from the Hugging Face Hub: {reason[0] if reason else error!r}"
        ) from error


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


def _is_llama(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        has_weights = any(folder.glob("*.safetensors"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "llama" and has_weights
