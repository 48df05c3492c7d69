"""Synthetic tasks with one right answer: the text domain that a model can be marked on.

Perplexity moves smoothly under compression; accuracy on a task that needs several layers to
work together does not, so the zoo's models learn five small ones beside the text. An item is
one line, `prompt + answer`; the answer starts with the space that separates the two, so that
the tokenizer cuts the line at the same place with and without the answer.

The generator is the project's own (splitmix64 over a seed per split) and uses nothing of
`random`: the same items on every machine and every Python. An item belongs to one split
only, by the hash of its prompt, so held-out items were never trained on.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

VERSION = 1  # part of the text's fingerprint: raise it when any item changes
SPLITS = ("train", "calibration", "heldout")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BRACKETS = ("()", "[]", "{}")
HOMES = ("calibration", "heldout", "train", "train")  # the split of each quarter of all prompts
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Item:
    """One question: `prompt`, the only right `answer` (with its leading space), and its `kind`."""

    prompt: str
    answer: str
    kind: str


class Stream:
    """A splitmix64 stream of whole numbers."""

    def __init__(self, seed: int) -> None:
        self.state = seed & MASK

    def below(self, limit: int) -> int:
        """Return the next number of 0 .. limit - 1."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        mixed = self.state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        return ((mixed ^ (mixed >> 31)) * limit) >> 64

    def between(self, low: int, high: int) -> int:
        """Return the next number of low .. high, both included."""
        return low + self.below(high - low + 1)

    def distinct(self, symbols: str, count: int) -> list[str]:
        """Return `count` different symbols in random order."""
        pool = list(symbols)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def recall(stream: Stream) -> tuple[str, str]:
    """Look up the value of a key, after up to two keys that are answered in the prompt."""
    keys = stream.distinct(LETTERS, stream.between(2, 5))
    pairs = {key: f"{key} {LETTERS[stream.below(26)].upper()}" for key in keys}
    *answered, asked = stream.distinct("".join(keys), stream.between(1, min(3, len(keys))))
    parts = [" ".join(pairs.values()), *(pairs[key] for key in answered), asked]
    return f"recall: {'; '.join(parts)}", pairs[asked].removeprefix(asked)


def copy(stream: Stream) -> tuple[str, str]:
    """Repeat a row of letters."""
    row = " ".join(LETTERS[stream.below(26)] for _ in range(stream.between(2, 6)))
    return f"copy: {row} ->", f" {row}"


def add(stream: Stream) -> tuple[str, str]:
    """Add two to five numbers of 0 to 3."""
    terms = [stream.below(4) for _ in range(stream.between(2, 5))]
    return f"sum: {' + '.join(map(str, terms))} ->", f" {sum(terms)}"


def close(stream: Stream) -> tuple[str, str]:
    """Close the brackets that are still open, the last opened first."""
    shown: list[str] = []
    open_now: list[str] = []
    length = stream.between(2, 6)
    while len(shown) < length or not open_now:
        if open_now and stream.below(3) == 0:
            shown.append(open_now.pop()[1])
        else:
            open_now.append(BRACKETS[stream.below(3)])
            shown.append(open_now[-1][0])
    closing = " ".join(pair[1] for pair in reversed(open_now))
    return f"close: {' '.join(shown)} ->", f" {closing}"


def sort(stream: Stream) -> tuple[str, str]:
    """Put different letters in the order of the alphabet."""
    row = stream.distinct(LETTERS, stream.between(2, 5))
    return f"sort: {' '.join(row)} ->", f" {' '.join(sorted(row))}"


MAKERS: dict[str, Callable[[Stream], tuple[str, str]]] = {
    "recall": recall,
    "copy": copy,
    "sum": add,
    "close": close,
    "sort": sort,
}
KINDS = tuple(MAKERS)


def items(split: str, count: int) -> tuple[Item, ...]:
    """Return the first `count` items of a split; the kinds take turns."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    stream = Stream(int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big"))
    return tuple(_next_item(KINDS[index % len(KINDS)], split, stream) for index in range(count))


def home(prompt: str) -> str:
    """Return the one split that may hold this prompt."""
    return HOMES[hashlib.sha256(prompt.encode()).digest()[0] % len(HOMES)]


def _next_item(kind: str, split: str, stream: Stream) -> Item:
    while True:
        prompt, answer = MAKERS[kind](stream)
        if home(prompt) == split:
            return Item(prompt, answer, kind)
