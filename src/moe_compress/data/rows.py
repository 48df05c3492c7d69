"""Rows of data sets as documents: text, conversations, and pairs of a question and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_compress.utils.choices import one_of
from moe_compress.zoo.text import Document

CONVERSATIONS = ("messages", "conversations", "conversation")
# What is asked, what may belong to it, what is answered.
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
)
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
NAMES = (
    "text", "domain", "messages", "role", "content", "system", "tools", "instruction", "input", "output", "prompt",
    "completion", "user", "assistant", "tool", *REASONING,
)  # fmt: skip
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", type(None): "nothing"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them, and the tools that they may call; `where`: its row, for messages.

    pair: a question and its answer, which is plain text to a tokenizer without a chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    domain: str
    source: str
    where: str
    pair: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows are read. text: the field that holds it; names: what we call a field or a role -> what the rows do."""

    text: str = "text"
    names: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """What the rows call it."""
        return self.names.get(name, name)


def read_names(text: str) -> dict[str, str]:
    """`messages:dialog,role:speaker,user:customer` as our name -> theirs. ValueError for names that mean nothing."""
    names: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        ours, colon, theirs = (part.strip() for part in word.partition(":"))
        if not colon or not theirs or ours in names:
            raise ValueError(
                f"fields={text}: write name:theirs,name:theirs once each, such as messages:dialog,role:by."
            )
        names[one_of(ours, NAMES, "name in fields=")] = theirs
    return names


def document_of(row: Any, shape: Shape, where: str, source: str) -> Document | Conversation | None:
    """What a row says; None if nothing stands in it. ValueError, with the row and the field, for another kind of value.

    A list of strings is a conversation in turns, the user's first. KeyError if no field of the row is known.
    """
    if isinstance(row, str | list):
        return _value(row, "row", shape, "text", where, source, row_like={})
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_kind(row)}: an object with fields, a text or a list of messages is needed.")
    domain = str(row.get(shape.of("domain")) or "text")
    for name in (shape.of("text") if "text" in shape.names else shape.text, *_conversation_fields(shape)):
        if name in row:
            return _value(row[name], name, shape, domain, where, source, row)
    for question, more, answer in PAIRS:
        asked, answered = shape.of(question), shape.of(answer)
        if asked in row and answered in row:
            return _pair(row, (asked, shape.of(more) if more else None, answered), shape, domain, where, source)
    raise KeyError(shape.text)


def _conversation_fields(shape: Shape) -> tuple[str, ...]:
    return (shape.names["messages"],) if "messages" in shape.names else CONVERSATIONS


def _value(
    value: Any, name: str, shape: Shape, domain: str, where: str, source: str, row_like: Mapping[str, Any]
) -> Document | Conversation | None:
    """What a field holds: a text, or a list of messages, which may be written as JSON where messages are expected."""
    if isinstance(value, str) and name in _conversation_fields(shape) and value.lstrip().startswith("["):
        value = _from_json(value, f"{where}: `{name}`")
    if value is None or value in ("", []):
        return None
    if isinstance(value, str):
        return Document(_text(value, name, where), domain, source)
    if not isinstance(value, list) or (name == "text" and not isinstance(value[0], dict)):
        raise ValueError(f"{where} holds {_kind(value)} in `{name}`, not text.")
    messages = _messages(value, shape, f"{where}: `{name}`")
    return _conversation(messages, row_like, shape, domain, where, source)


def _pair(
    row: Mapping[str, Any], names: tuple[str, str | None, str], shape: Shape, domain: str, where: str, source: str
) -> Conversation | None:
    """A question, what belongs to it, and its answer: each a text, or a list of messages."""
    question, more, answer = names
    asked, answered = row[question], row[answer]
    if not asked and not answered:
        return None
    if isinstance(asked, list) or isinstance(answered, list):
        turns = [
            message
            for name, role, value in ((question, "user", asked), (answer, "assistant", answered))
            for message in (
                _messages(value, shape, f"{where}: `{name}`")
                if isinstance(value, list)
                else [{"role": role, "content": _text(value, name, where)}]
            )
        ]
        return _conversation(turns, row, shape, domain, where, source)
    parts = [_text(row[name], name, where) for name in (question, more) if name is not None and row.get(name)]
    turns = [
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": _text(answered, answer, where)},
    ]
    return _conversation(turns, row, shape, domain, where, source, pair=True)


def _conversation(
    messages: list[dict[str, Any]],
    row: Mapping[str, Any],
    shape: Shape,
    domain: str,
    where: str,
    source: str,
    pair: bool = False,
) -> Conversation:
    """Messages with what the row says beside them: a system message and tools."""
    system, tools = row.get(shape.of("system")), row.get(shape.of("tools"))
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system, shape.of("system"), where)}, *messages]
    if isinstance(tools, str):
        tools = _from_json(tools, f"{where}: `{shape.of('tools')}`") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where} holds {_kind(tools)} in `{shape.of('tools')}`, not a list of tools.")
    return Conversation(messages, _without_nothing(tools) or None, domain, source, where, pair)


def _messages(value: Sequence[Any], shape: Shape, where: str) -> list[dict[str, Any]]:
    """Messages with roles and content as templates call them; strings are turns, the user's first."""
    if all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(value)]
    return [_message(message, shape, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, shape: Shape, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {_kind(message)}, not an object with a role and a content.")
    role_name = next((name for name in (shape.of("role"), "role", "from") if name in message), None)
    content_name = next((name for name in (shape.of("content"), "content", "value") if name in message), None)
    role = message[role_name] if role_name else None
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"{where} names no role in `{role_name or shape.of('role')}`; its fields: {', '.join(map(str, message))}. "
            "fields=role:NAME,content:NAME says which they are."
        )
    ours = {shape.names[name]: name for name in ("system", "user", "assistant", "tool") if name in shape.names}
    kept = {key: _without_nothing(value) for key, value in message.items() if key not in (role_name, content_name)}
    content = message[content_name] if content_name else None
    if content is None and not kept.get("tool_calls") and content_name is None:
        raise ValueError(f"{where} has no `{shape.of('content')}`; its fields: {', '.join(map(str, message))}.")
    found = {**kept, "role": ours.get(role, ROLES.get(role.lower(), role)), "content": _content(content, where)}
    reasoning = next((kept[shape.of(name)] for name in REASONING if kept.get(shape.of(name))), None)
    if reasoning:
        found[REASONING[0]] = reasoning
    if isinstance(calls := kept.get("tool_calls"), list):
        found["tool_calls"] = [_call(call) for call in calls]
    return {key: value for key, value in found.items() if value is not None}


def _content(content: Any, where: str) -> str | None:
    """A content as text: parts of text are joined, parts of other kinds are refused."""
    if not isinstance(content, list):
        return None if content is None else _text(content, "content", where)
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    strange = next((part for part in parts if not isinstance(part.get("text"), str)), None)
    if strange is not None:
        raise ValueError(f"{where} holds a part of the kind {strange.get('type', 'unknown')!r}: only text is read.")
    return "".join(part["text"] for part in parts)


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates expect, where they were written as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {_kind(value)} in `{name}`, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = f"a byte that is not UTF-8 (0x{code - 0xDC00:02x})" if 0xDC80 <= code <= 0xDCFF else "half a character"
        raise ValueError(f"{where} holds {what} in `{name}`, behind {error.start} characters.") from error
    return value


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}).") from error


def _without_nothing(value: Any) -> Any:
    """Objects without the keys that hold nothing: tables fill in those that other rows have."""
    if isinstance(value, dict):
        return {key: _without_nothing(each) for key, each in value.items() if each is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "an object")
