"""Where a model is: a folder as Hugging Face makes them, or a GGUF file, whole or in parts.

A user names a folder, a GGUF file, the first part of one, or a folder that holds exactly one GGUF. What is in
the files has no meaning here.
"""

import functools
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError
from tpilite.formats.gguf import GgufFile, GgufMetadata, is_gguf
from tpilite.formats.json_file import read_json

_SUFFIX = ".gguf"
_PART = re.compile(r"(?P<name>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model. `path` names it in messages: a folder, or a GGUF's file, of parts the first."""

    path: Path
    gguf_paths: tuple[Path, ...] = ()  # of a GGUF, in the order of its parts

    @classmethod
    def find(cls, path: Path) -> "ModelFiles":
        """The model that a user names by a path. Raises `CheckpointError` where that is none, or several.

        A folder is taken as it is, whatever it lacks, where it holds no GGUF or safetensors as well.
        """
        if path.is_file():
            if path.suffix != _SUFFIX and not is_gguf(path):
                raise CheckpointError(f"{path} is not a folder and no GGUF file; expected one of them")
            return cls(path, _parts(path))
        found = [] if any(path.glob("*.safetensors")) else ggufs_in(path)
        if len(found) > 1:
            names = ", ".join(gguf.name for gguf in found)
            raise CheckpointError(f"{path} holds several GGUF models: {names}; give the path of one of them")
        return cls(found[0], _parts(found[0])) if found else cls(path)

    @property
    def folder(self) -> Path:
        """The folder that the files are in."""
        return self.path.parent if self.gguf_paths else self.path

    @property
    def name(self) -> str:
        """What to call the model by its files: the folder's name, or the GGUF's without its ending."""
        if not self.gguf_paths:
            return self.path.absolute().name
        part = _PART.fullmatch(self.path.name)
        return part["name"] if part else self.path.stem

    @property
    def has_weights(self) -> bool:
        """Whether there are weights, and not only what describes them."""
        return bool(self.gguf_paths) or any(self.path.glob("*.safetensors"))

    @functools.cached_property
    def gguf(self) -> GgufMetadata | None:
        """What a GGUF says of its model, None for a folder. Raises `CheckpointError`."""
        if not self.gguf_paths:
            return None
        with GgufFile(self.gguf_paths[0]) as file:
            return file.metadata

    def open_gguf(self) -> list[GgufFile]:
        """All parts of a GGUF, open. Raises `CheckpointError` where they do not belong together."""
        with ExitStack() as opened:
            parts = [opened.enter_context(GgufFile(path)) for path in self.gguf_paths]
            for number, part in enumerate(parts):
                _check_number(part, number, len(parts))
            opened.pop_all()
        vars(self).setdefault("gguf", parts[0].metadata)  # to read a vocabulary once
        return parts

    def json(self, name: str) -> Mapping[str, Any] | None:
        """The object in a JSON file of the folder; None where there is none. A GGUF has none of them."""
        path = self.path / name
        return read_json(path) if not self.gguf_paths and path.exists() else None


def ggufs_in(folder: Path) -> list[Path]:
    """The GGUF models in a folder, of parts the first, whether it is there or not.

    Where some begin as GGUF does, others are left out; so is what gives a model its eyes.
    """
    try:
        found = [path for path in folder.iterdir() if path.suffix == _SUFFIX]
    except OSError:
        return []
    firsts = sorted({_first(path) for path in found if not is_for_pictures(path.name)})
    return [*filter(is_gguf, firsts)] or firsts


def is_for_pictures(name: str) -> bool:
    """Whether a GGUF is no language model, but what gives one its eyes."""
    return name.rpartition("/")[2].startswith("mmproj")


def _first(path: Path) -> Path:
    """The first part of the model that a file belongs to, which may be the file itself."""
    part = _PART.fullmatch(path.name)
    return path.with_name(f"{part['name']}-00001-of-{part['count']}{_SUFFIX}") if part else path


def _check_number(part: GgufFile, number: int, count: int) -> None:
    """Raises `CheckpointError` where a part says that it is another than by its name. Some say nothing."""
    found = tuple(part.metadata.get(key, 0) for key in ("split.no", "split.count"))
    if set(map(type, found)) != {int} or (count > 1 and found not in ((number, count), (0, 0))):
        raise CheckpointError(
            f"{part.path} has split.no = {found[0]!r:.20} and split.count = {found[1]!r:.20}; "
            f"expected {number} and {count} by its name: download it again"
        )


def _parts(path: Path) -> tuple[Path, ...]:
    """All parts of the model whose first is `path`, which may be the only one."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    count = int(part["count"])
    if int(part["number"]) != 1:
        raise CheckpointError(
            f"{path} is not the first part of its model; give the path of {_first(path).name}"
        )
    paths = tuple(
        path.with_name(f"{part['name']}-{number:05}-of-{part['count']}{_SUFFIX}")
        for number in range(1, count + 1)
    )
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} has {count - len(missing)} of {count} parts of a GGUF model and lacks "
            f"{missing[0]}; download the missing parts into the same folder"
        )
    return paths
