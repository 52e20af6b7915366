"""Make the model that ships with tpilite, from nothing but a seed.

    python tools/fable/make.py --out DIR

writes stories.txt (the training text) and the folder DIR/model: tokenizer.model, model.safetensors and the
JSON files beside them, in Hugging Face's format. Development only: it needs what requirements.txt names.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from grammar import stories
from safetensors.torch import save_file
from train import train

logger = logging.getLogger(__name__)

SEED = 1
N_STEPS = 4400
STORIES_PER_STEP = 13  # a batch takes some 12, and no story is told twice
N_TOKENIZER_STORIES = 10_000
ASCII = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.06,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1280,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 512,
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 512,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}


def make_text(path: Path, n_stories: int) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{story}\n" for story in itertools.islice(stories(SEED), n_stories))


def make_tokenizer(text: Path, path: Path) -> None:
    """A byte-pair vocabulary in the order of Llama 2: <unk>, <s>, </s>, the 256 bytes, then the pieces.

    Every ASCII character has a piece, so that the user's words are spelled in letters, not in bytes.
    """
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(_lines(text), N_TOKENIZER_STORIES),
            model_writer=model,  # writing to a file would put its path into the model
            model_type="bpe",
            vocab_size=CONFIG["vocab_size"],
            byte_fallback=True,
            character_coverage=1.0,
            required_chars=ASCII,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=1,
        )


def encode(text: Path, tokenizer: Path) -> Iterator[list[int]]:
    """The ids of each story, from BOS to EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for line in _lines(text):
        yield processor.encode(line, add_bos=True, add_eos=True)


def make_model(out: Path, n_steps: int) -> None:
    """Fill the folder `out`: the text, and the model in `out/model`."""
    text, model = out / "stories.txt", out / "model"
    model.mkdir(parents=True, exist_ok=True)
    make_text(text, max(N_TOKENIZER_STORIES, n_steps * STORIES_PER_STEP))
    make_tokenizer(text, model / "tokenizer.model")
    logger.info("%9d %s", text.stat().st_size, text.name)
    weights = train(CONFIG, encode(text, model / "tokenizer.model"), n_steps, SEED)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors").chmod(0o644)
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (model / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in sorted(model.iterdir()):
        logger.info("%9d %s", file.stat().st_size, file.name)


def _lines(text: Path) -> Iterator[str]:
    with text.open(encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model that ships with tpilite.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--steps", type=int, default=N_STEPS, help="how many batches to learn from")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_model(options.out, options.steps)


if __name__ == "__main__":
    main()
