"""Documents into token ids, as far as they are needed. S tokens of one document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_compress.data.chat import Chat
from moe_compress.data.local import LongText, Text, pieces
from moe_compress.data.rows import Conversation
from moe_compress.zoo.text import Document

# A text that goes on is cut at a blank, and what the cut may have changed is dropped: its last tokens.
DROPPED = 64
LOOKED_BACK = 1024
FIRST_LOOK, SLACK = 1 << 16, 1 << 12
COMPARED = 1 << 16  # characters by which documents are told apart


@dataclass(frozen=True, slots=True)
class Encoded:
    """The first token ids of a document, which of them count (None: all), and what tells it from others."""

    ids_S: Tensor
    counted_S: Tensor | None
    digest: str


class Encoder:
    """A tokenizer with what has to be known of a text: how conversations are written, and what of them counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, assistant_only: bool = False) -> None:
        self.tokenizer, self.chat, self.assistant_only = tokenizer, chat, assistant_only
        self.conversations = 0
        probe = tokenizer("a")["input_ids"]
        # Only where the tokenizer begins texts with it; a chat template writes its own.
        self.bos = tokenizer.bos_token_id if probe and probe[0] == tokenizer.bos_token_id else None

    def encode(self, document: Text, most: int) -> Encoded:
        """At most `most` token ids of a document."""
        if isinstance(document, Conversation):
            self.conversations += 1
            text = self.chat.text(document) if self.chat.takes(document) else None
            if text is not None:
                return self._conversation(document, text, most)
            document = Document(self.chat.text(document), document.domain, document.source)
        ids = first_ids(pieces(document), self.tokenizer, most)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids][:most]
        return Encoded(torch.tensor(ids, dtype=torch.long), None, digest_of(document))

    def _conversation(self, conversation: Conversation, text: str, most: int) -> Encoded:
        digest = digest_of(Document(text, "", ""))
        if not self.assistant_only:
            ids = first_ids(iter((text,)), self.tokenizer, most)
            return Encoded(torch.tensor(ids, dtype=torch.long), None, digest)
        ids, counted = self.chat.assistant(conversation)
        return Encoded(
            torch.tensor(ids[:most], dtype=torch.long), torch.tensor(counted[:most], dtype=torch.bool), digest
        )


def first_ids(text: Iterator[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """The first `most` token ids of a text in pieces: those of the whole text, of which no more is read than it takes.

    What follows a place changes the tokens before it by a word at most, so the last few in front of a cut are dropped.
    """
    read, ended, wanted = "", False, min(8 * most + SLACK, FIRST_LOOK)
    while True:
        while len(read) < wanted and not ended:
            piece = next(text, None)
            ended = piece is None
            read += piece or ""
        part = read if ended and len(read) <= wanted else read[: _cut(read, wanted)]
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if ended and len(part) == len(read):
            return ids[:most]
        certain = max(len(ids) - DROPPED, 0)
        if certain >= most:
            return ids[:most]
        # As much as it takes at this many characters a token, and at least twice as much.
        wanted = max(2 * wanted, int(1.2 * most * len(part) / max(certain, 1)) if certain else 0)


def _cut(text: str, wanted: int) -> int:
    """Where to cut: before the last blank that is near enough, else where it was wanted."""
    found = max(text.rfind(blank, wanted - LOOKED_BACK, wanted) for blank in (" ", "\n"))
    return found if found > 0 else wanted


def digest_of(document: Document | LongText) -> str:
    """What tells documents apart: their first characters, whatever blanks are between their words."""
    text = ""
    for piece in pieces(document):
        text += piece[:COMPARED]
        if len(text) >= COMPARED:
            break
    return hashlib.sha256(" ".join(text[:COMPARED].split()).encode(errors="surrogatepass")).hexdigest()
