"""A Hugging Face model folder as memory-mapped tensors, opened in the time that its headers take.

`config.json` (and `generation_config.json`) say what the model is; its weights are in `model.safetensors`,
or in the shards that `model.safetensors.index.json` names. Nothing is converted, copied or read ahead.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.config import LlamaConfig, read_json
from tpilite.errors import CheckpointError
from tpilite.weights.partition import EMBEDDING, LM_HEAD, tensor_shapes
from tpilite.weights.tensor_file import StoredTensor, TensorFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# A fine-tune changes nearly every row of the matrices that it changes, but it may change only some of the
# matrices; so a little of each tensor is hashed, rather than much of some.
_SAMPLE_BYTES = 2048


class Checkpoint(Closing):
    """The model in a folder. Raises `CheckpointError` or `ConfigError` when it cannot be used.

    `tensors` has every tensor of the architecture by Hugging Face's name, its shape checked against
    `config`; with tied embeddings `lm_head.weight` is the embedding's own `StoredTensor`. What else the
    files hold is ignored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; expected a model folder with config.json")
        config = LlamaConfig.from_folder(folder)
        try:
            stored = self._open_files(config)
            # Some published folders leave lm_head out without saying that it is tied.
            config = replace(config, tie_word_embeddings=config.tie_word_embeddings or LM_HEAD not in stored)
            self.config = config
            self.tensors: Mapping[str, StoredTensor] = _checked(config, stored, folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files. Arrays that were handed out stay valid."""
        for file in self._files.values():
            file.close()

    @property
    def nbytes(self) -> int:
        """The bytes of all weights; a table that is used twice counts once."""
        return sum(t.nbytes for name, t in self.tensors.items() if t.name == name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that tells this model from others: of its configuration and of samples of every tensor.

        The first, middle and last two KiB of each tensor are read, so fine-tunes of one model differ. It
        does not depend on how the tensors are spread over files. It is no proof against someone who
        wants two models to look alike.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in self.tensors.items():
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            n_bytes = min(_SAMPLE_BYTES, tensor.nbytes)
            for start in (0, (tensor.nbytes - n_bytes) // 2, tensor.nbytes - n_bytes):
                digest.update(tensor.bytes_at(start, n_bytes))
        return digest.hexdigest()

    def _open_files(self, config: LlamaConfig) -> dict[str, StoredTensor]:
        """What the files hold, by name; of the shards, those that hold something of the architecture."""
        if (self.folder / _SINGLE).exists():
            return dict(self._open(_SINGLE).tensors)
        if not (self.folder / _INDEX).exists():
            raise _no_weights(self.folder)
        weight_map = read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{self.folder / _INDEX} has no weight_map; download it again")
        stored = {}
        for name in tensor_shapes(config):
            shard = weight_map.get(name)
            if shard is None:
                continue  # said by name, with what was expected, when all are checked
            _check_file_name(shard, self.folder / _INDEX)
            file = self._open(shard)
            if name not in file.tensors:
                raise CheckpointError(
                    f"{file.path} does not hold {name}, which {_INDEX} expects there; download both again"
                )
            stored[name] = file.tensors[name]
        return stored

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]


def _checked(
    config: LlamaConfig, stored: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Every tensor of the architecture. Raises `CheckpointError` where one is missing or of another shape."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensor = stored.get(EMBEDDING if name == LM_HEAD and config.tie_word_embeddings else name)
        if tensor is None:
            raise CheckpointError(
                f"{folder} has no tensor {name}, which its config.json implies "
                f"(expected shape {list(shape)}); download the missing files"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file.path}: {name} has shape {list(tensor.shape)}, but config.json implies "
                f"{list(shape)}; the weights and the config.json must be of the same model"
            )
        _ = tensor.stored_dtype
        tensors[name] = tensor
    return tensors


def _check_file_name(name: Any, index: Path) -> None:
    """The index is a downloaded file: its names must stay names within the folder."""
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or not name.isprintable()
        or any(part in name for part in ("/", "\\", ".."))
    ):
        raise CheckpointError(
            f"{index} names the shard {name!r:.80}; expected a plain file name such as "
            "model-00001-of-00002.safetensors; download it again"
        )


def _no_weights(folder: Path) -> CheckpointError:
    """What to tell about a folder without safetensors."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which is never read because it can run "
            f"code; expected {_SINGLE}: download the safetensors version, or save the model again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}; download the weights")
