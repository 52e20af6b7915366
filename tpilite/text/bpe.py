"""Byte-pair encoding by the list of merges that a tokenizer.json or a GGUF file holds.

The merges themselves are followed, by the code below, and no other library's. tiktoken merges the pair whose
text has the lowest id, sentencepiece the one whose text has the best score, listed among the merges or not.
Both give the same ids only where every token has one merge, or all that are possible, in the order of its
ids: to find that out takes longer than starting with the merges as they lie, and building tiktoken's tables
takes half a second more for 128 thousand tokens. Words come again and again, so that a cache makes up for
the slower language (benchmarks/RESULTS.md). tiktoken and sentencepiece read their own files.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

# Of some 14 thousand different words in a megabyte of English, nearly all stay known.
_KNOWN_PIECES = 32768
_KNOWN_PIECE_CHARS = 64
# A list of pairs is searched faster than a heap is kept, up to about this many symbols.
_SHORT = 128

_NO_MERGE = 1 << 62

_SPACE = "\u2581"  # sentencepiece's sign for a space
_WORDS = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")


@dataclass(frozen=True)
class BytePairs:
    """The tokens of a piece of text, by merges.

    `ranks` holds the place of each merge, by its two tokens with `separator` between them. A character that
    is no token becomes its bytes where there is `byte_fallback`, else the unknown token, else nothing.
    """

    vocab: Mapping[str, int]
    ranks: Mapping[str, int]
    separator: str = " "
    unknown: str | None = None
    fuse_unknown: bool = False
    byte_fallback: bool = False
    whole_tokens: bool = False  # a piece that is a token stays one, whatever the merges ("ignore_merges")

    def encode(self, piece: str) -> list[int]:
        if self.whole_tokens and piece in self.vocab:
            return [self.vocab[piece]]
        symbols = list(piece)
        if not self.vocab.keys() >= set(symbols):
            symbols = self._known(symbols)
        merge = self._merge_few if len(symbols) <= _SHORT else self._merge_many
        return [self.vocab[symbol] for symbol in merge(symbols)]

    def words_stay_apart(self) -> bool:
        """Whether no merge reaches from a word over the space behind it, where a sign stands for the space.

        Then a text can be cut into `spaced_words` before it is merged.
        """
        between = re.escape(self.separator)
        inside = re.compile(f"[^{_SPACE}{between}]{between}?{_SPACE}")
        return _SPACE in self.vocab and not self.whole_tokens and not any(map(inside.search, self.ranks))

    def _known(self, characters: Iterable[str]) -> list[str]:
        """The characters as tokens. One that is unknown comes behind the bytes that follow it.

        That order is what `tokenizers` gives where only some bytes are tokens.
        """
        symbols: list[str] = []
        waiting = False
        for character in characters:
            if character in self.vocab:
                if waiting and self.unknown is not None:
                    symbols.append(self.unknown)
                waiting = False
                symbols.append(character)
                continue
            names = [f"<0x{byte:02X}>" for byte in character.encode()] if self.byte_fallback else []
            if names and all(name in self.vocab for name in names):
                symbols += names
            elif self.unknown is not None:
                if waiting and not self.fuse_unknown:
                    symbols.append(self.unknown)
                waiting = True
        return [*symbols, self.unknown] if waiting and self.unknown is not None else symbols

    def _rank(self, left: str, right: str) -> int:
        return self.ranks.get(f"{left}{self.separator}{right}", _NO_MERGE)

    def _merge_few(self, symbols: list[str]) -> list[str]:
        """The symbols merged, the pair of the lowest rank first and of equal ones the leftmost."""
        ranks = [self._rank(left, right) for left, right in pairwise(symbols)]
        while ranks and (best := min(ranks)) < _NO_MERGE:
            place = ranks.index(best)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            del ranks[place]
            if place:
                ranks[place - 1] = self._rank(symbols[place - 1], symbols[place])
            if place < len(ranks):
                ranks[place] = self._rank(symbols[place], symbols[place + 1])
        return symbols

    def _merge_many(self, symbols: list[str]) -> list[str]:
        """The same for many symbols, in time that grows little faster than their number."""
        n = len(symbols)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        ranks = map(self._rank, symbols, symbols[1:])
        heap = [rank * n + place for place, rank in enumerate(ranks) if rank < _NO_MERGE]
        heapify(heap)
        while heap:
            rank, place = divmod(heappop(heap), n)
            right = after[place]
            # A pair of which one has been merged since is no longer there, or is another one.
            if not symbols[place] or right == n or self._rank(symbols[place], symbols[right]) != rank:
                continue
            symbols[place] += symbols[right]
            symbols[right] = ""
            after[place] = after[right]
            if after[right] < n:
                before[after[right]] = place
            for left in (before[place], place):
                if left >= 0 and after[left] < n:
                    rank = self._rank(symbols[left], symbols[after[left]])
                    if rank < _NO_MERGE:
                        heappush(heap, rank * n + left)
        return [symbol for symbol in symbols if symbol]


def word_encoder(encode_piece: Callable[[str], list[int]]) -> Callable[[Iterable[str]], list[int]]:
    """A function to the ids of a text that comes as pieces, many of which come again."""
    known = lru_cache(_KNOWN_PIECES)(encode_piece)

    def encode(pieces: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += known(piece) if len(piece) <= _KNOWN_PIECE_CHARS else encode_piece(piece)
        return ids

    return encode


def spaced_words(text: str) -> list[str]:
    """The words of a text, each with the signs for spaces before it."""
    return _WORDS.findall(text)
