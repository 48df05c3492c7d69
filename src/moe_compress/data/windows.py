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

from moe_compress.data.chat import Chat
from moe_compress.data.cutting import Draw, Window, pack, pad
from moe_compress.data.documents import DataSpec, parts, read_documents, require_sources, title
from moe_compress.data.encoding import Encoder
from moe_compress.data.local import Text
from moe_compress.data.sources import read_sources, shares
from moe_compress.utils.choices import one_of
from moe_compress.utils.hashing import fingerprint, tensor_bytes
from moe_compress.utils.logging import log
from moe_compress.zoo import text as zoo_text

FOLDS = 4
# A zoo document is a whole source file: two windows of each spread the text over many files.
ZOO_WINDOWS_PER_DOCUMENT = 2
DEFAULT_MIX = {"zoo": {"prose": 2.0, "code": 2.0, "tasks": 1.0}}


@dataclass(frozen=True)
class Windows:
    """Token windows. mask_NS is False on padding; document_NS numbers the document each token comes from.

    said_NS: the tokens that count, where that is not all but padding; digests: what tells the documents from others.
    """

    ids_NS: Tensor
    mask_NS: Tensor
    document_NS: Tensor
    domain_N: Tensor
    domains: tuple[str, ...]
    fingerprint: str
    description: dict[str, Any]
    said_NS: Tensor | None = None
    digests: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.ids_NS)

    @property
    def counted_NS(self) -> Tensor:
        """The tokens that count in statistics and losses: no padding, and of conversations perhaps not all."""
        return self.mask_NS if self.said_NS is None else self.said_NS

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.counted_NS.sum())

    def predictions(self) -> Tensor:
        """Window and position of every token behind which one stands that counts, [P, 2]."""
        return (self.mask_NS[:, :-1] & self.counted_NS[:, 1:]).nonzero()

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
        description = {**self.description, "windows": len(rows[0])}
        said_NS = None if self.said_NS is None else self.said_NS[chosen_N]
        return Windows(*rows, self.domains, identity, description, said_NS, self.digests)

    @property
    def component_N(self) -> Tensor:
        """domain * FOLDS + fold of each window."""
        return self.domain_N * FOLDS + torch.arange(len(self)) % FOLDS


