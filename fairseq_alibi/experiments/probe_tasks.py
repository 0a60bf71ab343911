"""Texts with questions whose answers are known: made-up tasks that show what a model does with its context.

Each task is a function of random draws, a size and the task's options; it returns a `Probe`. Sources: multi-query
associative recall (Arora et al. 2023), passkey (Mohtashami and Jaggi 2023), needles (RULER, Hsieh et al. 2024), and the
tasks of Kazemnejad et al. 2023 (copy, reverse, sort, addition, parity).
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Sentences of the filler around pass keys and needles.
FILLER = (
    *("the", "grass", "is", "green", ".", "the", "sky", "is", "blue", ".", "the", "sun", "is", "yellow", "."),
    *("here", "we", "go", ".", "there", "and", "back", "again", ".", "the", "river", "runs", "to", "the", "sea", "."),
    *("a", "bird", "sings", "in", "the", "old", "tree", ".", "rain", "falls", "on", "the", "quiet", "town", "."),
)

#: Names of needles.
NAMES = (
    *("amber", "black", "coral", "cyan", "gold", "gray", "ivory", "jade"),
    *("lime", "navy", "olive", "pink", "plum", "red", "rose", "teal"),
)

DIGITS = tuple("0123456789")


class Answer(NamedTuple):
    """Words [start, stop) of a text are an answer; `source` is the place of the word that tells it."""

    start: int
    stop: int
    source: int


class Probe(NamedTuple):
    """A text and its answers."""

    words: list[str]
    answers: list[Answer]


class Draws:
    """Random draws that are the same with every version of Python: it guarantees `random()` alone; seeds are texts."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1."""
        return int(self.random() * limit)

    def several(self, values: Sequence[str], count: int) -> list[str]:
        """`count` values, of which some may be equal."""
        return [values[self.below(len(values))] for _ in range(count)]

    def distinct(self, values: Sequence[str], count: int) -> list[str]:
        """`count` different values in any order."""
        return [values[n] for n in self.weighted([1.0] * len(values), count)]

    def weighted(self, weights: Sequence[float], count: int) -> list[int]:
        """`count` different places of `weights`, drawn one after the other in proportion to them.

        Efraimidis and Spirakis 2006: those with the largest of u ** (1 / weight).
        """
        times = [-math.log(1 - self.random()) / weight for weight in weights]
        return heapq.nsmallest(count, range(len(weights)), key=times.__getitem__)


@dataclass(frozen=True)
class ProbeOptions:
    """Options of the tasks; each task has some of them, see `ProbeKind.options`."""

    vocabulary: int = 64  # words that keys, values or symbols are drawn from
    pairs: int = 8  # of key and value
    queries: int = 4  # keys that are asked for
    #: The chance of a gap between pair and query is in proportion to gap ** (gap_power - 1): 1 draws all gaps alike,
    #: smaller values prefer short ones.
    gap_power: float = 1.0
    digits: int = 5  # of a pass key or needle
    needles: int = 4  # in a text
    asked: int = 1  # needles that are asked for
    filler: tuple[str, ...] = field(default=FILLER, repr=False)  # words around pass keys and needles, in their order


def symbols(options: ProbeOptions) -> list[str]:
    """The words s00, s01, ..., whose order is that of their numbers."""
    width = len(str(options.vocabulary - 1))
    return [f"s{number:0{width}}" for number in range(options.vocabulary)]


