"""A model as memory-mapped tensors, opened in the time that its headers take: a folder or a GGUF.

Of a folder, `config.json` (and `generation_config.json`) say what the model is; its weights are in
`model.safetensors`, or in the shards that `model.safetensors.index.json` names. A GGUF has all in its header
(`gguf_tensors`). Nothing is converted, copied or read ahead.
"""

import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.config.hugging_face import config_of_folder
from tpilite.config.llama import LlamaConfig
from tpilite.dtypes import block_size
from tpilite.errors import CheckpointError
from tpilite.formats.json_file import read_json
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.safetensors import TensorFile
from tpilite.formats.stored import StoredFile, StoredTensor
from tpilite.quantize.recipe import Quantized, Recipe
from tpilite.weights import gguf_tensors
from tpilite.weights.content import CONTENT_NAME, content_hash
from tpilite.weights.partition import EMBEDDING, LM_HEAD, Partition, tensor_shapes
from tpilite.weights.trust import KnownHashes

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_INNER = "model."  # what Hugging Face's names have before those of LlamaModel itself
# A classifier's, a reward model's and the like, as transformers and TRL name them.
_OTHER_HEAD = re.compile(r"(^|\.)(score|classifier|qa_outputs|regression\w*|\w*_head|head)\.")

# Of each tensor's first, middle and last bytes, in `sampled_fingerprint`.
_SAMPLE_BYTES = 2048


