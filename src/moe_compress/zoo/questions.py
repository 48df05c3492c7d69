"""Multiple-choice questions made of the zoo's own text: tasks that a model can be marked on without a download.

    cloze   how does this line of prose or code go on? The wrong answers are ends of lines of other documents.
    quiz    the items of `moe_compress.zoo.tasks`; the wrong answers differ from the right one in a symbol or two.

Both are made anew from the text whenever they are asked for, and are the same every time and everywhere. Wrong answers
are as long as the right one, in characters, wherever there are enough of them.
"""

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from moe_compress.zoo import tasks, text

VERSION = 1  # raise it when any question changes for equal text
CHOICES = 4
DOMAINS = ("prose", "code")
LINES_PER_DOCUMENT = 4
MIN_WORDS = 6  # shorter lines say too little once they are cut
CONTEXT_CHARS = 240  # of the lines before, which a model reads first
TAIL_CHARS = 48  # longer ends differ in so much that any model knows them apart
ALPHABET_ITEMS = 2000
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is shown, `choices` of which one goes on rightly, its index, and where the question comes from.

    A choice starts with the space that separates it from the prompt.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    source: str


@dataclass(frozen=True)
class Tail:
    """The second half of a line, and the text before it."""

    prompt: str
    end: str
    source: str


def cloze(split: str, count: int) -> tuple[Question, ...]:
    """Return the first `count` questions of a split, a line of every document before a second line of any."""
    stream = _stream("cloze", split)
    rounds: list[list[tuple[str, Tail]]] = [[] for _ in range(LINES_PER_DOCUMENT)]
    pools: dict[str, dict[int, list[Tail]]] = {domain: defaultdict(list) for domain in DOMAINS}
    for document in text.documents(split):
        if document.domain in DOMAINS:
            found = list(_tails(document))
            for tail in found:
                pools[document.domain][len(tail.end)].append(tail)
            for number, tail in enumerate(_draw(stream, found, LINES_PER_DOCUMENT)):
                rounds[number].append((document.domain, tail))
    asked = [entry for each in rounds for entry in each][:count]
    return tuple(_question(stream, tail, _others(stream, tail, pools[domain])) for domain, tail in asked)


def quiz(split: str, count: int) -> tuple[Question, ...]:
    """Return the first `count` questions of a split; the kinds of items take turns."""
    stream = _stream("quiz", split)
    alphabets: dict[str, set[str]] = defaultdict(set)
    for item in tasks.items(split, ALPHABET_ITEMS):
        alphabets[item.kind].update(item.answer.split())
    return tuple(
        _question(stream, Tail(item.prompt, item.answer, item.kind), _slips(stream, item, sorted(alphabets[item.kind])))
        for item in tasks.items(split, count)
    )


MAKERS: dict[str, Callable[[str, int], tuple[Question, ...]]] = {"local_cloze": cloze, "local_quiz": quiz}


def _stream(name: str, split: str) -> tasks.Stream:
    return tasks.Stream(int.from_bytes(hashlib.sha256(f"{name} {split}".encode()).digest()[:8], "big"))


def _draw(stream: tasks.Stream, pool: Iterable[T], count: int) -> list[T]:
    """Up to `count` different ones, in random order."""
    left = list(pool)
    return [left.pop(stream.below(len(left))) for _ in range(min(count, len(left)))]


def _question(stream: tasks.Stream, right: Tail, wrong: list[str]) -> Question:
    place = stream.below(CHOICES)
    return Question(right.prompt, (*wrong[:place], right.end, *wrong[place:]), place, right.source)


# --- lines ----------------------------------------------------------------------------------------------------


def _tails(document: text.Document) -> Iterator[Tail]:
    """The lines that are long enough, cut in the middle, at a space."""
    start = 0
    for line in document.text.split("\n"):
        spaces = [place.start() for place in re.finditer(r"(?<=\S) (?=\S)", line)]
        if start and len(spaces) + 1 >= MIN_WORDS:
            cut = spaces[len(spaces) // 2]
            before = document.text[max(0, start - CONTEXT_CHARS) : start]
            if start > CONTEXT_CHARS:
                before = before.partition("\n")[2]
            yield Tail(before + line[:cut], _shortened(line[cut:].rstrip()), document.source)
        start += len(line) + 1


def _shortened(end: str) -> str:
    """As many whole words as fit."""
    if len(end) <= TAIL_CHARS:
        return end
    cut = end.rfind(" ", 1, TAIL_CHARS + 1)
    return end[: cut if cut > 0 else TAIL_CHARS].rstrip()


def _others(stream: tasks.Stream, right: Tail, pool: dict[int, list[Tail]]) -> list[str]:
    """Ends of other documents' lines, of the right one's length if there are enough, else the nearest lengths first."""
    found: list[str] = []
    for length in sorted(pool, key=lambda each: (abs(each - len(right.end)), each)):
        fitting = {tail.end for tail in pool[length] if tail.source != right.source} - {right.end}
        found += _draw(stream, sorted(fitting), CHOICES - 1 - len(found))
        if len(found) == CHOICES - 1:
            break
    return found


# --- items ------------------------------------------------------------------------------------------------------


def _slips(stream: tasks.Stream, item: tasks.Item, alphabet: list[str]) -> list[str]:
    """Nearly right: two neighbours swapped, or another symbol, one of the prompt where the right ones are."""
    right = item.answer.split()
    shown = [word for word in re.findall(r"[^\s;]+", item.prompt) if word in alphabet]
    shown = shown if set(right) <= set(shown) else []
    swapped = [[*right[:i], right[i + 1], right[i], *right[i + 2 :]] for i in range(len(right) - 1)]
    tiers = [swapped + _replaced(right, shown), _replaced(right, alphabet), [[*right, word] for word in alphabet]]
    found: list[str] = []
    for even, tier in itertools.product((True, False), tiers):
        answers = {"".join(f" {word}" for word in words) for words in tier} - {item.answer, *found}
        fitting = sorted(answer for answer in answers if (len(answer) == len(item.answer)) == even)
        found += _draw(stream, fitting, CHOICES - 1 - len(found))
    return found


def _replaced(right: list[str], symbols: Iterable[str]) -> list[list[str]]:
    return [[*right[:i], word, *right[i + 1 :]] for word in symbols for i in range(len(right))]
