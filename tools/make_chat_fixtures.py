"""Makes tests/fixtures/chat.json and tests/fixtures/tokenizer: what transformers and tokenizers compute.

    python tools/make_chat_fixtures.py TOKENIZERS

Development only: needs transformers 5. TOKENIZERS holds the published llama2/tokenizer.model and
llama3/tokenizer.model. chat.json has the chat templates (of 3.1 and 3.2 what they do without tools) and, for
each conversation, the text that they give and its ids in the real tokenizer. The folder tokenizer is a
byte-level BPE in the manner of Llama 3, trained here: as tiktoken ranks, as tokenizer.json, and the ids of
some texts.
"""

import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode, generate_merges

_FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_DATED = """{{- bos_token }}
{%- if not date_string is defined %}
DATE
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_FIXED_DATE = '    {%- set date_string = "26 Jul 2024" %}'
_CLOCK = '    {%- set date_string = strftime_now("%d %b %Y") %}'
TEMPLATES = {
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "llama3.1": _DATED.replace("DATE", _FIXED_DATE),
    "llama3.2": _DATED.replace("DATE", _CLOCK),
}

_QUESTION = {"role": "user", "content": "  Where does the river end?\n"}
_SYSTEM = {"role": "system", "content": " You are brief.\n\nAlways. "}
_ANSWER = {"role": "assistant", "content": " In the sea, of course: größer als der See 🌊. "}
_AGAIN = {"role": "user", "content": "\tdef f(x):\n\t\treturn x  # 12345\n\nAnd this?"}
CONVERSATIONS = [
    [_QUESTION],
    [_SYSTEM, _QUESTION],
    [_QUESTION, _ANSWER, _AGAIN],
    [_SYSTEM, _QUESTION, _ANSWER, _AGAIN, {"role": "assistant", "content": "Yes"}, _QUESTION],
    [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
]

_CORPUS = (
    "The fox and the hare went to the river. \"Where does it end?\" asked the hare. It's a long way, I'll "
    "tell you: 12345 steps, then 100 more!\n\nThey'd walked for days; they didn't stop.\n  - one\n  - two\n"
    "Größe, naïve café, 日本語の本, привет мир, 🌊🌊.\n\tdef walk(steps):\n\t\treturn steps + 1\n"
)
TEXTS = [
    _CORPUS,
    "",
    " ",
    "   \n\n  x",
    "I'LL DON'T 1234567 3.14",
    "<|eot_id|>x<|begin_of_text|>",
    "🌊 мир 語\u0000\u00a0\u3000\r\n",
    "aaaa    aaaa",
]


def main() -> None:
    real = Path(sys.argv[1])
    small = _FIXTURES / "tokenizer"
    small.mkdir(parents=True, exist_ok=True)
    llama2 = _llama2(real / "llama2" / "tokenizer.model")
    llama3 = _fast(real / "llama3" / "tokenizer.model", _llama3_specials())
    cases: list[dict[str, Any]] = []
    for name, template in TEMPLATES.items():
        tokenizer = llama2 if name == "llama2" else llama3
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True}
        if name == "llama3.2":
            options["date_string"] = "01 Feb 2025"
        for messages in CONVERSATIONS:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
            cases.append({"template": name, "messages": messages, "text": text, "ids": ids})
    _write(_FIXTURES / "chat.json", {"templates": TEMPLATES, "cases": cases})

    ranks = _train_ranks()
    model = small / "tokenizer.model"
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    model.write_text("".join(lines), encoding="ascii")
    fast = _fast(model, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        saved = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    _write(small / "tokenizer.json", saved)
    plain = fast.backend_tokenizer
    plain.encode_special_tokens = True  # text stays text
    _write(
        small / "expected.json", [[text, plain.encode(text, add_special_tokens=False).ids] for text in TEXTS]
    )


def _llama3_specials() -> list[str]:
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    return [f"<|{named.get(i) or next(reserved)}|>" for i in range(256)]


def _llama2(model: Path) -> PreTrainedTokenizerFast:
    """Llama 2's tokenizer as its published tokenizer.json describes it: merges by score.

    The conversion that transformers 5 makes on loading orders them by id, which sentencepiece does not: two
    spaces before a word come out otherwise.
    """
    processor = SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: processor.get_score(i) for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores, skip_tokens=["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _fast(ranks: Path, specials: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = TikTokenConverter(str(ranks), pattern=_PATTERN, extra_special_tokens=specials).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def _train_ranks() -> dict[bytes, int]:
    """Byte-level BPE ranks: the 256 bytes, then what training on the corpus merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_CORPUS], trainer)
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(to_byte[c] for c in token): rank for rank, (token, _) in enumerate(by_id)}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
