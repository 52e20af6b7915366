"""A sequence's next token: what its row is asked for, and the choice among what the ranks report."""

import math
from collections.abc import Callable

from tpilite.arrays import Array
from tpilite.engine.sampling import N_CANDIDATES, Candidates, best, choose, edits_for
from tpilite.engine.sequence import Sequence, TokenLogprob
from tpilite.engine.step import Wanted


def wanted_of(sequence: Sequence, row: int) -> Wanted:
    """What the ranks are to report of the scores in `row`, those of the sequence's newest token."""
    params = sequence.params
    edits = edits_for(params, sequence.prompt_ids, sequence.new_ids)
    n = 1 if params.temperature == 0 else max(N_CANDIDATES, params.k)
    return Wanted(row, n, params.temperature, edits)


def next_token(sequence: Sequence, candidates: Candidates, scores: Callable[[], Array]) -> int:
    """The id of the sequence's next token, whose log-probability is noted where it is asked for.

    `scores` fetches the row of all scores [V], which takes longer than the candidates did.
    """
    params, position = sequence.params, sequence.n_tokens
    token_id = choose(candidates, params, sequence.seed, position)
    if token_id is None or params.logprobs is not None:
        logits = scores()
        edits = edits_for(params, sequence.prompt_ids, sequence.new_ids)
        edited = logits if edits is None else edits.apply(logits, 0)
        everything = best(edited, 0, len(edited), params.temperature)
        token_id = choose(everything, params, sequence.seed, position)
        assert token_id is not None, "among all tokens one can be chosen"
        if params.logprobs is not None:
            sequence.logprobs.append(_logprob(logits, token_id, params.logprobs))
    return token_id


def _logprob(logits: Array, token_id: int, n_top: int) -> TokenLogprob:
    """The model's own log-probabilities (temperature 1, unedited) of a token and of the likeliest ones."""
    top = best(logits, 0, max(n_top, 1), 1.0)
    likeliest = tuple(
        (int(i), float(score) - top.log_sum_exp)
        for i, score in zip(top.ids[:n_top], top.logits[:n_top], strict=True)
    )
    logprob = float(logits[token_id]) - top.log_sum_exp
    return TokenLogprob(token_id, logprob if math.isfinite(logprob) else -9999.0, likeliest)
