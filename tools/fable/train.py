"""The weights of the model that ships with tpilite: a small Llama, trained on one thread of a CPU."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

logger = logging.getLogger(__name__)

ROW_TOKENS = 384  # two or three stories
BATCH_ROWS = 4
PEAK_RATE = 6e-3
WARM_UP_STEPS = 60


def train(
    config: dict[str, Any], documents: Iterable[list[int]], n_steps: int, seed: int
) -> dict[str, torch.Tensor]:
    """The trained weights in bfloat16, by Hugging Face's names.

    `documents` are the stories' ids from BOS to EOS, enough of them for `n_steps` batches. One thread and
    deterministic kernels: the same machine and the same PyTorch give the same bytes again.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).float()
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    rows = _rows(documents)
    start, losses = time.monotonic(), []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, n_steps)
        batch = torch.tensor([next(rows) for _ in range(BATCH_ROWS)])
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            logger.info("step %d of %d, loss %.4f, %.0f s", step + 1, n_steps, mean, time.monotonic() - start)
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    return weights


def _rows(documents: Iterable[list[int]]) -> Iterator[list[int]]:
    """Rows of ROW_TOKENS + 1 ids that begin with a story, so that an id is learnt with its story before it.

    What does not fit is cut, not carried on.
    """
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) > ROW_TOKENS:
            yield row[: ROW_TOKENS + 1]
            row = []


def _rate(step: int, n_steps: int) -> float:
    """The learning rate: a linear warm-up, then half a cosine down to a hundredth."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, n_steps - WARM_UP_STEPS)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
