"""The default text and the shipped models: the same for everybody, and held out is held out."""

from __future__ import annotations

import hashlib
import importlib.metadata

import pytest

from moe_compress import zoo
from moe_compress.zoo import tasks, text


@pytest.fixture(scope="module")
def small_splits() -> dict[str, tuple[text.Document, ...]]:
    return {split: text.documents(split) for split in ("calibration", "heldout")}


def solve(kind: str, prompt: str) -> str:
    """Answer a prompt from its words alone, by other means than the generator's."""
    question = prompt.removesuffix(" ->").split(": ", 1)[1]
    words = question.split()
    if kind == "copy":
        return question
    if kind == "sort":
        return " ".join(sorted(words))
    if kind == "sum":
        return str(sum(map(int, words[::2])))
    if kind == "recall":
        pairs, *_, asked = question.split("; ")
        words = pairs.split()
        return dict(zip(words[::2], words[1::2], strict=True))[asked]
    joined = "".join(words)
    while any(pair in joined for pair in ("()", "[]", "{}")):
        joined = joined.replace("()", "").replace("[]", "").replace("{}", "")
    return " ".join(joined[::-1].translate(str.maketrans("([{", ")]}")))


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_item_has_the_right_answer(split: str) -> None:
    for item in tasks.items(split, 500):
        assert item.answer == " " + solve(item.kind, item.prompt)


def test_items_are_the_same_everywhere() -> None:
    shown = "".join(
        f"{item.kind} {item.prompt}{item.answer}\n" for split in tasks.SPLITS for item in tasks.items(split, 500)
    )
    assert hashlib.sha256(shown.encode()).hexdigest()[:16] == "3224f248943cf871"
    first = tasks.items("heldout", 5)
    assert tasks.items("heldout", 50)[:5] == first
    assert tuple(item.kind for item in first) == tasks.KINDS


def test_no_item_is_in_two_splits() -> None:
    prompts = {split: {item.prompt for item in tasks.items(split, 5000)} for split in tasks.SPLITS}
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["train"] & prompts["calibration"]
    assert not prompts["calibration"] & prompts["heldout"]


def test_every_file_has_one_split() -> None:
    files = text._source_files()
    assert len({file.sha256 for file in files}) == len(files)
    shares = [text._split_of(file.sha256) for file in files]
    assert set(shares) == set(text.SPLITS)
    assert shares.count("train") > 0.75 * len(files)


def test_documents_are_disjoint(small_splits: dict[str, tuple[text.Document, ...]]) -> None:
    calibration, heldout = small_splits["calibration"], small_splits["heldout"]
    for part in (lambda document: document.source, lambda document: document.text):
        assert not {part(document) for document in calibration} & set(map(part, heldout))


def test_documents_are_enough(small_splits: dict[str, tuple[text.Document, ...]]) -> None:
    for documents in small_splits.values():
        for domain in text.DOMAINS:
            characters = sum(len(doc.text) for doc in documents if doc.domain == domain)
            assert characters > 250_000


@pytest.mark.slow  # the fingerprint, below, is that of the exact text
def test_documents_are_deterministic(small_splits: dict[str, tuple[text.Document, ...]]) -> None:
    assert text.documents("heldout") == small_splits["heldout"]


def test_code_has_no_docstrings_and_prose_has_no_code() -> None:
    source = 'def f():\n    """Say hello.\n\n    Twice.\n    """\n    return 1\n'
    assert text._parse(source) == ("Say hello.\n\nTwice.", "def f():\n    return 1")


def test_fingerprint_names_the_exact_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = "0f7b0ce0aa2a91f5"
    assert text.fingerprint() == shipped
    monkeypatch.setattr(tasks, "VERSION", tasks.VERSION + 1)
    assert text.fingerprint() != shipped


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.13.0")
    with pytest.raises(ValueError, match=r"pip install sympy==1\.14\.0"):
        text.documents("heldout")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="heldout"):
        text.documents("test")
    with pytest.raises(ValueError, match="heldout"):
        tasks.items("test", 1)
    with pytest.raises(ValueError, match="Did you mean 'tiny-mixtral'"):
        zoo.path("tiny-mixtrl")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_tokenizer_round_trip(name: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(zoo.path(name) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    for sample in ("def f(x):\n    return x ** 12\n", "naïve ∑ — 3.14", " leading space"):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_an_answer_cuts_the_tokens_where_it_begins() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(zoo.path("tiny-mixtral") / "tokenizer.json"))
    for item in tasks.items("heldout", 200):
        prompt = tokenizer.encode(item.prompt).ids
        assert tokenizer.encode(item.prompt + item.answer).ids[: len(prompt)] == prompt
