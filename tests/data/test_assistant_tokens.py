"""Which tokens the assistant says, by a template's marks or by what it writes; only those count, all are seen."""

from __future__ import annotations

import json

import pytest
import torch

from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.data.chat import Chat
from moe_compress.data.documents import DataSpec
from moe_compress.data.rows import Shape, document_of
from moe_compress.data.windows import FOLDS, make_windows
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.models.families import family_of
from support import readers, tiny

BEGIN, END = "{% for m in messages %}<{{ m.role }}>", "</s>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = BEGIN + "{{ m.content }}" + END + PROMPT
MARKED = (
    BEGIN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}\n{% else %}"
    "{{ m.content }}</s>\n{% endif %}{% endfor %}" + PROMPT
)
# Only the last answer keeps its thought: earlier turns are written differently once others follow.
FORGETS = BEGIN + "{% if loop.last and m.role == 'assistant' %}(hm) {% endif %}{{ m.content }}" + END + PROMPT
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "they make four"},
    {"role": "user", "content": "and three?"},
    {"role": "assistant", "content": "six"},
]


def chat(template: str) -> Chat:
    tokenizer = readers.tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (PLAIN, "they make four</s>\nsix</s>\n"),
        (MARKED, "they make four</s>six</s>"),
        (FORGETS, "they make four(hm) six</s>\n"),
    ],
)
def test_what_the_assistant_says(template, answers):
    writer = chat(template)
    conversation = document_of({"messages": TURNS}, Shape(), "row 1", "file")
    ids, counted = writer.assistant(conversation)
    assert ids == writer.tokenizer.apply_chat_template(TURNS)["input_ids"]
    said = torch.tensor(ids)[torch.tensor(counted)]
    assert writer.tokenizer.decode(said) == answers


def test_an_answer_that_is_nowhere_in_the_text():
    writer = chat(BEGIN + "{{ m.content if loop.last else '...' }}" + END)
    with pytest.raises(ValueError, match=r"row 1, message 3: the chat template writes it differently .* generation"):
        writer.assistant(document_of({"messages": TURNS}, Shape(), "row 1", "file"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    path = tmp_path_factory.mktemp("said") / "rows.jsonl"
    rows = [{"messages": [{**TURNS[1], "content": line}, TURNS[2]]} for line in readers.LINES]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(source=str(path), use="calibration", samples=4, length=48, assistant_only=True)
    return make_windows(spec, chat(PLAIN).tokenizer)


def test_tokens_that_do_not_count_are_no_padding(windows):
    assert windows.mask_NS.all() and windows.mask_of(slice(0, 4), tiny.CPU) is None
    assert 0 < windows.tokens == int(windows.said_NS.sum()) < windows.ids_NS.numel()
    assert windows.description["tokens"] == windows.tokens
    assert windows.description["conversations"] == {"assistant_only": True}
    n, s = windows.predictions().unbind(1)
    assert windows.said_NS[n, s + 1].all() and len(n) == int(windows.said_NS[:, 1:].sum())
    some = windows.select(torch.tensor([2, 0]))
    assert torch.equal(some.counted_NS, windows.said_NS[[2, 0]]) and some.tokens < windows.tokens


def test_statistics_are_those_of_the_tokens_that_count(windows):
    model = tiny.make("mixtral", vocab_size=readers.VOCAB)
    family, components = family_of(model.config), len(windows.domains) * FOLDS
    chosen: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[-1]))
    seen, hidden = forward_layers(ResidentLayers(model), windows, [ExpertStatistics(family, model.config, components)])
    hook.remove()
    counted = torch.cat(chosen).reshape(windows.said_NS.numel(), -1)[windows.said_NS.flatten()]
    expected = torch.bincount(counted.flatten(), minlength=tiny.EXPERTS)
    assert torch.equal(seen[0][0]["count"].sum(0), expected.double())
    every = tiny.windows_of(windows.ids_NS)
    assert torch.equal(forward_layers(ResidentLayers(model), every)[1], hidden)


def test_words_about_conversations_need_some(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(readers.LINES))
    for words in ({"assistant_only": True}, {"system": "be brief"}):
        spec = DataSpec(source=str(tmp_path / "text.txt"), use="calibration", samples=2, length=16, **words)
        with pytest.raises(ValueError, match="holds no conversation that it is about"):
            make_windows(spec, chat(PLAIN).tokenizer)
