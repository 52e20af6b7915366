"""Makes tests/fixtures/added_tokens.json: the ids that transformers gives where tokens were added to a model.

    PYTHONPATH=tests python tools/make_added_token_fixtures.py

Development only: needs transformers 5 and protobuf. Each case has the files of a folder beside the
tokenizer.model of sentencepiece that is here too, and the ids of the same texts in each. tokenizer.json is
kept without its list of merges, which nothing reads where tokenizer.model is.
"""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizer_files import train
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer

_FIXTURE = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "added_tokens.json"

_SENTENCES = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox was not afraid of the water, and the water was not afraid of the fox.",
    "user and assistant and system walked and walked, 12 days, until they saw the big blue sea.",
] * 5
TEXTS = [
    "",
    "fox",
    " fox",
    "  fox\n the river ",
    "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n",
    "<s><|im_start|> the fox <|im_end|> <think>a river</think> the sea",
    "<think>fox",
    "the <tool>  fox  <mask>  river <|end|>   sea",
    "\u2581fox<|im_end|>\u2581fox",
    "</s></s>fox",
]
_SPECIAL = [AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
_WORDS = [AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")]
_STRIPPED = [
    AddedToken("<tool>", special=True, lstrip=True, normalized=False),
    AddedToken("<mask>", special=False, lstrip=True, rstrip=True, normalized=False),
    AddedToken("<|end|>", special=True, rstrip=True, normalized=False),
]


def _saved(model: bytes, folder: Path, **options: Any) -> None:
    """What transformers saves of a LlamaTokenizer with added tokens, tokenizer.model beside it."""
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = LlamaTokenizer.from_pretrained(folder, **options)
    tokenizer.add_tokens([*_SPECIAL, *_WORDS, *_STRIPPED])
    tokenizer.save_pretrained(folder)


def _as_it_is(folder: Path) -> None:
    """Lets tokenizer.json count as it is: a LlamaTokenizer makes its own of it, without `legacy`."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _from_json(model: bytes, folder: Path, normalizer: bool) -> None:
    """A tokenizer.json with the normalizer of older releases, or without, loaded as it is."""
    _saved(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = [{"type": "Prepend", "prepend": "\u2581"}] if normalizer else []
    content["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    _as_it_is(folder)


def _case(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {}
    for path in sorted(folder.glob("*.json")):
        files[path.name] = json.loads(path.read_text())
    files["tokenizer.json"]["model"]["merges"] = []
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    return {"name": folder.name, "files": files, "ids": ids}


def main() -> None:
    model = train(_SENTENCES, vocab_size=360)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for name in ("saved", "no_prefix_space", "legacy", "older_json", "json_without_prefix"):
            folders[name] = Path(temporary) / name
            folders[name].mkdir()
        _saved(model, folders["saved"])
        _saved(model, folders["no_prefix_space"], add_prefix_space=False)
        _saved(model, folders["legacy"], legacy=True)
        _as_it_is(folders["legacy"])
        _from_json(model, folders["older_json"], normalizer=True)
        _from_json(model, folders["json_without_prefix"], normalizer=False)
        cases = [_case(folder) for folder in folders.values()]
    encoded = base64.b64encode(model).decode()
    value = {"tokenizer.model": encoded, "texts": TEXTS, "cases": cases}
    _FIXTURE.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
