"""How `data=` is written: one source or several, each with a configuration, a split and a number of windows.

    evol.jsonl:512, open-r1/Mixture-of-Thoughts[code]:256, SWE-bench/SWE-smith-trajectories(tool):256, c4

The name of a file that exists is that file, whatever stands in it: commas, colons, brackets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_WINDOWS = 2**31 - 1
MAX_SOURCES = 64
HOW = "write SOURCE[config](split):windows, such as c4:128, and a comma between several"
# What may stand behind a name, from the right to the left.
WINDOWS = re.compile(r":\s*([^:/\\,()\[\]]*)\Z")
SPLIT = re.compile(r"\(([^(),]*)\)\Z")
CONFIG = re.compile(r"\[([^\[\],]*)\]\Z")


@dataclass(frozen=True, slots=True)
class Source:
    """A file or data set by its name; config and split None, and windows None: not said."""

    name: str
    config: str | None = None
    split: str | None = None
    windows: int | None = None

    @property
    def title(self) -> str:
        """What the source is called: a file without the path to it, a data set with the part of it that is meant."""
        name = os.path.basename(self.name) if os.path.exists(self.name) else self.name
        return f"{name}{f'[{self.config}]' if self.config else ''}{f'({self.split})' if self.split else ''}"


def read_sources(text: str) -> tuple[Source, ...]:
    """The sources of a `data=`. ValueError for what is no source, and for a source that is named twice."""
    found = tuple(_source(word, text) for word in _words(text))
    if len({each.title for each in found}) < len(found):
        raise ValueError(f"{text}: sources of different names are needed.")
    return found


def windows_named(text: str) -> int | None:
    """How many windows a `data=` asks for, where every source says its number."""
    counts = [source.windows for source in read_sources(text)] if text else [None]
    return None if None in counts else sum(count or 0 for count in counts)


def shares(sources: Sequence[Source], total: int) -> dict[str, int | None]:
    """Windows of each source by its title; None for those that share what is left of `total`.

    Raises ValueError if nothing is left for them, or if `total` is another number than all of them name together.
    """
    counts = {source.title: source.windows for source in sources}
    named = sum(count or 0 for count in counts.values())
    if None not in counts.values() and named != total:
        raise ValueError(f"the sources name {named} windows, but samples={total}: leave samples= out, or the numbers.")
    if None in counts.values() and named >= total:
        rest = next(title for title, count in counts.items() if count is None)
        raise ValueError(f"the sources name {named} of samples={total} windows, and none is left for {rest}.")
    return counts


def _words(text: str) -> list[str]:
    """The text cut at commas, but not within the name of a file that exists."""
    pieces = text.split(",")
    if len(pieces) > MAX_SOURCES:
        raise ValueError(f"{text[:60]}...: at most {MAX_SOURCES} sources are read.")
    words, first = [], 0
    while first < len(pieces):
        for end in range(len(pieces), first, -1):
            word = ",".join(pieces[first:end]).strip()
            if end == first + 1 or os.path.exists(_bare(word)):
                words.append(word)
                first = end
                break
    return words


def _bare(word: str) -> str:
    """The word without what may stand behind a name; whole where that is the name of a file."""
    for ending in (WINDOWS, SPLIT, CONFIG):
        if os.path.exists(word):
            return word
        word = ending.sub("", word).rstrip()
    return word


def _source(word: str, text: str) -> Source:
    if os.path.exists(word):
        return Source(word)
    name, windows = _ending(word, WINDOWS)
    # A drive (`C:file.txt`) is no name with windows behind it.
    if windows is not None and re.fullmatch(r"[A-Za-z]", name) and not windows.isdigit():
        name, windows = word, None
    if os.path.exists(name):
        return Source(name, windows=_count(windows, word))
    name, split = _ending(name, SPLIT)
    if not os.path.exists(name):
        name, config = _ending(name, CONFIG)
    else:
        config = None
    if not name or "" in (config, split):
        raise ValueError(f"{text!r} holds {word!r}, which is no source: {HOW}.")
    return Source(name, config, split, _count(windows, word))


def _ending(word: str, ending: re.Pattern[str]) -> tuple[str, str | None]:
    found = ending.search(word)
    return (word[: found.start()].rstrip(), found[1].strip()) if found else (word, None)


def _count(windows: str | None, word: str) -> int | None:
    if windows is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", windows) or not 0 < int(windows) <= MAX_WINDOWS:
        raise ValueError(f"{word}: behind the colon stands a number of windows, from 1 to {MAX_WINDOWS}; {HOW}.")
    return int(windows)
