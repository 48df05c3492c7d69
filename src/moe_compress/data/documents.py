"""Where documents come from: the zoo, a file, or a data set on the hub; always in the order of a seed."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_compress.utils.choices import one_of
from moe_compress.zoo import text as zoo_text
from moe_compress.zoo.text import Document

Use = Literal["calibration", "heldout"]


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A data set known by a short name: where the hub keeps it and which split serves which use.

    lines: its rows are lines of articles, which are joined again.
    """

    path: str
    config: str | None
    field: str
    calibration: str
    heldout: str
    lines: bool = False


HEADING = re.compile(r"= [^=].*[^=] =")
NAMED = {
    "c4": NamedSet("allenai/c4", "en", "text", "train", "validation"),
    "wikitext2": NamedSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test", lines=True),
    "pile": NamedSet("mit-han-lab/pile-val-backup", None, "text", "validation", "validation"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which text, how much of it, cut how.

    source: `zoo`, a .txt/.jsonl/.parquet file, a name of NAMED, or any id of a `datasets` data set, or several of them,
    joined by commas, which are its domains then;
    samples x length tokens; packed: documents joined and cut at every `length` tokens, else one padded
    document a window; mix: shares of the domains; config, split and field only for hub data sets and files.
    """

    source: str
    use: Use
    samples: int
    length: int
    seed: int = 0
    packed: bool = True
    config: str | None = None
    split: str | None = None
    field: str = "text"
    mix: tuple[tuple[str, float], ...] = ()


def parts(spec: DataSpec) -> list[DataSpec]:
    """The sources of a text that has several, joined by commas; a file may have a comma in its name."""
    whole = "," not in spec.source or Path(spec.source).exists()
    return [spec] if whole else [replace(spec, source=source.strip()) for source in spec.source.split(",")]


def title(spec: DataSpec) -> str:
    """What a source is called: a file by its name, without the path to it."""
    return ",".join(Path(part.source).name if Path(part.source).exists() else part.source for part in parts(spec))


def text_identity(spec: DataSpec) -> list[Any]:
    """A text by its settings, and by its content where that is at hand."""
    if len(parts(spec)) > 1:
        return [text_identity(part) for part in parts(spec)]
    path = Path(spec.source)
    if spec.source == "zoo":
        content = zoo_text.fingerprint()
    else:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return [repr(replace(spec, source=path.name if content else spec.source)), content]


def read_documents(spec: DataSpec) -> list[Document] | Iterable[Document]:
    """The documents of one source, shuffled by the seed: a list, or a stream from the hub."""
    if spec.source == "zoo":
        return _shuffled(list(_zoo_documents(spec.use)), spec.seed)
    path = Path(spec.source)
    if path.suffix in (".txt", ".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        return _shuffled(_file_documents(path, spec), spec.seed)
    if spec.source not in NAMED and "/" not in spec.source:
        one_of(spec.source, ["zoo", *NAMED], "data set")
    return _hub_documents(spec)


@functools.cache
def _zoo_documents(use: Use) -> tuple[Document, ...]:
    return zoo_text.documents(use)


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    """The order depends on the seed and on each document's place, on no library's random numbers."""

    def key(numbered: tuple[int, Document]) -> bytes:
        return hashlib.sha256(f"{seed}:{numbered[0]}".encode()).digest()

    return [document for _, document in sorted(enumerate(documents), key=key)]


def _file_documents(path: Path, spec: DataSpec) -> list[Document]:
    """.txt: paragraphs between blank lines; .jsonl and .parquet: one document a row (fields `text`, `domain`)."""
    if path.suffix == ".txt":
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
        lines = [line if line.strip() else "" for line in content.splitlines()]
        texts = [part for part in "\n".join(lines).split("\n\n") if part.strip()]
        return [Document(text, "text", path.name) for text in texts]
    import datasets

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    one_of(spec.field, rows.column_names, f"field of {path.name}")
    return [Document(row[spec.field], str(row.get("domain") or "text"), path.name) for row in rows if row[spec.field]]


def _hub_documents(spec: DataSpec) -> Iterator[Document]:
    """Calibration text in the order of the seed, held-out text in its own order; nothing is fetched before it is used.

    Where one split has to serve both uses, its documents are dealt out by their hash, so that none serves both.
    """
    import datasets

    known = NAMED.get(spec.source) or NamedSet(spec.source, spec.config, spec.field, "train", "validation")
    split = spec.split or (known.calibration if spec.use == "calibration" else known.heldout)
    shared = known.calibration == known.heldout and spec.split is None
    try:
        rows = datasets.load_dataset(known.path, known.config, split=split, streaming=True)
        if spec.use == "calibration" and not known.lines:
            rows = rows.shuffle(seed=spec.seed, buffer_size=10_000)
        texts = _texts(rows, known)
        for text in _articles(texts) if known.lines else texts:
            if not shared or _half(text) == spec.use:
                yield Document(text, "text", known.path)
    except (OSError, ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"the data set {known.path} cannot be reached ({type(error).__name__}): use a local file with "
            "data=FILE.txt, or data=zoo, which needs no download."
        ) from error


def _texts(rows: Iterable[dict[str, str]], known: NamedSet) -> Iterator[str]:
    for row in rows:
        if known.field not in row:
            raise ValueError(f"{known.path} has no field {known.field!r}; fields: {', '.join(row)}.")
        if row[known.field].strip():
            yield row[known.field]


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined into articles, each of which begins with a heading of the first level."""
    article: list[str] = []
    for line in lines:
        if HEADING.fullmatch(line.strip()) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _half(text: str) -> Use:
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] % 2 else "calibration"
