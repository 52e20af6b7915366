"""Makes tests/fixtures/smollm2.json: what transformers answers with SmolLM2's dequantized weights.

    python tools/make_real_fixtures.py .venv/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Development only: needs torch, transformers 5, accelerate and gguf. Answers are greedy, in float32. Questions
where a token leads the next best one by little are left out: there the last bits decide.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_OUT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "smollm2.json"
_QUESTIONS = [
    "What is the capital of France?",
    "What is 2 + 2?",
    "Name three colors.",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "What is the opposite of hot?",
    "Translate 'good morning' into Spanish.",
    "What do bees make?",
    "Write a short poem about the sea.",
    "What is the largest planet?",
    "Give me a recipe for pancakes.",
    "How do I print hello in Python?",
    "What is water made of?",
    "In which year did the Second World War end?",
    "Tell me a joke.",
    "What is the tallest mountain on Earth?",
]
_CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Bonjour, ça va? 1234567 times\n\n\tyes"},
        {"role": "assistant", "content": "  Très bien 😀 — and you?"},
        {"role": "user", "content": "日本語もできますか。"},
    ],
]
_N_QUESTIONS, _N_TOKENS, _LEAD = 10, 24, 0.02


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def prompt(messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def answer(ids: list[int]) -> tuple[list[int], float]:
        new: list[int] = []
        lead = float("inf")
        while len(new) < _N_TOKENS and (not new or new[-1] != model.config.eos_token_id):
            with torch.inference_mode():
                scores = model(torch.tensor([ids + new])).logits[0, -1]
            best = scores.topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            new.append(int(best.indices[0]))
        return new, lead

    answers: list[dict[str, Any]] = []
    for question in _QUESTIONS:
        ids = prompt([{"role": "user", "content": question}])
        new, lead = answer(ids)
        print(f"{lead:.3f} {question} {tokenizer.decode(new)!r}")
        if lead >= _LEAD and len(answers) < _N_QUESTIONS:
            text = tokenizer.decode([i for i in new if i != model.config.eos_token_id])
            answers.append({"question": question, "prompt": ids, "ids": new, "text": text})
    assert len(answers) == _N_QUESTIONS
    prompts = [{"messages": messages, "prompt": prompt(messages)} for messages in _CONVERSATIONS]
    value = {"answers": answers, "conversations": prompts, "length": _N_TOKENS}
    _OUT.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
