"""Where documents come from: the zoo, files, or data sets on the hub; always in the order of a seed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_compress.data.files import content_hash, kind_of, local_file
from moe_compress.data.local import Documents, in_order, local_documents
from moe_compress.data.rows import Conversation, Shape, document_of, read_names
from moe_compress.data.sources import read_sources
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
# Rows of the hub that are mixed at a time: those of text, and conversations, which are far longer.
SHUFFLED, SHUFFLED_CONVERSATIONS = 10_000, 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which text, how much of it, cut how.

    source: as `data=` is written (`data/sources.py`): `zoo`, files, names of NAMED, ids of `datasets` data sets;
    several are domains of one text; samples x length tokens; packed: documents joined and cut at every `length` tokens,
    else one padded document a window; mix: shares of the domains; config, split and field: of hub data sets and files;
    fields: what rows call things (`data/rows.py`); template, system: how conversations are written;
    assistant_only: of those, only what the assistant says counts; windows: of this source alone.
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
    # Behind those that an identity was made of before there were these.
    fields: str = dataclasses.field(default="", repr=False)
    template: str = dataclasses.field(default="", repr=False)
    system: str = dataclasses.field(default="", repr=False)
    assistant_only: bool = dataclasses.field(default=False, repr=False)
    windows: int | None = dataclasses.field(default=None, repr=False)

    @property
    def extras(self) -> dict[str, Any]:
        """What is set of those that are not part of its representation."""
        chosen = {name: getattr(self, name) for name in ("fields", "template", "system", "assistant_only", "windows")}
        if os.path.isfile(self.template):
            chosen["template"] = f"{Path(self.template).name} {content_hash(Path(self.template))[:16]}"
        return {name: value for name, value in chosen.items() if value}


def parts(spec: DataSpec) -> list[DataSpec]:
    """The sources of a text, each with its own configuration, split and number of windows where it names them."""
    return [
        replace(
            spec,
            source=source.name,
            config=source.config or spec.config,
            split=source.split or spec.split,
            windows=source.windows,
        )
        for source in read_sources(spec.source)
    ]


def title(spec: DataSpec) -> str:
    """What the sources are called: a file by its name, without the path to it."""
    return ",".join(source.title for source in read_sources(spec.source))


def text_identity(spec: DataSpec) -> list[Any]:
    """A text by its settings, and by its content where that is at hand."""
    found = [_part_identity(part) for part in parts(spec)]
    return found if len(found) > 1 else found[0]


def _part_identity(spec: DataSpec) -> list[Any]:
    path = Path(spec.source)
    stored = "" if spec.source == "zoo" or not path.is_file() else content_hash(path)
    content = zoo_text.fingerprint() if spec.source == "zoo" else stored
    settings = repr(replace(spec, source=path.name if content else spec.source))
    return [settings, content, *([spec.extras] if spec.extras else [])]


def require_sources(spec: DataSpec) -> None:
    """Raise ValueError for files that will not do, unknown data sets, and words that no source can use."""
    prefix = "data" if spec.use == "calibration" else "eval"
    read_names(spec.fields)
    used = set[str]()
    for source, part in zip(read_sources(spec.source), parts(spec), strict=True):
        takes = _takes(part.source)
        for name in ("config", "split"):
            if getattr(source, name) and name not in takes:
                raise ValueError(f"{source.title}: {part.source} is no data set of the hub, and has no {name}.")
        used |= takes
    for name, unset in (("config", None), ("split", None), ("field", "text")):
        if getattr(spec, name) != unset and name not in used:
            raise ValueError(f"{prefix}_{name}={getattr(spec, name)}: {title(spec)} has no {name} to choose.")
    if spec.use == "calibration" and spec.fields and "field" not in used:
        raise ValueError(f"fields={spec.fields}: {title(spec)} has no fields.")


def _takes(source: str) -> set[str]:
    """What can be chosen of a source."""
    file = _file_of(source)
    if source == "zoo" or (file is not None and _kind(file) == "text"):
        return set()
    if file is not None:
        return {"field"}
    return {"config", "split"} if source in NAMED else {"config", "split", "field"}


def _kind(file: Path) -> str:
    known = kind_of(file)
    return known[0] if known else ""


def _file_of(source: str) -> Path | None:
    """The file that a source names; None for the zoo and data sets. ValueError for what is neither."""
    if source == "zoo" or source in NAMED:
        return None
    file = local_file(source)
    if file is None and "/" not in source:
        one_of(source, ["zoo", *NAMED], "data set")
    return file


def read_documents(spec: DataSpec) -> Documents:
    """The documents of one source in the order of the seed."""
    if spec.source == "zoo":
        documents = _zoo_documents(spec.use)
        domains = [*dict.fromkeys(document.domain for document in documents)]
        numbers = [domains.index(document.domain) for document in documents]
        return in_order(domains, numbers, documents.__getitem__, spec.seed)
    file = _file_of(spec.source)
    if file is None:
        return Documents(("text",), lambda _: _hub_documents(spec))
    return local_documents(file, Shape(spec.field, read_names(spec.fields)), spec.seed)


@functools.cache
def _zoo_documents(use: Use) -> tuple[Document, ...]:
    return zoo_text.documents(use)


def _hub_documents(spec: DataSpec) -> Iterator[Document | Conversation]:
    """Calibration text in the order of the seed, held-out text in its own order; nothing is fetched before it is used.

    Where one split has to serve both uses, its documents are dealt out by their hash, so that none serves both.
    """
    import datasets

    known = NAMED.get(spec.source) or NamedSet(spec.source, spec.config, spec.field, "train", "validation")
    split = spec.split or (known.calibration if spec.use == "calibration" else known.heldout)
    shared = known.calibration == known.heldout and spec.split is None
    shape = Shape(known.field, read_names(spec.fields))
    try:
        rows = datasets.load_dataset(known.path, spec.config or known.config, split=split, streaming=True)
        if spec.use == "calibration" and not known.lines:
            first = None if spec.source in NAMED else next(_texts(rows, known.path, shape), None)
            size = SHUFFLED_CONVERSATIONS if isinstance(first, Conversation) else SHUFFLED
            rows = rows.shuffle(seed=spec.seed, buffer_size=size)
        texts = _texts(rows, known.path, shape)
        for document in _articles(texts, known.path) if known.lines else texts:
            if not shared or _half(document) == spec.use:
                yield document
    except (OSError, ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"the data set {known.path} cannot be reached ({type(error).__name__}): use a local file with "
            "data=FILE.txt, or data=zoo, which needs no download."
        ) from error


def _texts(rows: Iterable[dict[str, Any]], path: str, shape: Shape) -> Iterator[Document | Conversation]:
    for number, row in enumerate(rows, 1):
        try:
            document = document_of(row, shape, f"row {number} of {path}", path)
        except KeyError:
            raise ValueError(f"{path} has no field {shape.text!r}; fields: {', '.join(row)}.") from None
        if document is not None and (isinstance(document, Conversation) or document.text.strip()):
            yield replace(document, domain="text")


def _articles(lines: Iterable[Document | Conversation], path: str) -> Iterator[Document]:
    """WikiText's lines joined into articles, each of which begins with a heading of the first level."""
    article: list[str] = []
    for line in itertools.chain(lines, [None]):
        text = line.text if isinstance(line, Document) else ""
        if article and (line is None or HEADING.fullmatch(text.strip())):
            yield Document("".join(article), "text", path)
            article = []
        article.append(text)


def _half(document: Document | Conversation) -> Use:
    text = document.text if isinstance(document, Document) else repr(document.messages)
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] % 2 else "calibration"
