"""A small grammar of short stories: the training text of the model that ships with tpilite.

`story` tells one story. A cast is drawn (a child, an animal, a king, two friends, ...), an opening brings
it in, and one of the plots runs with it, so that names, pronouns and things stay the same from the first
sentence to the last. The words stand in words.txt, openings and endings in sentences.txt, plots in plots.txt:
sections that begin with `== name`, and comments after `#`. Templates are plain sentences with two marks:
`[a|b|]` is one of the alternatives (they nest, and may be empty), `{slot}` is what this story has fixed;
`{Slot}` begins with a capital letter.

The only source of chance is `random.Random.random`, whose sequence Python keeps the same across versions, so
a seed gives the same text everywhere.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LATER = "[one|one|one|one fine|one cold|one sunny|one windy] [day|day|day|morning|afternoon|evening],"
SOON = "[that day|then|soon|]"
INVENTED_NAME = 0.2  # made of syllables, so that the model learns to copy a name instead of knowing it


@dataclass(frozen=True)
class Plot:
    """Templates in the order of telling, and the slots that are drawn together, each with its rows."""

    lines: list[str]
    lets: list[tuple[list[str], list[list[str]]]]


@dataclass(frozen=True)
class Source:
    """The three text files, read."""

    words: dict[str, list[str]]
    sentences: dict[str, list[str]]
    plots: list[Plot]


@dataclass(frozen=True)
class Character:
    """Somebody in a story, in the forms in which sentences need them."""

    intro: str  # "a little fox called Pip"
    refs: tuple[str, ...]  # "Pip", "the fox": any later mention
    kind: str  # "fox", "girl", "king"
    he: str  # "he", "she" or "they"
    name: str = ""
    first: str = ""  # "Pip", "the little fox": the first mention where nobody is presented

    def forms(self) -> dict[str, str]:
        """The pronouns, and what else depends on who somebody is and how many they are."""
        he, him, his = {
            "he": ("he", "him", "his"),
            "she": ("she", "her", "her"),
            "they": ("they", "them", "their"),
        }[self.he]
        number = (
            ("we", "us", "our", "are", "were", "s") if he == "they" else ("I", "me", "my", "am", "was", "")
        )
        keys = ("he", "him", "his", "I", "me", "my", "am", "was", "s")
        return dict(zip(keys, (he, him, his, *number), strict=True))


class Teller:
    """Draws what one story is made of, and turns templates into its sentences."""

    def __init__(self, rng: random.Random, source: Source) -> None:
        self.rng = rng
        self.words = source.words
        self.slots: dict[str, str] = {}
        self.cast: dict[str, Character] = {}

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def word(self, *lists: str, but: Sequence[str] = ()) -> str:
        """A word of these lists that is not one of `but`."""
        return self.pick([word for name in lists for word in self.words[name] if word not in but])

    def two(self, name: str) -> tuple[str, str]:
        first = self.word(name)
        return first, self.word(name, but=[first])

    def add(self, role: str, character: Character) -> None:
        """Let templates speak of `character`: {hero} and {he}, or {friend} and {friend_he}."""
        self.cast[role] = character
        prefix = "" if role == "hero" else f"{role}_"
        self.slots |= {prefix + key: form for key, form in character.forms().items()}
        self.slots[f"{role}_intro"] = character.intro

    def tell(self, template: str) -> str:
        """The template as text, every sentence with its capital letter."""
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", self._fill(template))
        text = re.sub(r" +", " ", text).strip()
        return re.sub(r'(?:^"?|[.!?] "?)[a-z]', lambda match: match[0].upper(), text)

    def _fill(self, template: str) -> str:
        while "[" in template:
            template = re.sub(r"\[([^][]*)\]", lambda match: self.pick(match[1].split("|")), template)
        return re.sub(r"\{(\w+)\}", lambda match: self._slot(match[1]), template)

    def _slot(self, name: str) -> str:
        small = name if name in self.slots or name in self.cast else name[0].lower() + name[1:]
        value = self.pick(self.cast[small].refs) if small in self.cast else self._fill(self.slots[small])
        return value if small == name else value[0].upper() + value[1:]


def read_source(folder: Path) -> Source:
    words = {
        name: [word.strip() for word in " ".join(lines).split("|")]
        for name, lines in _sections(folder / "words.txt").items()
    }
    plots = [_plot(lines) for lines in _sections(folder / "plots.txt").values()]
    return Source(words, _sections(folder / "sentences.txt"), plots)


def story(rng: random.Random, source: Source) -> str:
    """One story, as one paragraph."""
    teller = Teller(rng, source)
    hero = _hero(teller)
    teller.add("hero", hero)
    teller.add("friend", _friend(teller, hero))
    _set_scene(teller, hero, source)
    opening, teller.slots["when"] = _opening(teller, source.sentences)
    told = [teller.tell(line) for line in opening]
    if hero.name and hero.he != "they" and not any(hero.kind in line for line in told):
        teller.cast["hero"] = replace(hero, refs=(hero.name,))  # nobody has heard yet that this is a fox
    plot = teller.pick(source.plots)
    for names, rows in plot.lets:
        teller.slots.update(zip(names, teller.pick(rows), strict=True))
    told += [teller.tell(line) for line in plot.lines]
    return " ".join(line for line in told if line)


def stories(seed: int) -> Iterator[str]:
    """Stories without end, the same ones for the same seed."""
    rng, source = random.Random(seed), read_source(Path(__file__).parent)
    while True:
        yield story(rng, source)


def _sections(path: Path) -> dict[str, list[str]]:
    """The lines of each section; an indented line goes on with the one before, or is a row of a `let`."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = sections.setdefault(line[3:], [])
        elif line.startswith("    ") and not lines[-1].startswith(("let ", "    ")):
            lines[-1] += " " + line.strip()
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def _plot(lines: list[str]) -> Plot:
    plot = Plot([], [])
    for line in lines:
        if line.startswith("let "):
            plot.lets.append((line[4:].rstrip(":").split(" / "), []))
        elif line.startswith("    "):
            plot.lets[-1][1].append(line.strip().split(" / "))
        else:
            plot.lines.append(line)
    return plot


