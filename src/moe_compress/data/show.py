"""What a text becomes before it is cut: documents as a tokenizer gets them, and what of them counts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moe_compress.data.chat import Chat
from moe_compress.data.documents import DataSpec, parts, read_documents, require_sources
from moe_compress.data.encoding import Encoder
from moe_compress.data.local import Text, pieces
from moe_compress.data.rows import Conversation
from moe_compress.data.sources import read_sources

CHARACTERS = 2000  # of a document that are shown
MOST_TOKENS = 1 << 16
UNSEEN = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document: where it is from, its text, how many tokens it has (`more`: at least), and the text that counts.

    counted: None where all of it does.
    """

    where: str
    text: str
    tokens: int
    more: bool
    counted: str | None


@dataclass(frozen=True, slots=True)
class ShownData:
    """The first documents of every source."""

    documents: Sequence[ShownDocument]

    def markdown(self) -> str:
        """A heading a document, its text as it is, and below it what the assistant says, where only that counts."""
        return "\n\n".join(
            part for number, document in enumerate(self.documents, 1) for part in _shown(number, document)
        )


def _shown(number: int, document: ShownDocument) -> list[str]:
    tokens = f"{'more than ' if document.more else ''}{document.tokens:,} tokens"
    found = [f"### {number}. {document.where}: {tokens}", _fenced(document.text)]
    return found if document.counted is None else [*found, "Of these count:", _fenced(document.counted)]


def _fenced(text: str) -> str:
    """The text between fences that it does not hold, with what a terminal would obey made visible."""
    shown = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text[:CHARACTERS])
    left = f"\n... ({len(text) - CHARACTERS:,} more characters)" if len(text) > CHARACTERS else ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}\n{shown}{left}\n{fence}"


def show(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, documents: int) -> ShownData:
    """The first documents of every source, in the order in which windows are cut out of them."""
    if documents < 1:
        raise ValueError(f"documents={documents}: at least 1 is shown.")
    require_sources(spec)
    encoder = Encoder(tokenizer, Chat(tokenizer, spec.template, spec.system), spec.assistant_only)
    found = []
    for source, part in zip(read_sources(spec.source), parts(spec), strict=True):
        some = itertools.islice(read_documents(part), documents)
        found += [_document(document, source.title, encoder) for document in some]
    if not found:
        raise ValueError(f"{spec.source} holds no text.")
    return ShownData(found)


def _document(document: Text, title: str, encoder: Encoder) -> ShownDocument:
    encoded = encoder.encode(document, MOST_TOKENS + 1)
    tokens = min(len(encoded.ids_S), MOST_TOKENS)
    counted = None
    if encoded.counted_S is not None:
        counted = str(encoder.tokenizer.decode(encoded.ids_S[encoded.counted_S]))
    if isinstance(document, Conversation):
        text, where = encoder.chat.text(document), document.where
    else:
        text, where = next(pieces(document), ""), f"{title}, domain {document.domain}"
    return ShownDocument(where, text, tokens, len(encoded.ids_S) > MOST_TOKENS, counted)
