"""How much longer a tokenizer makes a text before it cuts it into tokens: one that multiplies it takes all memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_compress.utils.files import read_json

# Characters that one may become. Unicode's own forms make at most 18 of one, SentencePiece's tables no more.
MOST = 1000
GROWING = (b'"Replace"', b'"Prepend"')


def require_bounded(folder: Path) -> None:
    """Raise ValueError for a tokenizer.json whose replacements, one after the other, make too much of a character.

    Before it is loaded: that normalizes the tokens that were added to its vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or not any(word in path.read_bytes() for word in GROWING):
        return
    try:
        growth = _growth(read_json(path)["normalizer"])
    except (TypeError, KeyError, AttributeError):
        return  # whoever loads it says what is wrong
    if growth > MOST:
        raise ValueError(
            f"the normalizer of {path} makes up to {growth:.2g} characters of one, and at most {MOST} are taken: it is "
            "broken; fetch it again."
        )


def _growth(state: Any) -> float:
    """Characters that come of one, at most, of what replaces or puts in front; 1 for all other kinds."""
    if state is None:
        return 1.0
    if state["type"] == "Sequence":
        found = 1.0
        for each in state["normalizers"]:
            found = min(found * _growth(each), 1e300)
        return found
    if state["type"] == "Prepend":
        return 1.0 + len(state["prepend"])
    if state["type"] != "Replace":
        return 1.0
    sought, made = state["pattern"].get("String"), len(state["content"])
    # A pattern may match nothing at all, before every character and at the end.
    return 2.0 * made + 1.0 if sought is None else max(1.0, made / max(len(sought), 1))