def _set_scene(teller: Teller, hero: Character, source: Source) -> None:
    """Fix what the sentences of one story must agree on."""
    slots = teller.slots
    for number, place in zip(("", "2"), teller.two("places"), strict=True):
        slots["there" + number], slots["here" + number] = place.split(" / ")
    slots["food"], slots["food2"] = teller.two("foods")
    slots["thing"] = f"{teller.word('colours')} {teller.word('toys')}"
    slots["a_thing"] = "a {thing}"
    grown_up = hero.kind in teller.words["men"] + teller.words["women"]
    child = hero.kind in ("boy", "girl", "children")
    slots["house"] = teller.word("houses" if grown_up or child else "dens")
    slots["land"] = teller.word("lands")
    slots["home"] = teller.pick(["in {house} {land}", "in {house} {land}", "in {house}", "{land}"])
    if child and teller.chance(0.5):
        slots["home"] += " with {his} " + teller.word("family")
    slots["trait"] = teller.word("traits", but=hero.intro.split())
    slots["hobby"], slots["routine"] = teller.word("hobbies"), teller.word("routines")
    slots["weather"], slots["time"] = teller.word("weathers"), teller.word("times")
    slots["the_hero"] = hero.first
    for name in ("friends end", "happy end", "thanks"):
        slots[name.replace(" ", "_")] = f"[{'|'.join(source.sentences[name])}]"


def _opening(teller: Teller, sentences: dict[str, list[str]]) -> tuple[list[str], str]:
    """The sentences that bring in the hero, and the words with which the plot then begins."""
    draw = teller.rng.random()
    if draw < 0.16:
        return [teller.pick(sentences["timed"])], SOON
    if draw < 0.32:
        return [teller.pick(sentences["moving"])], SOON
    if draw < 0.40:
        return [teller.pick(sentences["daily"])], teller.pick(["but ", ""]) + LATER
    first = teller.pick(sentences["there was" if draw < 0.62 else "lived" if draw < 0.82 else "described"])
    said = set(re.findall(r"\{(?:home|land|house|trait|hobby)\}", first.lower()))
    if said & {"{land}", "{house}"}:
        said.add("{home}")
    more = [line for line in sentences["more"] if not any(slot in line for slot in said)]
    return [first, teller.pick([*more, ""])], LATER


