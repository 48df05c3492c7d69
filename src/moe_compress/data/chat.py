"""Conversations as text: written by a tokenizer's chat template, and which of it the assistant says.

S characters or tokens of one conversation.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moe_compress.data.rows import REASONING, Conversation
from moe_compress.utils.bounds import bounded
from moe_compress.utils.logging import log

GENERATION = re.compile(r"\{%-?\s*generation\b")
# Templates that write today's date would make another text of the same rows every day: they are given this one.
DATE = datetime.datetime(2025, 1, 1)
CALENDAR = "".join(f" | replace({f'%{sign}'!r}, {DATE.strftime(f'%{sign}')!r})" for sign in "aAbBdHIjmMpSyY")
CLOCK = "{% macro strftime_now(format) %}{{ format" + CALENDAR + " }}{% endmacro %}"
MAX_TEMPLATE = 1 << 20
Messages = Sequence[Mapping[str, Any]]
# What a template may end in, those included that repeat themselves until memory or time is up.
CANNOT = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
    RecursionError, MemoryError, TimeoutError,
)  # fmt: skip
SECONDS, BYTES = 10.0, 1 << 30


class Chat:
    """The chat template of a tokenizer, or another one, and a system message for conversations without one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "", system: str = "") -> None:
        self.tokenizer, self.system = tokenizer, system
        self.template = _at_one_date(chat_template(tokenizer, template))
        self.warned = False

    def takes(self, conversation: Conversation) -> bool:
        """Whether the conversation is rendered: without a template, a question and its answer are plain text."""
        if self.template is None and not conversation.pair:
            raise ValueError(
                f"{conversation.where} is a conversation, but the model's tokenizer has no chat template: "
                "name one by template=FILE."
            )
        return self.template is not None

    def messages(self, conversation: Conversation) -> Messages:
        """The messages, behind the system message where they begin with none."""
        if not self.system or conversation.messages[0]["role"] in ("system", "developer"):
            return conversation.messages
        return [{"role": "system", "content": self.system}, *conversation.messages]

    def text(self, conversation: Conversation) -> str:
        """The whole conversation, as the template writes it."""
        messages = self.messages(conversation)
        if self.template is None:
            return "\n\n".join(message["content"] for message in messages if message["content"])
        if not self.warned and any(name in message for message in messages for name in REASONING):
            self.warned = True
            if not any(name in self.template for name in REASONING):
                log.warning(
                    "the chat template knows no reasoning: what %s holds of it is left out.", conversation.source
                )
        return self._rendered(messages, conversation)

    def _rendered(self, messages: Messages, conversation: Conversation, **how: Any) -> Any:
        """What the template makes of messages. ValueError, with the row, where it refuses them."""
        try:
            with bounded(SECONDS, BYTES):
                return self.tokenizer.apply_chat_template(
                    list(map(dict, messages)),
                    tools=list(conversation.tools) if conversation.tools else None,
                    chat_template=self.template,
                    **{"tokenize": False, **how},
                )
        except CANNOT as error:
            said = str(error) or f"it takes more than {BYTES >> 30} GiB"
            raise ValueError(f"{conversation.where}: the chat template cannot write it ({said}).") from error

    def assistant(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and which of them the assistant says, [S] each.

        The template's own marks decide (`{% generation %}`); without such, what it adds for each answer, from the end
        of the prompt for it to the end of its turn.
        """
        if not self.tokenizer.is_fast:
            raise ValueError("assistant_only=true needs a tokenizer that knows where in the text its tokens stand.")
        assert self.template is not None
        if GENERATION.search(self.template):
            messages = self.messages(conversation)
            found = self._rendered(
                messages, conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]
        text = self.text(conversation)
        spans = self._answers(conversation, text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counted = [any(start <= first < end for start, end in spans) for first, _ in found["offset_mapping"]]
        return found["input_ids"], counted

    def _answers(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Where in the text the assistant's turns stand, found by writing the conversation up to each of them."""
        messages = self.messages(conversation)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], conversation, add_generation_prompt=True) if number else ""
            after = self._rendered(messages[: number + 1], conversation)
            start, end = len(before), len(after)
            if not text.startswith(before) or not text.startswith(after):
                # The template writes earlier turns differently once others follow: without their reasoning, mostly.
                content = str(message.get("content") or "").strip()
                begun = start if text.startswith(before) else (spans[-1][1] if spans else 0)
                place = text.find(content, begun)
                if place < 0 or not content:
                    raise ValueError(
                        f"{conversation.where}, message {number + 1}: the chat template writes it differently once "
                        "others follow: assistant_only=true needs a template with {% generation %} marks (template=)."
                    )
                start, end = (start if text.startswith(before) else place), place + len(content)
            spans.append((start, end))
        return spans


def _at_one_date(template: str | None) -> str | None:
    """A template that asks for the date, with a calendar of its own in front."""
    if template is None or "strftime_now" not in template:
        return template
    # The first end of a line behind a block is taken for the block's.
    return CLOCK + ("\n" if template.startswith("\n") else "") + template


def chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The template's text: a file, one of the tokenizer's own by its name, or its default; None if it has none."""
    own = tokenizer.chat_template
    named: Mapping[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if not all(isinstance(text, str) for text in named.values()):
        raise ValueError("the tokenizer's chat_template is no text: name another by template=FILE.")
    if not template:
        return named.get("default") or next(iter(named.values()), None)
    if template in named:
        return named[template]
    path = Path(template)
    if not os.path.isfile(path):
        names = ", ".join(named) or "none"
        raise ValueError(f"template={template} is no file, and no template of the tokenizer, which has: {names}.")
    if path.stat().st_size > MAX_TEMPLATE:
        raise ValueError(f"template={template} has more than {MAX_TEMPLATE >> 20} MiB, and so is no chat template.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template={template} is not UTF-8 text ({error}).") from error
