"""Text into token windows: where documents come from, how they are cut, and what identifies the result.

A window belongs to one domain. Calibration windows are also dealt into folds, so that a statistic kept per
domain and fold can be re-weighted and its stability judged afterwards. N windows of S positions.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_compress.runtime import fingerprint, log, one_of, tensor_bytes
from moe_compress.zoo import text as zoo_text
from moe_compress.zoo.text import Document

FOLDS = 4
Use = Literal["calibration", "heldout"]


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A data set known by a short name: where the hub keeps it and which split serves which use."""

    path: str
    config: str | None
    field: str
    calibration: str
    heldout: str


NAMED = {
    "c4": NamedSet("allenai/c4", "en", "text", "train", "validation"),
    "wikitext2": NamedSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "pile": NamedSet("mit-han-lab/pile-val-backup", None, "text", "validation", "validation"),
}
# A zoo document is a whole source file: two windows of each spread the text over many files.
ZOO_WINDOWS_PER_DOCUMENT = 2
DEFAULT_MIX = {"zoo": {"prose": 2.0, "code": 2.0, "tasks": 1.0}}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which text, how much of it, cut how.

    source: `zoo`, a .txt/.jsonl/.parquet file, a name of NAMED, or any id of a `datasets` data set;
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


@dataclass(frozen=True)
class Windows:
    """Token windows. mask_NS is False on padding; document_NS numbers the document each token comes from."""

    ids_NS: Tensor
    mask_NS: Tensor
    document_NS: Tensor
    domain_N: Tensor
    domains: tuple[str, ...]
    fingerprint: str
    description: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids_NS)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask_NS.sum())

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` windows."""
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def mask_of(self, batch: slice, device: torch.device) -> Tensor | None:
        """The attention mask of a batch; None where nothing is padded, which keeps fast attention open."""
        mask = self.mask_NS[batch]
        return None if bool(mask.all()) else mask.long().to(device)

    @property
    def component_N(self) -> Tensor:
        """domain * FOLDS + fold of each window."""
        return self.domain_N * FOLDS + torch.arange(len(self)) % FOLDS


def make_windows(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Read, tokenize and cut text as `spec` says. ValueError if there is too little of it."""
    if spec.length < 2 or spec.samples < 1:
        raise ValueError(f"samples={spec.samples} length={spec.length}: at least 1 window of 2 tokens is needed.")
    by_domain: dict[str, list[_Window]] = {}
    first_document = 0
    for domain, documents, count in _shares(spec):
        cut = _pack if spec.packed else _pad
        longest = ZOO_WINDOWS_PER_DOCUMENT * spec.length if spec.source == "zoo" else None
        tokens = _tokenized(documents, tokenizer, longest)
        windows = cut(tokens, spec.length, count, first_document, _pad_id(tokenizer))
        if windows:
            by_domain[domain] = windows
            first_document = 1 + max(int(window.document_S.max()) for window in windows)
    found = sum(map(len, by_domain.values()))
    if found == 0:
        raise ValueError(f"{spec.source} holds fewer tokens than one window of {spec.length}: lower length=.")
    if found < spec.samples:
        log.warning("%s holds only %d windows of the %d asked for; all are used.", spec.source, found, spec.samples)
    return _stack(by_domain, spec)


@dataclass(frozen=True, slots=True)
class _Window:
    ids_S: Tensor
    mask_S: Tensor
    document_S: Tensor


def _stack(by_domain: Mapping[str, list[_Window]], spec: DataSpec) -> Windows:
    domains = tuple(sorted(by_domain))
    windows = [window for domain in domains for window in by_domain[domain]]
    ids = torch.stack([w.ids_S for w in windows])
    mask = torch.stack([w.mask_S for w in windows])
    document = torch.stack([w.document_S for w in windows])
    domain = torch.tensor([i for i, name in enumerate(domains) for _ in by_domain[name]])
    description = {
        "source": Path(spec.source).name if Path(spec.source).exists() else spec.source,
        "use": spec.use,
        "windows": len(windows),
        "length": spec.length,
        "packed": spec.packed,
        "seed": spec.seed,
        "tokens": int(mask.sum()),
        "domains": {name: len(by_domain[name]) for name in domains},
    }
    if spec.source == "zoo":
        description["text"] = zoo_text.fingerprint()
    identity = fingerprint(tensor_bytes(ids), tensor_bytes(mask), tensor_bytes(document), list(domains), spec.length)
    return Windows(ids, mask, document, domain, domains, identity, description)


def _shares(spec: DataSpec) -> list[tuple[str, Iterable[Document], int]]:
    """(domain, its documents in the order of the seed, windows wanted) for every domain of the source."""
    documents = read_documents(spec)
    mix = dict(spec.mix) or DEFAULT_MIX.get(spec.source, {})
    if not isinstance(documents, list):
        return [("text", documents, spec.samples)]
    if not documents:
        raise ValueError(f"{spec.source} holds no text.")
    domains = sorted({document.domain for document in documents})
    for name in dict(spec.mix):
        one_of(name, domains, f"domain of {spec.source}")
    weights = {domain: mix.get(domain, 0.0 if mix else 1.0) for domain in domains}
    counts = _apportion(weights, spec.samples)
    return [(d, [x for x in documents if x.domain == d], counts[d]) for d in domains if counts[d]]


def _apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the given proportions that add up to `total` (largest remainders)."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (counts[name] - weights[name] * scale, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


# --- documents ----------------------------------------------------------------------------------------------


def read_documents(spec: DataSpec) -> list[Document] | Iterable[Document]:
    """The documents of a source, shuffled by the seed: a list, or a stream from the hub."""
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
    import datasets

    known = NAMED.get(spec.source) or NamedSet(spec.source, spec.config, spec.field, "train", "validation")
    split = spec.split or (known.calibration if spec.use == "calibration" else known.heldout)
    try:
        rows = datasets.load_dataset(known.path, known.config, split=split, streaming=True)
        shuffled = rows.shuffle(seed=spec.seed, buffer_size=10_000)
        for row in shuffled:
            if known.field not in row:
                raise ValueError(f"{known.path} has no field {known.field!r}; fields: {', '.join(row)}.")
            if row[known.field].strip():
                yield Document(row[known.field], "text", known.path)
    except (OSError, ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"the data set {known.path} cannot be reached ({type(error).__name__}): use a local file with "
            "data=FILE.txt, or data=zoo, which needs no download."
        ) from error


# --- windows ------------------------------------------------------------------------------------------------


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Iterator[Tensor]:
    """At most `longest` token ids of each document, begun by BOS once if this tokenizer begins texts with it."""
    probe = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id if probe and probe[0] == tokenizer.bos_token_id else None
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if ids:
            yield torch.tensor(ids[:longest])


def _pack(documents: Iterator[Tensor], length: int, count: int, first: int, _: int) -> list[_Window]:
    windows: list[_Window] = []
    ids, numbers = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    for number, document in enumerate(documents, first):
        ids = torch.cat([ids, document])
        numbers = torch.cat([numbers, torch.full((len(document),), number)])
        while len(ids) >= length and len(windows) < count:
            windows.append(_Window(ids[:length], torch.ones(length, dtype=torch.bool), numbers[:length]))
            ids, numbers = ids[length:], numbers[length:]
        if len(windows) == count:
            break
    return windows


def _pad(documents: Iterator[Tensor], length: int, count: int, first: int, pad: int) -> list[_Window]:
    windows: list[_Window] = []
    for number, document in enumerate(documents, first):
        if len(windows) == count:
            break
        ids = document[:length]
        blank = length - len(ids)
        windows.append(
            _Window(
                torch.cat([ids, torch.full((blank,), pad)]),
                torch.arange(length) < len(ids),
                torch.full((length,), number),
            )
        )
    return windows