def _name(teller: Teller, he: str, *taken: str) -> str:
    lists = ("girls", "girls' endings") if he == "she" else ("boys", "boys' endings")
    if teller.chance(INVENTED_NAME):
        return teller.word("first syllables") + teller.word(lists[1])
    return teller.word(lists[0], but=taken)


def _hero(teller: Teller) -> Character:
    draw = teller.rng.random()
    if draw < 0.30:
        return _child(teller)
    if draw < 0.66:
        return _animal(teller)
    if draw < 0.80:
        return _grown_up(teller)
    return teller.pick((_children, _children, _two_animals, _alike))(teller)


def _friend(teller: Teller, hero: Character) -> Character:
    """Somebody who cannot be taken for the hero: of another name, and of another kind unless a child."""
    while True:
        friend = teller.pick((_child, _child, _animal, _animal, _grown_up))(teller)
        new_kind = friend.kind not in hero.kind.split() or friend.kind in ("boy", "girl")
        if new_kind and (not friend.name or friend.name not in hero.name.split()):
            return friend


def _one(teller: Teller, adjective: str, kind: str, he: str, name: str = "") -> Character:
    plain = f"{adjective} {kind}".strip()
    if name:
        intro = f"a {plain} {teller.pick(('called', 'named'))} {name}"
        refs: tuple[str, ...] = (name,) if kind in ("boy", "girl") else (name, name, f"the {kind}")
        return Character(intro, refs, kind, he, name, first=name)
    refs = (*[f"the {kind}"] * 4, f"the {plain}")
    return Character(f"a {plain}", refs, kind, he, first=f"the {plain}")


def _child(teller: Teller) -> Character:
    he, kind = teller.pick((("he", "boy"), ("she", "girl")))
    adjective = teller.pick(["", "little", "young", *teller.words["traits"]])
    return _one(teller, adjective, kind, he, _name(teller, he))


def _animal(teller: Teller) -> Character:
    he, kind = teller.pick(("he", "she")), teller.word("animals").split()[0]
    name = teller.pick(("", "", "", teller.word("pet names"), teller.word("pet names"), _name(teller, he)))
    return _one(teller, teller.word("sizes", "traits"), kind, he, name)


def _grown_up(teller: Teller) -> Character:
    he = teller.pick(("he", "she"))
    kind = teller.word("men" if he == "he" else "women")
    adjective = teller.pick(["old", "young", "old", *teller.words["traits"]])
    return _one(teller, adjective, kind, he, _name(teller, he) if teller.chance(0.3) else "")


def _children(teller: Teller) -> Character:
    """Two children: "Anna and Tom", "Anna and her brother Tom", "Anna and her brother"."""
    he1, he2 = teller.pick(("he", "she")), teller.pick(("he", "she"))
    one = _name(teller, he1)
    two = _name(teller, he2, one)
    if teller.chance(0.2):
        intro = both = f"{one} and {two}"
    else:
        sibling = "brother" if he2 == "he" else "sister"
        relation = teller.pick(
            (sibling, f"little {sibling}", f"big {sibling}", sibling, "friend", "best friend", "cousin")
        )
        intro = f"{one} and {'his' if he1 == 'he' else 'her'} {relation}"
        both = f"{one} and {two}"
        if teller.chance(0.3):
            both = intro
        else:
            intro += f" {two}"
    return Character(intro, (both, both, "the children"), "children", "they", both, first=intro)


def _two_animals(teller: Teller) -> Character:
    one, two = (pair.split()[0] for pair in teller.two("animals"))
    both = f"the {one} and the {two}"
    return Character(f"a {one} and a {two}", (both, "the two friends"), f"{one} {two}", "they", first=both)


def _alike(teller: Teller) -> Character:
    """Two or three animals of one kind."""
    kind, many = teller.word("animals").split()
    number = teller.pick(("two", "two", "three"))
    intro = f"{number} {teller.word('sizes', 'traits')} {many}"
    return Character(
        intro, (f"the {many}", f"the {number} {many}"), kind, "they", first=f"the {number} {many}"
    )