def make_windows(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Read, tokenize and cut text as `spec` says. ValueError if there is too little of it."""
    if spec.length < 2 or spec.samples < 1:
        raise ValueError(f"samples={spec.samples} length={spec.length}: at least 1 window of 2 tokens is needed.")
    require_sources(spec)
    draw = Draw(Encoder(tokenizer, Chat(tokenizer, spec.template, spec.system), spec.assistant_only))
    by_domain: dict[str, list[Window]] = {}
    sources, whole = parts(spec), title(spec)
    for domain, documents, count in _shares(spec, sources):
        longest = ZOO_WINDOWS_PER_DOCUMENT * spec.length if "zoo" in (whole, domain) else None
        first = draw.number
        windows = (
            pack(documents, draw, spec.length, count, longest)
            if spec.packed
            else pad(documents, draw, spec.length, count, longest, _pad_id(tokenizer))
        )
        if windows:
            by_domain[domain] = windows
        # Documents of which no window holds a token have no number.
        draw.number = max([first, *(1 + int(window.document_S.max()) for window in windows)])
        # Texts that are evaluated have a number each, which must not depend on the others.
        if len(sources) > 1 and spec.use == "calibration":
            draw.next_source()
    _require_enough(spec, by_domain, draw.encoder)
    if draw.repeated:
        log.warning("%s: %d documents that an earlier source holds as well are left out.", title(spec), draw.repeated)
    return _stack(by_domain, spec, draw)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _require_enough(spec: DataSpec, by_domain: Mapping[str, list[Window]], encoder: Encoder) -> None:
    """Raise ValueError if there is no window, if nothing of a domain counts, or if words about conversations idle."""
    found = sum(map(len, by_domain.values()))
    if found == 0:
        raise ValueError(
            f"{spec.source} holds fewer tokens than one window of {spec.length}: lower length= (or eval_length=)."
        )
    if found < spec.samples:
        log.warning("%s holds only %d windows of the %d asked for; all are used.", spec.source, found, spec.samples)
    for domain, windows in by_domain.items():
        if not any(bool(window.counted_S.any()) for window in windows):
            raise ValueError(f"the assistant says nothing in the windows of {title(spec)} ({domain}): raise length=.")
    for name in ("template", "system", "assistant_only"):
        if spec.use == "calibration" and not encoder.conversations and getattr(spec, name):
            raise ValueError(f"{name}={getattr(spec, name)}: {title(spec)} holds no conversation that it is about.")


def _stack(by_domain: Mapping[str, list[Window]], spec: DataSpec, draw: Draw) -> Windows:
    domains = tuple(sorted(by_domain))
    windows = [window for domain in domains for window in by_domain[domain]]
    ids = torch.stack([w.ids_S for w in windows])
    mask = torch.stack([w.mask_S for w in windows])
    counted = torch.stack([w.counted_S for w in windows])
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
        "tokens": int(counted.sum()),
        "domains": {name: len(by_domain[name]) for name in domains},
        **({"conversations": spec.extras} if spec.extras and draw.encoder.conversations else {}),
        **({"repeated": draw.repeated} if draw.repeated else {}),
    }
    if title(spec) == "zoo":
        description["text"] = zoo_text.fingerprint()
        if description["text"] != zoo_text.SHIPPED_FINGERPRINT:
            log.warning(
                "the zoo's text here is %s, not %s as in the shipped tables: these numbers go to a table of their own.",
                description["text"],
                zoo_text.SHIPPED_FINGERPRINT,
            )
    said = None if torch.equal(mask, counted) else counted
    identity = fingerprint(
        *(tensor_bytes(tensor) for tensor in (ids, mask, document, domain)),
        list(domains),
        spec.length,
        *([] if said is None else [tensor_bytes(said)]),
    )
    return Windows(ids, mask, document, domain, domains, identity, description, said, frozenset(draw.digests))


def _shares(spec: DataSpec, sources: Sequence[DataSpec]) -> list[tuple[str, Iterable[Text], int]]:
    """(domain, its documents in the order of the seed, windows wanted) for every domain of the source."""
    named = shares(read_sources(spec.source), spec.samples)
    if len(sources) > 1:
        return _several(spec, sources, named)
    (source,) = sources
    documents = read_documents(source)
    if not documents.domains:
        raise ValueError(f"{source.source} holds no text.")
    mix = dict(spec.mix) or DEFAULT_MIX.get(source.source, {})
    domains = sorted(documents.domains)
    for name in dict(spec.mix):
        one_of(name, domains, f"domain of {source.source}")
    weights = {domain: mix.get(domain, 0.0 if mix else 1.0) for domain in domains}
    counts = _apportion(weights, spec.samples)
    return [(d, documents.of(d), counts[d]) for d in domains if counts[d]]


def _several(
    spec: DataSpec, sources: Sequence[DataSpec], named: Mapping[str, int | None]
) -> list[tuple[str, Iterable[Text], int]]:
    """Each source is a domain, with the windows that it names, or an equal share unless the mix says otherwise."""
    for name in dict(spec.mix):
        one_of(name, named, f"source of {spec.source}")
    rest = [name for name, count in named.items() if count is None]
    weights = {name: dict(spec.mix).get(name, 0.0 if spec.mix else 1.0) for name in rest}
    counts = {name: count for name, count in named.items() if count is not None}
    counts |= _apportion(weights, spec.samples - sum(counts.values())) if rest else {}
    by_name = dict(zip(named, sources, strict=True))
    return [(name, read_documents(part), counts[name]) for name, part in sorted(by_name.items()) if counts[name]]


def _apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the given proportions that add up to `total` (largest remainders)."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (counts[name] - weights[name] * scale, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def parse_mix(text: str, domains: Sequence[str] | None = None) -> dict[str, float]:
    """`prose:2,code:1` -> shares of the domains; empty for none. ValueError for a domain that the text lacks."""
    mix: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.rpartition(":") if ":" in word else (word, "", "")
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
