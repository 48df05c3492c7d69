"""Text into windows: packing, padding, one BOS, shares of domains, the same windows for the same seed."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_compress.data.documents import DataSpec, read_documents
from moe_compress.data.windows import make_windows
from moe_compress.zoo import text as zoo_text

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def spec(source, **changes):
    return DataSpec(**{"source": str(source), "use": "calibration", "samples": 4, "length": 8, **changes})


@pytest.fixture
def text_file(tmp_path):
    documents = [" ".join(WORDS[i : i + 12]) for i in range(8)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


def test_packed_windows_join_documents_that_each_begin_with_one_bos(text_file, tokenizer):
    found = make_windows(spec(text_file), tokenizer)
    assert found.ids_NS.shape == (4, 8) and found.mask_NS.all() and found.tokens == 32
    flat, number = found.ids_NS.flatten(), found.document_NS.flatten()
    begins = [0, *((number[1:] != number[:-1]).nonzero().flatten() + 1).tolist()]
    assert (flat == tokenizer.bos_token_id).nonzero().flatten().tolist() == begins


def test_text_that_already_begins_with_bos_gets_no_second_one(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("<s> " + " ".join(WORDS[:20]))
    ids = make_windows(spec(path, samples=1), tokenizer).ids_NS[0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_one_padded_document_a_window(text_file, tokenizer):
    found = make_windows(spec(text_file, packed=False, length=20), tokenizer)
    assert found.mask_NS.sum(1).tolist() == [13, 13, 13, 13]
    assert (found.ids_NS[~found.mask_NS] == tokenizer.pad_token_id).all()
    assert found.document_NS[:, 0].tolist() == [0, 1, 2, 3]


def test_seed_decides_the_order_and_the_fingerprint(text_file, tokenizer):
    first, again = (make_windows(spec(text_file, seed=1), tokenizer) for _ in range(2))
    other = make_windows(spec(text_file, seed=2), tokenizer)
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_carry_domains_that_are_mixed_as_asked(kind, tmp_path, tokenizer):
    rows = [{"body": " ".join(WORDS[i : i + 16]), "domain": "ab"[i % 2]} for i in range(20)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pd.DataFrame(rows).to_parquet(path)
    found = make_windows(spec(path, field="body", samples=8, mix=(("a", 3.0), ("b", 1.0))), tokenizer)
    assert found.domains == ("a", "b") and found.domain_N.tolist() == [0] * 6 + [1] * 2
    with pytest.raises(ValueError, match="unknown domain"):
        make_windows(spec(path, field="body", mix=(("c", 1.0),)), tokenizer)
    with pytest.raises(ValueError, match="unknown field"):
        make_windows(spec(path), tokenizer)


def test_too_little_text_says_so(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("w1 w2")
    with pytest.raises(ValueError, match="fewer tokens than one window"):
        make_windows(spec(path), tokenizer)


def test_what_there_is_is_used_when_it_is_less_than_asked(text_file, tokenizer, caplog):
    found = make_windows(spec(text_file, samples=100), tokenizer)
    assert len(found) == 8 * 13 // 8
    assert found.description["windows"] == len(found)


def test_another_text_than_the_shipped_one_is_said(tokenizer, caplog, monkeypatch):
    zoo = spec("zoo", samples=2, use="heldout")
    assert make_windows(zoo, tokenizer).description["text"] == zoo_text.SHIPPED_FINGERPRINT and not caplog.records
    monkeypatch.setattr(zoo_text, "fingerprint", lambda: "0" * 16)
    assert make_windows(zoo, tokenizer).description["text"] == "0" * 16
    assert "a table of their own" in caplog.text


HUB_ROWS = ["", " = First = \n", " a line \n", " = = Section = = \n", " b \n", " = Second = \n", " c \n"]


def test_wikitext_lines_become_articles_in_their_own_order(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": row} for row in HUB_ROWS])
    first, second = read_documents(spec("wikitext2", use="heldout"))
    assert first.text == " = First = \n a line \n = = Section = = \n b \n" and second.text == " = Second = \n c \n"


def test_one_split_for_both_uses_is_dealt_out(monkeypatch):
    class Rows(list):
        def shuffle(self, **_):
            return self

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows({"text": f"document {i}"} for i in range(40)))
    calibration, heldout = (
        {d.text for d in read_documents(spec("pile", use=use))} for use in ("calibration", "heldout")
    )
    assert calibration and heldout and not calibration & heldout and len(calibration | heldout) == 40


def test_conversations_of_the_hub(tokenizer, monkeypatch):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    asked = []

    class Rows(list):
        def shuffle(self, **how):
            asked.append(how["buffer_size"])
            return self

    def load(*names, split, streaming):
        asked.append((*names, split))
        return Rows([{"messages": json.dumps(turns)}] * 3)

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }} </s> {% endfor %}")
    found = make_windows(spec("org/talks[code](tool):2", samples=2, length=5, packed=False), tokenizer)
    assert asked == [("org/talks", "code", "tool"), 1000]
    assert found.ids_NS[0].tolist() == tokenizer.convert_tokens_to_ids(["w1", "w2", "</s>", "w3", "</s>"])
    assert found.description["source"] == "org/talks[code](tool)"


def test_several_sources_are_domains_with_equal_shares_or_those_of_the_mix(text_file, tmp_path, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(" ".join(WORDS[i : i + 12]) for i in range(20, 28)))
    found = make_windows(spec(f"{text_file},{other}"), tokenizer)
    assert found.domains == ("other.txt", "text.txt") and found.domain_N.tolist() == [0, 0, 1, 1]
    assert found.description["source"] == "text.txt,other.txt"
    mixed = make_windows(spec(f"{text_file},{other}", mix=(("text.txt", 3.0), ("other.txt", 1.0))), tokenizer)
    assert mixed.description["domains"] == {"other.txt": 1, "text.txt": 3}
    with pytest.raises(ValueError, match="sources of different names"):
        make_windows(spec(f"{text_file},{text_file}"), tokenizer)
    with pytest.raises(ValueError, match="there is no file"):
        make_windows(spec(f"{text_file},{tmp_path / 'no.txt'}"), tokenizer)
