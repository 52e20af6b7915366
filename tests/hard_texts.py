"""Lines that are hard for tokenizers: thirty scripts, digits, spaces, emoji, code, control characters."""

# ruff: noqa: RUF001 (characters that look alike are wanted here)

import random
import unicodedata
from collections.abc import Callable, Iterator

# Where the letters and marks of scripts are, as first and last code point.
SCRIPTS = [
    (0x41, 0x7A),  # Latin
    (0xC0, 0x24F),  # Latin, with accents
    (0x370, 0x3FF),  # Greek
    (0x400, 0x4FF),  # Cyrillic
    (0x531, 0x587),  # Armenian
    (0x5B0, 0x5EA),  # Hebrew
    (0x610, 0x6D3),  # Arabic
    (0x710, 0x74A),  # Syriac
    (0x900, 0x94D),  # Devanagari
    (0x981, 0x9CD),  # Bengali
    (0xA01, 0xA4D),  # Gurmukhi
    (0xA81, 0xACD),  # Gujarati
    (0xB82, 0xBCD),  # Tamil
    (0xC01, 0xC4D),  # Telugu
    (0xC82, 0xCCD),  # Kannada
    (0xD02, 0xD4D),  # Malayalam
    (0xD82, 0xDDF),  # Sinhala
    (0xE01, 0xE4E),  # Thai
    (0xE81, 0xECD),  # Lao
    (0xF40, 0xFBC),  # Tibetan
    (0x1000, 0x104F),  # Myanmar
    (0x10A0, 0x10FF),  # Georgian
    (0x1100, 0x11FF),  # Hangul, its parts
    (0x1200, 0x137F),  # Ethiopic
    (0x13A0, 0x13F5),  # Cherokee
    (0x1780, 0x17D3),  # Khmer
    (0x1820, 0x1878),  # Mongolian
    (0x3041, 0x30FF),  # Hiragana and Katakana
    (0x4E00, 0x9FA5),  # Han
    (0xAC00, 0xD7A3),  # Hangul
    (0xFB00, 0xFB4F),  # ligatures
    (0xFF01, 0xFF9F),  # wide and half
    (0x10400, 0x1044F),  # Deseret
    (0x1D400, 0x1D7FF),  # letters for mathematics
    (0x20000, 0x2A6D6),  # Han, rare
]
_SPACES = [" "] * 12 + list("\t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\x1c\x1f") + ["\r\n"]
_DIGITS = ["0123456789"] * 4 + ["٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９", "²³¹½¾Ⅷ①㉈〇"]
_CONTRACTIONS = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'T",
    "'RE",
    "'Ve",
    "'LL",
    "'ſ",
    "’s",
    "'",
    "''s",
]
_EMOJI = ["👍", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "🌊", "😀", "#️⃣", "🧑‍🤝‍🧑", "\u200d", "\ufe0f"]
_CODE = [
    "for (int i = 0; i < n; ++i) {\n\t",
    "    return x[-1:] != None  # TODO\n",
    "<a href='https://example.org/?q=1&r=%20#top'>",
    "https://user@host.example:8080/~a/b_c-d.tar.gz",
    "SELECT * FROM t WHERE id>=10;",
    "\\frac{a}{b}$$",
    '{"key": [1.5e-10, true, null]}',
    "C:\\Users\\x",
    "camelCaseHTTPServer_v2__init__",
    "=====-----*****",
    "//////",
    "!?!?...",
]
_OTHERS = [
    "▁",
    "▁▁a",
    "Ġ",
    "<s>",
    "</s>",
    "<0x0A>",
    "<unk>",
    "\ufeff",
    "\uffff",
    "\ue000",
    "\xad",
    "\u200b",
    "ﷺ",
    "İ",
    "ΑΣ",
]
# Marks and punctuation that are newer than the Unicode by which `tokenizers` knows them.
_NEWER = "\u061d\u0c84\u0c04\u0c3c\u0d3b\u0d3c\u0eba"


def _word(rng: random.Random) -> str:
    first, last = rng.choice(SCRIPTS)
    chars = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 9))]
    return "".join(char for char in chars if unicodedata.category(char) != "Cn" and char not in _NEWER)


def _marked(rng: random.Random) -> str:
    return rng.choice("aeioungkßאก") + "".join(
        chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randint(1, 4))
    )


def _latin(rng: random.Random) -> str:
    return "".join(rng.choices("etaoinshrdluETAOIN", k=rng.randint(1, 10)))


def _spaces(rng: random.Random) -> str:
    return rng.choice(
        [" ", rng.choice(_SPACES) * rng.randint(1, 9), "".join(rng.choices(_SPACES, k=rng.randint(1, 6)))]
    )


def _repeated(rng: random.Random) -> str:
    return rng.choice(["a", "-", "=", "ha", " .", "0", "\n", "漢", "."]) * rng.randint(1, 40)


_PARTS: list[tuple[int, Callable[[random.Random], str]]] = [
    (30, _word),
    (25, _latin),
    (40, _spaces),
    (10, lambda rng: "".join(rng.choices(rng.choice(_DIGITS), k=rng.randint(1, 12)))),
    (8, lambda rng: rng.choice(_CONTRACTIONS)),
    (6, lambda rng: rng.choice(_EMOJI)),
    (6, lambda rng: rng.choice(_CODE)),
    (5, _marked),
    (5, lambda rng: rng.choice(_OTHERS)),
    (4, lambda rng: chr(rng.randint(0, 0x20))),
    (8, lambda rng: rng.choice('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~«»„“…—،؟。、！？€±§')),
    (2, _repeated),
]


def hard_lines(n: int, seed: int = 0, more: tuple[str, ...] = ()) -> Iterator[str]:
    """`n` lines, the same for the same seed, into which the texts of `more` are mixed."""
    rng = random.Random(seed)
    weights = [weight for weight, _ in _PARTS]
    makers = [make for _, make in _PARTS]
    for _ in range(n):
        parts = [make(rng) for make in rng.choices(makers, weights, k=rng.randint(1, 24))]
        for text in more:
            if rng.random() < 0.06:
                parts.insert(rng.randint(0, len(parts)), text)
        yield "".join(parts)
