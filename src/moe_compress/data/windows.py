"""Documents into token windows: how they are shared out, cut, and what identifies the result.

A window belongs to one domain. Calibration windows are also dealt into folds, so that a statistic kept per
domain and fold can be re-weighted and its stability judged afterwards. N windows of S positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_compress.data.documents import DataSpec, parts, read_documents, title
from moe_compress.utils.choices import one_of
from moe_compress.utils.hashing import fingerprint, tensor_bytes
from moe_compress.utils.logging import log
from moe_compress.zoo import text as zoo_text
from moe_compress.zoo.text import Document

FOLDS = 4
# A zoo document is a whole source file: two windows of each spread the text over many files.
ZOO_WINDOWS_PER_DOCUMENT = 2
DEFAULT_MIX = {"zoo": {"prose": 2.0, "code": 2.0, "tasks": 1.0}}


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

    def select(self, chosen_N: Tensor) -> Windows:
        """Some of the windows, as a text of their own."""
        rows = (self.ids_NS[chosen_N], self.mask_NS[chosen_N], self.document_NS[chosen_N], self.domain_N[chosen_N])
        identity = fingerprint(self.fingerprint, chosen_N.tolist())
        return Windows(*rows, self.domains, identity, {**self.description, "windows": len(rows[0])})

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
        longest = ZOO_WINDOWS_PER_DOCUMENT * spec.length if "zoo" in (spec.source, domain) else None
        tokens = _tokenized(documents, tokenizer, longest)
        windows = cut(tokens, spec.length, count, first_document, _pad_id(tokenizer))
        if windows:
            by_domain[domain] = windows
            first_document = 1 + max(int(window.document_S.max()) for window in windows)
    found = sum(map(len, by_domain.values()))
    if found == 0:
        raise ValueError(
            f"{spec.source} holds fewer tokens than one window of {spec.length}: lower length= (or eval_length=)."
        )
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
        "source": title(spec),
        "use": spec.use,
        "windows": len(windows),
        "length": spec.length,
        "packed": spec.packed,
        "subset": [spec.config, spec.split, spec.field],
        "seed": spec.seed,
        "tokens": int(mask.sum()),
        "domains": {name: len(by_domain[name]) for name in domains},
    }
    if spec.source == "zoo":
        description["text"] = zoo_text.fingerprint()
        if description["text"] != zoo_text.SHIPPED_FINGERPRINT:
            log.warning(
                "the zoo's text here is %s, not %s as in the shipped tables: these numbers go to a table of their own.",
                description["text"],
                zoo_text.SHIPPED_FINGERPRINT,
            )
    identity = fingerprint(
        tensor_bytes(ids), tensor_bytes(mask), tensor_bytes(document), tensor_bytes(domain), list(domains), spec.length
    )
    return Windows(ids, mask, document, domain, domains, identity, description)


def _shares(spec: DataSpec) -> list[tuple[str, Iterable[Document], int]]:
    """(domain, its documents in the order of the seed, windows wanted) for every domain of the source."""
    sources = parts(spec)
    if len(sources) > 1:
        return _several(spec, sources)
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


def _several(spec: DataSpec, sources: Sequence[DataSpec]) -> list[tuple[str, Iterable[Document], int]]:
    """Each source is a domain, and has the same share unless the mix says otherwise."""
    by_name = {title(part): part for part in sources}
    if len(by_name) < len(sources):
        raise ValueError(f"{spec.source}: sources of different names are needed.")
    for name in dict(spec.mix):
        one_of(name, by_name, f"source of {spec.source}")
    weights = {name: dict(spec.mix).get(name, 0.0 if spec.mix else 1.0) for name in by_name}
    counts = _apportion(weights, spec.samples)
    return [(name, read_documents(part), counts[name]) for name, part in sorted(by_name.items()) if counts[name]]


def _apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the given proportions that add up to `total` (largest remainders)."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (counts[name] - weights[name] * scale, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


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


def parse_mix(text: str, domains: Sequence[str] | None = None) -> dict[str, float]:
    """`prose:2,code:1` -> shares of the domains; empty for none. ValueError for a domain that the text lacks."""
    mix: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.partition(":")
        if name.strip() in mix:
            raise ValueError(f"mix={text}: {name.strip()} is named twice.")
        try:
            mix[name.strip()] = float(share)
        except ValueError as error:
            raise ValueError(f"mix={text}: write domain:share,domain:share, such as prose:2,code:1.") from error
    if mix and not (0 < sum(mix.values()) < math.inf and min(mix.values()) >= 0):
        raise ValueError(f"mix={text}: shares are numbers from 0 up, and not all 0.")
    for name in mix if domains is not None else ():
        one_of(name, domains or (), "domain of the calibration text")
    return mix
