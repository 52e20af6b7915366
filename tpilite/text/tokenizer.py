"""Text to ids and back, for one model: added tokens by name, the rest by its encoder."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence

from tpilite.errors import ConfigError
from tpilite.text.added_tokens import NameFinder, TokenNames


class Tokenizer:
    """Text to ids and back, for one model.

    `added` are the tokens that are matched by name, `specials` those of them that text never becomes unless
    `allow_special` asks for it, and that decoded text does not show. `add_bos` and `add_eos` say whether the
    model's prompts begin with BOS and end with EOS. `eos_id` is the token that the model's templates call
    EOS, one of `eos_ids`.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],  # by id; empty for those without text
        encode_plain: Callable[
            [str, bool], list[int]
        ],  # a normalized text, and whether nothing stands before it
        *,
        vocab_size: int,
        names: TokenNames,
        bos: int | None,
        eos: int | None,
        more_eos: Iterable[int] = (),
        add_bos: bool,
        add_eos: bool = False,
        normalize: Callable[[str], str] = str,
        spaced: frozenset[int] = frozenset(),  # tokens that lose one leading space where a text begins
        strip_all: bool = False,  # also the next such token, while there is no text yet
        is_lossless: bool = True,  # the tokens of a text hold all of its bytes
    ) -> None:
        self.specials: Mapping[str, int] = names.specials
        self.added = names.by_id
        self.bos_id = bos
        self.eos_id = eos
        self.eos_ids = frozenset([*more_eos] if eos is None else [eos, *more_eos])
        self.add_bos = add_bos and bos is not None
        self.add_eos = add_eos and eos is not None
        self.n_tokens = len(tokens)
        self.vocab_size = vocab_size
        self.spaced = spaced
        self.strip_all = strip_all
        self._tokens = tokens
        self._encode_plain = encode_plain
        self._normalize = normalize
        # No text of more bytes than this for each token can be so few tokens; None where it can.
        longest = max(map(len, [*tokens, *(name.encode() for name in self.specials)]), default=1)
        self.max_token_bytes = longest if is_lossless else None
        self._find_special = NameFinder({i: token for i, token in names.by_id.items() if token.special})
        plain, normalized = names.by_normalized()
        self._find_plain = NameFinder(plain)
        self._find_normalized = NameFinder(normalized, normalize)

    def encode(
        self, text: str, bos: bool = True, allow_special: bool = False, at_start: bool = True
    ) -> list[int]:
        """The ids of `text`, between BOS and EOS where the model wants them and `bos` does not forbid it.

        With `allow_special`, the names of special tokens in the text become these tokens. `at_start` is
        whether it is a text of its own; otherwise it goes on behind a special token.
        """
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        for part in self._find_plain.split(_whole_characters(text), allow_special):
            if isinstance(part, int):
                ids.append(part)
                at_start = False
                continue
            for piece in self._find_normalized.split(self._normalize(part), allow_special):
                ids += [piece] if isinstance(piece, int) else self._encode_plain(piece, at_start)
                at_start = False
        return [*ids, self.eos_id] if bos and self.add_eos and self.eos_id is not None else ids

    def split_specials(self, text: str) -> list[str | int]:
        """The text with its special tokens' names replaced by their ids, in order."""
        return self._find_special.split(text)

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of `ids`: of their own, or as what follows the text of `after`.

        Bytes that are no UTF-8 become U+FFFD. Raises `ConfigError` for ids outside of the vocabulary.
        """
        decoder = StreamDecoder(self, after)
        return "".join([decoder.add(token_id) for token_id in ids]) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text; empty for special tokens and the vocabulary's unused rows."""
        if 0 <= token_id < self.n_tokens:
            return self._tokens[token_id]
        if 0 <= token_id < self.vocab_size:
            return b""
        raise ConfigError(f"token id {token_id} is outside of the model's vocabulary of {self.vocab_size}")


class StreamDecoder:
    """Text as its ids arrive, in whole characters.

        decoder = StreamDecoder(tokenizer, after=prompt_ids)
        for token_id in new_ids:
            show(decoder.add(token_id))
        show(decoder.finish())

    The pieces add up to `tokenizer.decode(new_ids, after=prompt_ids)`. A sentencepiece text loses the
    space before its first word, which its encoder put there, so a continuation must know that it is one.
    `shown` are texts for tokens that have none.
    """

    def __init__(
        self, tokenizer: Tokenizer, after: Iterable[int] = (), shown: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        for token_id in after:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The characters that this token completes. Raises `ConfigError` for an id out of range."""
        token = self._tokenizer.token_bytes(token_id)
        if not token:
            return self.finish() + self._shown.get(token_id, "")
        if self._at_start:
            if token_id in self._tokenizer.spaced:
                token = token[1:]
            self._at_start = self._tokenizer.strip_all and not token
        return self._utf8.decode(token)

    def finish(self) -> str:
        """What was held back: U+FFFD where the ids ended inside a character."""
        return self._utf8.decode(b"", final=True)


def _whole_characters(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON and command lines can hold, made U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
