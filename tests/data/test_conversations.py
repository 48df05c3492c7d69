"""Rows of many shapes are the same conversation, written by the chat template; wrong ones name row and field."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from moe_compress.data import chat
from moe_compress.data.chat import Chat
from moe_compress.data.documents import DataSpec, read_documents
from moe_compress.data.rows import Shape, document_of, read_names
from moe_compress.data.windows import make_windows
from support import readers

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}(thought: {{ m.reasoning_content }}) {% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %} calls {{ call.function.arguments | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = TEMPLATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}", 1)
TURNS = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "they make four"}]
SHAREGPT = [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "they make four"}]
EXPECTED = "<user>two and two?</s>\n<assistant>they make four</s>\n"


@pytest.fixture(scope="module")
def tokenizer():
    made = readers.tokenizer()
    made.chat_template = TEMPLATE
    return made


def conversation(row, names="", text="text"):
    return document_of(row, Shape(text, read_names(names)), "row 1 of file", "file")


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": TURNS}, ""),
        ({"messages": json.dumps(TURNS)}, ""),
        ({"conversations": SHAREGPT}, ""),
        ({"conversation": TURNS, "text": None}, "text:conversation"),
        ({"messages": [{**TURNS[0], "tool_calls": None, "name": None}, TURNS[1]]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "two and two?"}]}, TURNS[1]]}, ""),
        ({"messages": ["two and two?", "they make four"]}, ""),
        (["two and two?", "they make four"], ""),
        (TURNS, ""),
        ({"instruction": "two and two?", "input": "", "output": "they make four"}, ""),
        ({"instruction": "two and two?", "response": "they make four"}, ""),
        ({"prompt": "two and two?", "completion": "they make four"}, ""),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ""),
        ({"question": "two and two?", "solution": "they make four"}, "prompt:question,completion:solution"),
        (
            {"dialog": [{"by": "Customer", "said": "two and two?"}, {"by": "Clerk", "said": "they make four"}]},
            "messages:dialog, role:by, content:said, user:Customer, assistant:Clerk",
        ),
    ],
)
def test_one_conversation_in_many_shapes(row, names, tokenizer):
    assert Chat(tokenizer).text(conversation(row, names)) == EXPECTED


def test_what_stands_beside_the_messages_is_rendered(tokenizer):
    call = {"function": {"name": "add", "arguments": '{"left": 2}'}}
    turns = [*TURNS[:1], {"role": "assistant", "content": "", "reasoning": "easy", "tool_calls": [call]}]
    row = {"messages": turns, "tools": '[{"name": "add"}]', "system": "be brief"}
    assert Chat(tokenizer).text(conversation(row)) == (
        '<tools>[{"name": "add"}]</tools><system>be brief</s>\n<user>two and two?</s>\n'
        '<assistant>(thought: easy)  calls {"left": 2}</s>\n'
    )
    asked = conversation({"instruction": "add", "input": "2 2", "output": "4"})
    assert Chat(tokenizer, system="be kind").text(asked).startswith("<system>be kind</s>\n<user>add\n\n2 2</s>")
    assert "be kind" not in Chat(tokenizer, system="be kind").text(conversation(row))


def test_windows_are_what_the_template_makes_of_the_rows(tokenizer, tmp_path):
    rows = [{"messages": [{**TURNS[0], "content": line}, TURNS[1]]} for line in readers.LINES]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    spec = DataSpec(source=str(path), use="calibration", samples=8, length=96, packed=False)
    found = make_windows(spec, tokenizer)
    expected = {tuple(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows}
    assert {tuple(ids[mask].tolist()) for ids, mask in zip(found.ids_NS, found.mask_NS, strict=True)} == expected
    parquet = DataSpec(source=str(tmp_path / "rows.parquet"), use="calibration", samples=8, length=96, packed=False)
    assert torch.equal(make_windows(parquet, tokenizer).ids_NS, found.ids_NS)


def test_other_templates(tokenizer, tmp_path):
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ strftime_now('%d %B %Y') }}"
    )
    asked = conversation({"messages": TURNS})
    assert Chat(tokenizer, str(tmp_path / "other.jinja")).text(asked) == "[two and two?][they make four]01 January 2025"
    several = readers.tokenizer()
    several.chat_template = {"default": TEMPLATE, "short": "{{ messages | length }}"}
    assert (Chat(several).text(asked), Chat(several, "short").text(asked)) == (EXPECTED, "2")
    with pytest.raises(ValueError, match="no template of the tokenizer, which has: default, short"):
        Chat(several, "long")
    (tmp_path / "broken.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match=r"row 1 of file: the chat template cannot write it \(no system here\)"):
        Chat(tokenizer, str(tmp_path / "broken.jinja")).text(asked)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**11 }}", "it takes more than 1 GiB"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "more than 0.2 seconds"),
    ],
)
def test_a_template_that_would_not_end_is_stopped(template, said, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    (tmp_path / "endless.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"row 1 of file: the chat template cannot write it .*{said}"):
        Chat(tokenizer, str(tmp_path / "endless.jinja")).text(conversation({"messages": TURNS}))


def test_without_a_template(tokenizer):
    plain = Chat(readers.tokenizer())
    with pytest.raises(
        ValueError, match="row 1 of file is a conversation, but the model's tokenizer has no chat template"
    ):
        plain.takes(conversation({"messages": TURNS}))
    asked = conversation({"instruction": "add", "input": "2 2", "output": "4"})
    assert not plain.takes(asked) and plain.text(asked) == "add\n\n2 2\n\n4"


def test_reasoning_that_a_template_does_not_know_is_said(tokenizer, tmp_path, caplog):
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    thought = conversation({"messages": [TURNS[0], {**TURNS[1], "thinking": "easy"}]})
    Chat(tokenizer).text(thought)
    assert not caplog.records
    Chat(tokenizer, str(tmp_path / "plain.jinja")).text(thought)
    assert "the chat template knows no reasoning" in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": ["a"]}, "row 1 of file holds a list in `text`, not text"),
        ({"text": 7}, "row 1 of file holds a number in `text`, not text"),
        ({"text": {"en": "a"}}, "row 1 of file holds an object in `text`, not text"),
        (7, "row 1 of file is a number"),
        ({"messages": 7}, "row 1 of file holds a number in `messages`"),
        ({"messages": "[{"}, "row 1 of file: `messages` is not valid JSON"),
        ({"messages": [TURNS[0], 7]}, "row 1 of file: `messages`, message 2 is a number"),
        ({"messages": [{"by": "x", "said": "y"}]}, "names no role in `role`; its fields: by, said"),
        ({"messages": [{"role": None, "content": "y"}]}, "names no role in `role`"),
        ({"messages": [{"role": "user", "said": "y"}]}, "message 1 has no `content`"),
        ({"messages": [{"role": "user", "content": 7}]}, "message 1 holds a number in `content`, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of the kind 'image'"),
        ({"messages": TURNS, "tools": "{"}, "row 1 of file: `tools` is not valid JSON"),
        ({"messages": TURNS, "tools": {}}, "row 1 of file holds an object in `tools`, not a list"),
        ({"prompt": 7, "completion": "a"}, "row 1 of file holds a number in `prompt`, not text"),
    ],
)
def test_rows_of_another_kind_are_named(row, said):
    with pytest.raises(ValueError, match=said):
        conversation(row)


def test_rows_that_hold_nothing():
    empty = [{"text": ""}, {"text": None}, {"messages": []}, {"prompt": "", "completion": None}]
    assert [conversation(row) for row in empty] == [None] * 4
    with pytest.raises(KeyError):
        conversation({"body": "a"})


def test_rows_without_a_known_field_are_left_out_or_named(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}')
    spec = DataSpec(source=str(path), use="calibration", samples=4, length=8)
    assert [document.text for document in read_documents(spec)] == ["a"]
    assert "rows without a known field are left out, such as row 2" in caplog.text
    path.write_text('{"turns": []}')
    with pytest.raises(ValueError, match=r"unknown field of rows.jsonl 'text'.*known: turns.*fields="):
        read_documents(spec)
