"""Merging: both ways give the same, and what is no token goes where it must."""

import random
from itertools import pairwise

import pytest

from tpilite.text import bpe
from tpilite.text.bpe import BytePairs, spaced_words


def random_pairs(seed: int, n_merges: int = 40) -> BytePairs:
    """Merges of random tokens, some of which come before those that make their parts."""
    rng = random.Random(seed)
    tokens, merges = list("abc"), []
    for _ in range(n_merges):
        left, right = rng.choice(tokens), rng.choice(tokens)
        merges.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
    rng.shuffle(merges)
    return BytePairs(
        {token: i for i, token in enumerate(tokens)}, {merge: i for i, merge in enumerate(merges)}
    )


def merged_slowly(pairs: BytePairs, symbols: list[str]) -> list[str]:
    """The definition: the merge of the lowest rank, at the leftmost place, until there is none."""
    while True:
        found = [
            (pairs.ranks[f"{a} {b}"], place)
            for place, (a, b) in enumerate(pairwise(symbols))
            if f"{a} {b}" in pairs.ranks
        ]
        if not found:
            return symbols
        _, place = min(found)
        symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]


@pytest.mark.parametrize("seed", range(20))
def test_merges_of_few_and_of_many_symbols_are_those_of_the_definition(seed: int) -> None:
    pairs = random_pairs(seed)
    rng = random.Random(seed)
    for length in (0, 1, 2, 3, 10, 60):
        symbols = rng.choices("abc", k=length)
        expected = merged_slowly(pairs, symbols)
        assert pairs._merge_few(list(symbols)) == expected
        assert pairs._merge_many(list(symbols)) == expected


def test_long_pieces_are_merged_by_a_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(3)
    text = "".join(random.Random(3).choices("abc", k=bpe._SHORT + 1))
    expected = pairs.encode(text)
    monkeypatch.setattr(bpe, "_SHORT", 10**6)
    assert pairs.encode(text) == expected


def test_what_is_no_token_becomes_unknown_or_bytes_or_nothing() -> None:
    vocab = {"a": 0, "?": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in b"\xc3\xa9"}}
    assert BytePairs(vocab, {}).encode("aéxxa") == [0, 0]
    assert BytePairs(vocab, {}, unknown="?").encode("aéxxa") == [0, 1, 1, 1, 0]
    assert BytePairs(vocab, {}, unknown="?", fuse_unknown=True).encode("aéxxa") == [0, 1, 0]
    e_acute = [vocab["<0xC3>"], vocab["<0xA9>"]]
    assert BytePairs(vocab, {}, unknown="?", byte_fallback=True).encode("aéxxa") == [0, *e_acute, 1, 1, 0]
    # As `tokenizers` does: the unknown one waits until a token comes.
    assert BytePairs(vocab, {}, unknown="?", byte_fallback=True).encode("xéa") == [*e_acute, 1, 0]


def test_whole_tokens_are_not_merged() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "aba": 3}
    assert BytePairs(vocab, {"a b": 0}).encode("aba") == [2, 0]
    assert BytePairs(vocab, {"a b": 0}, whole_tokens=True).encode("aba") == [3]


def test_words_stay_apart_where_no_merge_reaches_over_a_space() -> None:
    vocab = {token: i for i, token in enumerate(["a", "▁", "▁a", "▁▁", "a▁"])}
    assert BytePairs(vocab, {"▁ a": 0, "▁ ▁": 1}).words_stay_apart()
    assert not BytePairs(vocab, {"▁ a": 0, "a ▁": 1}).words_stay_apart()
    assert not BytePairs({"a": 0}, {}).words_stay_apart()
    assert spaced_words("a▁▁ab▁c▁▁") == ["a", "▁▁ab", "▁c", "▁▁"]
