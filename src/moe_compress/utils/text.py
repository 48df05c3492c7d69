"""Text of other people's files and names, on its way to a terminal, a table or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without the characters that a terminal would obey: all but letters, signs, spaces and ends of lines."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
