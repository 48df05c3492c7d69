"""The first tokens of a document are those of the whole, and no more of it is read than they take."""

from __future__ import annotations

import gzip
import inspect
import io
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_compress import zoo
from moe_compress.data import encoding
from moe_compress.data.documents import DataSpec
from moe_compress.data.encoding import digest_of, first_ids
from moe_compress.data.local import LongText
from moe_compress.data.windows import make_windows
from moe_compress.zoo.text import Document
from support import readers
from support.slow import slow_after

TEXT = Path(inspect.__file__).read_text(encoding="utf-8")
CHINESE = "".join(chr(0x4E00 + number * 7919 % 3000) for number in range(20_000))


def trained(model, trainer, pre_tokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind of its own, trained on the text."""
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.Metaspace()
    made.train_from_iterator([TEXT[:40_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def without_words() -> PreTrainedTokenizerFast:
    """As older SentencePiece tokenizers: no words, merges over the whole text."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, max_token_length=6)
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Split("\n", "isolated"), normalizer)


def pieces_of(text: str, read: list[int], size: int = 700):
    """The text in pieces, whose sizes are noted as they are taken."""
    for start in range(0, len(text), size):
        read.append(size)
        yield text[start : start + size]


@pytest.mark.parametrize("make", [readers.tokenizer, unigram, without_words])
@pytest.mark.parametrize(
    "text", [TEXT[:60_000], CHINESE, " \n\t" * 5000 + TEXT[:9000]], ids=["prose", "hanzi", "blank"]
)
def test_the_beginning_is_that_of_the_whole(make, text, monkeypatch):
    monkeypatch.setattr(encoding, "SLACK", 100)
    tokenizer = make()
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for most in (1, 70, 500, 2900, len(whole) + 5):
        assert first_ids(pieces_of(text, []), tokenizer, most) == whole[:most]


def test_only_what_is_needed_is_read():
    read: list[int] = []
    tokenizer = readers.tokenizer()
    assert len(first_ids(pieces_of(TEXT * 100, read), tokenizer, 256)) == 256
    assert sum(read) < 8 * 256 + encoding.SLACK + 1000


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_long_document_is_read_to_the_end_of_the_windows(ending, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_compress.data.local.SHORT", 1 << 12)
    content = " ".join(readers.LINES * 400)
    path = tmp_path / f"long{ending}"
    path.write_bytes(content.encode() if ending == ".txt" else gzip.compress(content.encode()))
    tokenizer = readers.tokenizer()
    found = make_windows(DataSpec(source=str(path), use="calibration", samples=8, length=32), tokenizer)
    whole = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    assert found.ids_NS.flatten().tolist() == whole[: 8 * 32]


def test_documents_are_told_apart_by_their_words():
    text = "a b  c\n" * 10
    file = io.BytesIO(text.encode())
    same = LongText(file, 0, len(text), "text", "file")
    assert digest_of(Document(text, "x", "y")) == digest_of(same) == digest_of(Document("a b c " * 10, "", ""))
    assert digest_of(same) != digest_of(Document(text + "d", "", ""))


@pytest.mark.parametrize(
    ("words", "fingerprint"),
    slow_after(
        2,
        [
            ({"use": "calibration", "samples": 16, "length": 64, "seed": 3}, "615b3bb5d62c4560"),
            ({"use": "calibration", "samples": 24, "length": 128, "packed": False}, "84dc0dbf58da9feb"),
            ({"use": "calibration", "samples": 64, "length": 256}, "4224f2807d715dbc"),
            ({"use": "heldout", "samples": 216, "length": 256}, "4d1de4beb33800ad"),
        ],
    ),
)
def test_the_windows_of_the_shipped_tables_stay_what_they_are(words, fingerprint):
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("tiny-mixtral"))
    assert make_windows(DataSpec(source="zoo", **words), tokenizer).fingerprint == fingerprint
