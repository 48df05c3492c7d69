"""What `data show` prints: documents as the tokenizer gets them, and what of them counts."""

from __future__ import annotations

import json
import sys

import pytest

import moe_compress
from moe_compress.cli.commands import main
from support import readers, tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tiny.make("mixtral", vocab_size=readers.VOCAB), tmp_path_factory.mktemp("chat") / "model")
    tokenizer = readers.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four ``` \x1b[2J"}]
    path.write_text(json.dumps({"messages": turns}))
    return path


def test_documents_are_shown_without_weights(model, rows, texts):
    data = f"{rows}, {texts / 'calibration.txt'}"
    found = moe_compress.show_data(model, data=data, documents=2, assistant_only=True)
    assert [document.where for document in found.documents] == [
        f"row 1 of {rows}", *["calibration.txt, domain text"] * 2
    ]  # fmt: skip
    first, second, _ = found.documents
    assert first.text == "<user>two?</s>\n<assistant>four ``` \x1b[2J</s>\n" and second.text in readers.LINES
    tokenizer = readers.tokenizer()
    assert first.tokens == len(tokenizer(first.text, add_special_tokens=False)["input_ids"])
    assert first.counted == "<assistant>four ``` \x1b[2J</s>\n" and second.counted is None
    shown = found.markdown()
    assert "````\n<user>two?</s>\n<assistant>four ``` \\x1b[2J</s>" in shown and "Of these count:" in shown


def test_the_command(model, rows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe-compress", "data", "show", str(model), f"data={rows}", "documents=1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "<user>two?</s>" in capsys.readouterr().out
    for words in (["data"], ["data", "shew", str(model)], ["data", "show", f"data={rows}"]):
        monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2


def test_no_documents(model, rows):
    with pytest.raises(ValueError, match="documents=0: at least 1 is shown"):
        moe_compress.show_data(model, data=rows, documents=0)
