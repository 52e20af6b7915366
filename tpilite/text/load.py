"""The tokenizer of a model: which of its files counts, and which kind that file is.

Four kinds: what a GGUF file holds, and in a folder, told apart by their content, a sentencepiece
`tokenizer.model` (Llama 2), a tiktoken `tokenizer.model` (Llama 3; also in `original/`), and a
`tokenizer.json` of byte-pair encoding where it stands alone. All become one `Tokenizer`: a table of each
id's bytes, the added tokens by name, and a function that encodes the rest. A new kind is a module of its own
and a choice here.
"""

from pathlib import Path

from tpilite.errors import CheckpointError
from tpilite.formats.json_file import read_json
from tpilite.formats.model_files import ModelFiles
from tpilite.text import sentencepiece_files, tiktoken_files
from tpilite.text.added_tokens import TokenizerSettings
from tpilite.text.gguf_vocab import from_gguf
from tpilite.text.json_files import from_json
from tpilite.text.tokenizer import Tokenizer


def load_tokenizer(files: ModelFiles, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model; None where its files hold none.

    Raises `CheckpointError` for damaged files, unsupported kinds, and ids beyond `vocab_size`.
    """
    if files.gguf is not None:
        return from_gguf(files.path, files.gguf, vocab_size)
    path = tokenizer_file(files.folder)
    if path is None:
        return None
    settings = TokenizerSettings.from_folder(files.folder)
    if path.suffix == ".json":
        return from_json(path, read_json(path), settings, vocab_size)
    raw = read_model_file(path)
    if tiktoken_files.is_tiktoken(raw):
        return tiktoken_files.from_tiktoken(path, raw, settings, vocab_size)
    return sentencepiece_files.from_sentencepiece(path, raw, settings, vocab_size)


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that holds its tokenizer; None where there is none."""
    names = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_model_file(path: Path) -> bytes:
    """A tokenizer.model, which does not say of which kind it is. Raises `CheckpointError`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if raw.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is only Git LFS's pointer to the tokenizer; run: git lfs pull")
    return raw