def recall(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`mqar`, size tokens: pairs of key and value; later some keys again, after which their values are asked for.

    The places between the questions hold values.
    """
    pool = symbols(options)
    half = len(pool) // 2
    keys, values = draws.distinct(pool[:half], options.pairs), draws.several(pool[half:], options.pairs)
    words = [word for pair in zip(keys, values) for word in pair]
    slots = (size - len(words)) // 2
    words += draws.several(pool[half:], size - len(words))
    answers = []
    weights = [(slot + 1) ** (options.gap_power - 1) for slot in range(slots)]
    asked = draws.weighted([1.0] * options.pairs, options.queries)
    for slot, pair in zip(draws.weighted(weights, options.queries), asked):
        start = 2 * (options.pairs + slot)
        words[start : start + 2] = keys[pair], values[pair]
        answers.append(Answer(start + 1, start + 2, 2 * pair + 1))
    return Probe(words, sorted(answers))


def hide_numbers(draws: Draws, size: int, options: ProbeOptions, names: Sequence[str], asked: Sequence[str]) -> Probe:
    """`size` tokens: filler with a number for each name at random places, and questions for some of them at the end."""
    numbers = {name: draws.several(DIGITS, options.digits) for name in names}
    questions = [["what", "is", "the", name, "key", "?", *numbers[name]] for name in asked]
    facts = [["the", name, "key", "is", *numbers[name], "."] for name in names]
    room = size - sum(map(len, facts)) - sum(map(len, questions))
    first = draws.below(len(options.filler))
    filler = [options.filler[(first + number) % len(options.filler)] for number in range(room)]
    words: list[str] = []
    sources, taken = {}, 0
    for place, name, fact in zip(sorted(draws.below(room + 1) for _ in facts), names, facts):
        words += filler[taken:place]
        sources[name], taken = len(words) + 4, place
        words += fact
    words += filler[taken:]
    answers = []
    for name, question in zip(asked, questions):
        words += question
        answers.append(Answer(len(words) - options.digits, len(words), sources[name]))
    return Probe(words, answers)


def passkey(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`passkey`, size tokens: a number in a long text; at the end it is asked for."""
    return hide_numbers(draws, size, options, ["pass"], ["pass"])


def needles(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`needles`, size tokens: several named numbers in a long text; at the end one or more are asked for."""
    names = draws.distinct(NAMES, options.needles)
    return hide_numbers(draws, size, options, names, draws.distinct(names, options.asked))


def transform(question: list[str], answer: list[str], source: int = 0) -> Probe:
    """A question, an equals sign and the answer."""
    start = len(question) + 1
    return Probe([*question, "=", *answer], [Answer(start, start + len(answer), source)])


def copy_symbols(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`copy`, size symbols."""
    question = draws.several(symbols(options), size)
    return transform(question, question)


def reverse(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`reverse`, size symbols."""
    question = draws.several(symbols(options), size)
    return transform(question, question[::-1], size - 1)


def sort(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`sort`, size symbols, some of which may be equal."""
    question = draws.several(symbols(options), size)
    return transform(question, sorted(question), question.index(min(question)))


def addition(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`addition` of two numbers of size digits; the sum has one more, the highest first."""
    numbers = [draws.several(DIGITS, size) for _ in range(2)]
    carry, total = 0, []
    for digits in zip(*map(reversed, numbers)):
        carry, digit = divmod(carry + sum(map(int, digits)), 10)
        total.append(str(digit))
    return transform([*numbers[0], "+", *numbers[1]], [str(carry), *reversed(total)])


def parity(draws: Draws, size: int, options: ProbeOptions) -> Probe:
    """`parity` of size bits."""
    bits = draws.several(DIGITS[:2], size)
    return transform(bits, [str(bits.count("1") % 2)])


@dataclass(frozen=True)
class ProbeKind:
    """A task: how a text is made, of which words, with which options."""

    make: Callable[[Draws, int, ProbeOptions], Probe]  # a text of random draws, a size and options
    words: Callable[[ProbeOptions], Sequence[str]]  # all words of its texts
    unit: str  # what sizes count
    options: tuple[str, ...] = ()  # the names of its options
    smallest: Callable[[ProbeOptions], int] = lambda options: 1  # size
    shown_by: str = "by_gap"  # what a heat map has beside the size: by_gap, or by_depth


def needle_words(options: ProbeOptions) -> list[str]:
    """All words of the tasks `passkey` and `needles`."""
    return [*options.filler, "the", "key", "is", ".", "what", "?", "pass", *NAMES, *DIGITS]


def needle_room(needles: int, asked: int, digits: int) -> int:
    """Tokens of facts and questions."""
    return needles * (5 + digits) + asked * (6 + digits)


#: The tasks by name.
PROBES = {
    "mqar": ProbeKind(
        *(recall, symbols, "tokens", ("vocabulary", "pairs", "queries", "gap_power")),
        smallest=lambda options: 2 * (options.pairs + options.queries),
    ),
    "passkey": ProbeKind(
        *(passkey, needle_words, "tokens", ("digits", "filler")),
        smallest=lambda options: needle_room(1, 1, options.digits),
        shown_by="by_depth",
    ),
    "needles": ProbeKind(
        *(needles, needle_words, "tokens", ("needles", "asked", "digits", "filler")),
        smallest=lambda options: needle_room(options.needles, options.asked, options.digits),
        shown_by="by_depth",
    ),
    "copy": ProbeKind(copy_symbols, lambda options: [*symbols(options), "="], "symbols", ("vocabulary",)),
    "reverse": ProbeKind(reverse, lambda options: [*symbols(options), "="], "symbols", ("vocabulary",)),
    "sort": ProbeKind(sort, lambda options: [*symbols(options), "="], "symbols", ("vocabulary",)),
    "addition": ProbeKind(addition, lambda options: [*DIGITS, "+", "="], "digits"),
    "parity": ProbeKind(parity, lambda options: [*DIGITS[:2], "="], "bits"),
}