class Checkpoint(Closing):
    """A model by its files, or by the path that leads to them (see `ModelFiles.find`).

    Raises `CheckpointError` or `ConfigError` when it cannot be used.

    `tensors` has every tensor of the architecture by Hugging Face's name, its shape checked against
    `config`, whatever the files have before these names. Where they have no `lm_head.weight`, it is the
    embedding's own `StoredTensor`. What else they hold is ignored.

    With a `recipe`, its matrices are in blocks that are made as they are read, for slices and files.

    The hash of its weights is kept in the folder `notes`, if there is one to be, and trusted from there.
    """

    def __init__(
        self,
        model: ModelFiles | Path,
        notes: Path | None = None,
        *,
        trust: bool = True,
        recipe: Recipe | None = None,
    ) -> None:
        self.files = model if isinstance(model, ModelFiles) else ModelFiles.find(model)
        self.path = self.files.path
        self._known = None if notes is None else KnownHashes(notes / CONTENT_NAME, trust=trust)
        self._open_files: dict[str, StoredFile] = {}
        try:
            config, found = self._of_gguf() if self.files.gguf_paths else self._of_folder()
            # The file's own head counts, whatever the flag says (merged adapters are published so); and some
            # published folders leave lm_head out without saying that it is tied.
            self.config = replace(config, tie_word_embeddings=LM_HEAD not in found)
            self._stored: Mapping[str, StoredTensor] = {LM_HEAD: found[EMBEDDING]} | found
            _check_shapes(self.config, self._stored, "metadata" if self.files.gguf_paths else "config.json")
            self.recipe, self.tensors = recipe, self._stored
            if recipe is not None:
                self.tensors = recipe.applied(self._stored, (EMBEDDING, LM_HEAD))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files. Arrays that were handed out stay valid."""
        for file in self._open_files.values():
            file.close()

    @property
    def nbytes(self) -> int:
        """The bytes of all weights; a table that is used twice counts once."""
        return sum(tensor.nbytes for tensor in set(self.tensors.values()))

    def partition(self, world_size: int, ratio: Sequence[float] | None = None) -> Partition:
        """How the model is shared out to so many ranks, its blocks considered. Raises `ConfigError`."""
        down = [tensor for name, tensor in self.tensors.items() if name.endswith("down_proj.weight")]
        widest = max(block_size(tensor.dtype).n_weights for tensor in down)
        return Partition.of(self.config, world_size, ratio, ffn_block=widest)

    @property
    def fingerprint(self) -> str:
        """A hash that tells this model from any other, quantized as it is. It takes what `origin` takes."""
        return self.origin if self.recipe is None else self.recipe.identity(self.origin)

    @property
    def quantized(self) -> Quantized | None:
        """What became of the weights by the recipe, if there is one."""
        return None if self.recipe is None else self.recipe.described(self.origin, self.tensors)

    @functools.cached_property
    def origin(self) -> str:
        """A hash of the model in its files: of its configuration and of every byte of its weights.

        It takes a reading of all weights where it is not known, so who needs no slices does not ask for it.
        """
        digest = self._config_hash()
        digest.update(content_hash(self.path, self._open_files.values(), self._stored, self._known).encode())
        return digest.hexdigest()

    @functools.cached_property
    def sampled_fingerprint(self) -> str:
        """The fingerprint that slices of earlier versions bear: of a few KiB of each tensor."""
        digest = self._config_hash()
        for name, tensor in self._stored.items():
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            n_bytes = min(_SAMPLE_BYTES, tensor.nbytes)
            for start in (0, (tensor.nbytes - n_bytes) // 2, tensor.nbytes - n_bytes):
                digest.update(tensor.bytes_at(start, n_bytes))
        return digest.hexdigest()

    def _config_hash(self) -> "hashlib._Hash":
        return hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())

    def _of_gguf(self) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
        """The configuration and the tensors of a GGUF."""
        parts = self.files.open_gguf()
        self._open_files = {part.path.name: part for part in parts}
        stored = gguf_tensors.stored_in(parts)
        config = gguf_tensors.config_of(parts, stored)
        return config, gguf_tensors.tensors_of(self.files, config, stored)

    def _of_folder(self) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
        """The configuration and the tensors of a folder."""
        if not self.path.is_dir():
            found = "is not a folder" if self.path.exists() else "does not exist"
            raise CheckpointError(
                f"{self.path} {found}; expected a model folder with config.json, or a GGUF file"
            )
        config = config_of_folder(self.path)
        return config, self._find(config)

    def _find(self, config: LlamaConfig) -> dict[str, StoredTensor]:
        """What the files hold of the architecture; of the shards, those that hold something of it are opened.

        Raises `CheckpointError` where anything but lm_head is missing, or a shard holds not what it should.
        """
        weight_map = self._weight_map()
        names = _names_in_files(config, weight_map)
        _check_head(self.path, names[LM_HEAD], weight_map)
        found = {}
        for name, shape in tensor_shapes(config).items():
            stored_name = names[name]
            shard = weight_map.get(stored_name)
            if shard is None and name == LM_HEAD:
                continue
            if shard is None:
                raise CheckpointError(
                    f"{self.path} has no tensor {stored_name}, which its config.json implies "
                    f"(expected shape {list(shape)}); download the missing files"
                )
            _check_file_name(shard, self.path / _INDEX)
            file = self._open(shard)
            if stored_name not in file.tensors:
                raise CheckpointError(
                    f"{file.path} does not hold {stored_name}, which {_INDEX} expects there; "
                    "download both again"
                )
            found[name] = file.tensors[stored_name]
        return found

    def _weight_map(self) -> dict[str, Any]:
        """Which file holds which tensor, by the names that these have there."""
        if (self.path / _SINGLE).exists():
            return dict.fromkeys(self._open(_SINGLE).tensors, _SINGLE)
        if not (self.path / _INDEX).exists():
            raise _no_weights(self.path)
        weight_map = read_json(self.path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{self.path / _INDEX} has no weight_map; download it again")
        return weight_map

    def _open(self, name: str) -> StoredFile:
        if name not in self._open_files:
            self._open_files[name] = TensorFile(self.path / name)
        return self._open_files[name]


def _names_in_files(config: LlamaConfig, stored: Collection[str]) -> dict[str, str]:
    """The tensors of the architecture: Hugging Face's name to the one in the files.

    The layers may stand behind nothing, as a LlamaModel saves itself, or `language_model.` or what else
    wrapped the model. What has an embedding is the language model; of several, the most complete one.
    """
    anchor = EMBEDDING.removeprefix(_INNER)
    prefixes = [name.removesuffix(anchor) for name in stored if name.endswith(anchor)]
    named = [_prefixed(config, prefix, stored) for prefix in prefixes if f".{prefix}".endswith(".")]
    usual = _prefixed(config, _INNER, stored)
    return max([usual, *named], key=lambda names: sum(name in stored for name in names.values()))


def _prefixed(config: LlamaConfig, prefix: str, stored: Collection[str]) -> dict[str, str]:
    """The names where `prefix` stands for `model.`; lm_head stands behind the prefix or a part of it."""
    parts = prefix.split(".")[:-1]
    heads = [".".join([*parts[:n], LM_HEAD]) for n in range(len(parts), -1, -1)]
    names = {name: prefix + name.removeprefix(_INNER) for name in tensor_shapes(config)}
    return names | {LM_HEAD: next((head for head in heads if head in stored), LM_HEAD)}


def _check_head(folder: Path, lm_head: str, stored: Collection[str]) -> None:
    """Raises `CheckpointError` for a model that ends in something else than scores of tokens."""
    if lm_head in stored:
        return
    other = next((name for name in stored if _OTHER_HEAD.search(name)), None)
    if other is not None:
        raise CheckpointError(
            f"{folder} holds a model with another head than a language model's: it has {other} and no "
            f"{LM_HEAD}; use the folder of a LlamaForCausalLM"
        )
    config = read_json(folder / "config.json")
    if config.get("architectures") == ["LlamaModel"] and config.get("tie_word_embeddings") is not True:
        raise CheckpointError(
            f"{folder} holds a LlamaModel without a head: it has no {LM_HEAD}, and its config.json does not "
            "say tie_word_embeddings; use the folder of a LlamaForCausalLM"
        )


def _check_shapes(config: LlamaConfig, tensors: Mapping[str, StoredTensor], said_by: str) -> None:
    """Raises `CheckpointError` where a tensor is of another shape, or of a dtype that is not supported."""
    for name, shape in tensor_shapes(config).items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file.path}: {tensor.name} has shape {list(tensor.shape)}, but {said_by} implies "
                f"{list(shape)}; the weights and the {said_by} must be of the same model"
            )
        tensor.check_supported()


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
