"""Small tokenizers in the shape of each family, made and run by the library `tokenizers`.

Each is trained on the hard lines themselves. Byte-level ones differ in their pre-tokenizer, those in the
manner of sentencepiece in where spaces become signs.
"""

# ruff: noqa: RUF001 (characters that look alike are wanted here)

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hard_texts import hard_lines
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END|"
)
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
]
_DEEPSEEK_CODER = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"]
_DEEPSEEK_LLM = [
    "[\r\n]",
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
]


def _splits(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _level(regex: bool = False, prefix: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def _rows(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def _byte_levels() -> dict[str, tuple[Any, Any]]:
    """The normalizer and the pre-tokenizer of each byte-level family."""
    split = pre_tokenizers.Split
    digits = pre_tokenizers.Digits
    return {
        "gpt2": (None, _level(regex=True)),
        "gpt2_prefix": (None, _level(regex=True, prefix=True)),
        "llama3": (None, _rows(*_splits(_LLAMA3), _level())),
        "qwen2": (normalizers.NFC(), _rows(*_splits(_LLAMA3.replace("{1,3}", "")), _level())),
        "qwen35": (
            normalizers.NFC(),
            _rows(*_splits(_LLAMA3.replace("{1,3}", "").replace(r"\p{L}+", r"[\p{L}\p{M}]+")), _level()),
        ),
        "smollm": (None, _rows(digits(individual_digits=True), _level(regex=True))),
        "deepseek3": (None, _rows(*_splits(*_DEEPSEEK3), _level())),
        "deepseek_coder": (None, _rows(*_splits(*_DEEPSEEK_CODER), digits(individual_digits=True), _level())),
        "deepseek_llm": (None, _rows(*_splits(*_DEEPSEEK_LLM), digits(individual_digits=True), _level())),
        "tekken": (None, _rows(*_splits(_CASED.replace("END", "") + r"\p{N}" + _TAIL), _level())),
        "gpt4o": (
            None,
            _rows(
                *_splits(_CASED.replace("END", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _TAIL),
                _level(),
            ),
        ),
        "falcon": (
            None,
            _rows(
                pre_tokenizers.Punctuation("contiguous"),
                _level(regex=True),
                digits(individual_digits=False),
                split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ),
        ),
        "bloom": (None, _rows(split(Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), "isolated"), _level())),
        "behaviors": (
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
            _rows(
                split("-", "merged_with_previous"),
                split(Regex("[.!]"), "merged_with_next"),
                split(Regex("[a-e]"), "contiguous", invert=True),
                split("=", "removed"),
                pre_tokenizers.Punctuation(),
                _level(regex=True, prefix=True),
            ),
        ),
        "folded": (
            normalizers.Sequence(
                [
                    normalizers.NFKC(),
                    normalizers.Lowercase(),
                    normalizers.Strip(),
                    normalizers.Replace(Regex(r"\s+"), " "),
                ]
            ),
            _level(regex=True),
        ),
    }


def _legacy(*, prepend: bool) -> Any:
    replace = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace


def _spaced() -> dict[str, tuple[Any, Any, Any]]:
    """Of each family in the manner of sentencepiece the normalizer, the pre-tokenizer, and the training's."""
    meta = pre_tokenizers.Metaspace
    return {
        "llama2": (_legacy(prepend=True), None, meta()),
        "llama2_across": (_legacy(prepend=True), None, None),
        "no_prefix": (_legacy(prepend=False), None, meta()),
        "metaspace_first": (None, meta(prepend_scheme="first", split=False), meta()),
        "metaspace_always": (None, meta(prepend_scheme="always", split=True), meta()),
        "metaspace_never": (None, meta(prepend_scheme="never", split=True), meta()),
        "gemma": (_legacy(prepend=False), pre_tokenizers.Split(" ", "merged_with_previous"), meta()),
        "unknown": (_legacy(prepend=True), None, meta()),
        "unknown_fused": (_legacy(prepend=True), None, meta()),
        "some_bytes": (_legacy(prepend=True), None, meta()),
    }


FAMILIES = (*_byte_levels(), *_spaced())

# Added tokens with every flag; in every second family they are matched in the normalized text.
ADDED = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<mask>",
    "<tool>",
    "word",
    "xé ",
    "<｜end▁of▁x｜>",
)


def _added(normalized: bool) -> list[AddedToken]:
    def token(text: str, special: bool = False, **flags: bool) -> AddedToken:
        return AddedToken(text, special=special, normalized=flags.pop("normalized", False), **flags)

    return [
        token(ADDED[0], special=True),
        token(ADDED[1], special=True, rstrip=True),
        token(ADDED[2]),
        token(ADDED[3], normalized=normalized),
        token(ADDED[4], lstrip=True, rstrip=normalized),
        token(ADDED[5], special=True, lstrip=True, normalized=normalized),
        token(ADDED[6], single_word=True, normalized=normalized),
        token(ADDED[7], single_word=normalized, normalized=normalized),
        token(ADDED[8], special=True),
    ]


def _content(tokenizer: Tokenizer, **model: Any) -> dict[str, Any]:
    content = json.loads(tokenizer.to_str())
    content["model"].update(model)
    return content


def build(family: str, vocab_size: int, lines: Iterable[str]) -> dict[str, Any]:
    """The tokenizer.json of a family, trained on `lines`."""
    number = FAMILIES.index(family)
    if family in _byte_levels():
        normalizer, pre_tokenizer = _byte_levels()[family]
        trained_with, first = pre_tokenizer, []
        tokenizer = Tokenizer(models.BPE())
        alphabet = [] if family == "smollm" else pre_tokenizers.ByteLevel.alphabet()
        decoder: Any = decoders.ByteLevel()
    else:
        normalizer, pre_tokenizer, trained_with = _spaced()[family]
        alphabet, first = [], ["<unk>", "<s>", "</s>"]
        if not family.startswith("unknown"):
            first += [f"<0x{byte:02X}>" for byte in range(256) if family != "some_bytes" or byte % 3]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        signs = decoders.Replace("▁", " ")
        strip = [decoders.Strip(" ", 1, 0)] if family not in ("no_prefix", "gemma") else []
        decoder = decoders.Sequence([signs, decoders.ByteFallback(), decoders.Fuse(), *strip])
        if family.startswith("metaspace"):
            scheme = family.partition("_")[2]
            metaspace = decoders.Metaspace(prepend_scheme=scheme)
            decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    tokenizer.normalizer = normalizer
    if trained_with is not None:
        tokenizer.pre_tokenizer = trained_with
    limit = {} if family in _byte_levels() else {"limit_alphabet": 120}
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=first,
            initial_alphabet=alphabet,
            show_progress=False,
            max_token_length=12,
            **limit,
        ),
    )
    if pre_tokenizer is None:
        content = json.loads(tokenizer.to_str())
        content["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(content))
    else:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_tokens(_added(normalized=number % 2 == 1))
    if number % 3 != 2:
        bos = "<|im_start|>" if family in _byte_levels() else "<s>"
        end = f" {ADDED[8]}" if number % 3 == 1 else ""
        names = [bos, ADDED[8]]
        template = processors.TemplateProcessing(
            f"{bos} $A{end}", special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    content = _content(
        tokenizer,
        byte_fallback=family in _spaced() and not family.startswith("unknown"),
        fuse_unk=family in ("llama2", "unknown_fused"),
        ignore_merges=family in ("llama3", "tekken"),
    )
    for token in content["added_tokens"]:
        if token["content"].startswith("<0x"):
            token["special"] = False
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    if number % 2:  # as they were written for years
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    return content


def family(name: str, vocab_size: int = 1200, n_lines: int = 3000) -> dict[str, Any]:
    """The tokenizer.json of a family, trained on the hard lines of one seed."""
    return build(name, vocab_size, hard_lines(n_lines, seed=1))


def expected(content: Mapping[str, Any], specials: bool) -> Tokenizer:
    """The tokenizer that `tokenizers` makes of a tokenizer.json. `specials`: their names become them."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = not specials
    return tokenizer
