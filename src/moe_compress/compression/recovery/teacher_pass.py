"""The one run of a teacher that fills its cache, and the window of it that says whether an older cache agrees.

P predicted tokens, V vocabulary, N windows of S positions, D model width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_compress.compression.recovery.teacher_cache import TeacherCache
from moe_compress.engine.forward import Progress, forward_layers
from moe_compress.engine.layers import Layers
from moe_compress.models import hf
from moe_compress.utils.files import one_at_a_time, require_disk
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

# Shards whose hidden states are in memory at the same time.
SHARDS_AT_ONCE = 32
# Nats a token by which what is kept may be off from what the teacher says here: of other kernels, not another teacher.
TOLERANCE = 1e-2


def filled(cache: TeacherCache, load: Callable[[], Layers], name: str, progress: Progress | None) -> TeacherCache:
    """The cache with all of its shards; the teacher is loaded only where one is missing, or of other libraries.

    Raises ValueError for a cache of another teacher or text, or one that does not agree with the teacher.
    """
    with one_at_a_time(cache.folder.with_suffix(".lock"), f"keeping what {name} says"):
        cache.open()
        if cache.agreed and not cache.missing:
            log.info("what %s says of this text is kept already (%s).", name, cache.folder)
            return cache
        layers = load()
        if not cache.agreed:
            require_agreement(cache, layers, name)
        complete(cache, layers, progress)
    return cache


@torch.no_grad()
def complete(cache: TeacherCache, layers: Layers, progress: Progress | None = None) -> None:
    """Run the teacher on the windows of shards that are missing, and keep what it says.

    A killed run goes on behind the last layer of a few shards, and behind the last shard.
    """
    if not cache.missing:
        return
    _require_disk(cache, layers)
    cache.note(begun=not cache.whole)
    for first in range(0, cache.count, SHARDS_AT_ONCE):
        shards = range(first, min(first + SHARDS_AT_ONCE, cache.count))
        if not cache.missing & set(shards):
            continue
        start, stop = cache.inside(shards[0]).start, cache.inside(shards[-1]).stop
        state = cache.folder / f"streams-{first:05d}"
        windows = cache.windows.select(torch.arange(start, stop))
        _, hidden_NSD = forward_layers(layers, windows, state=state, progress=progress)
        for shard in sorted(cache.missing & set(shards)):
            inside = cache.inside(shard)
            _keep(cache, shard, layers, hidden_NSD[inside.start - start : inside.stop - start])
        shutil.rmtree(state, ignore_errors=True)


def _keep(cache: TeacherCache, shard: int, layers: Layers, hidden_NSD: Tensor) -> None:
    """Write a shard from the final hidden states of its windows."""
    # A seed of its own: what is drawn does not depend on which shards were there already.
    generator = torch.Generator(layers.device).manual_seed(int(fingerprint(cache.identity, shard), 16) >> 1)
    one = _of_one(cache, layers)
    parts = [{key: each[:0] for key, each in one.items()}]
    for logits_PV in _logits(cache, cache.inside(shard), layers, hidden_NSD):
        parts.append({key: each.cpu() for key, each in cache.keeping.keep(logits_PV, generator).items()})
    cache.write(shard, {key: torch.cat([each[key] for each in parts]) for key in parts[0]})


def _of_one(cache: TeacherCache, layers: Layers) -> dict[str, Tensor]:
    """What is kept of a token, in its types and widths."""
    vocabulary = layers.model.config.get_text_config().vocab_size
    return cache.keeping.keep(torch.zeros(1, vocabulary), torch.Generator())


def _logits(cache: TeacherCache, inside: range, layers: Layers, hidden_NSD: Tensor) -> Iterator[Tensor]:
    """The teacher's logits at all tokens that these windows predict, a chunk at a time."""
    where_P2 = cache.windows.select(torch.arange(inside.start, inside.stop)).predictions()
    rows = hf.head_rows(layers.model)
    for start in range(0, len(where_P2), rows):
        n, s = where_P2[start : start + rows].unbind(1)
        logits_PV = hf.head(layers.model, hidden_NSD[n, s])
        if not bool(logits_PV.isfinite().all()):
            raise ValueError("the teacher's logits are not finite on this text, so nothing can be learnt from it.")
        yield logits_PV


def _require_disk(cache: TeacherCache, layers: Layers) -> None:
    """Raise ValueError if there is no room for the shards, and for hidden states meanwhile."""
    config, length = layers.model.config.get_text_config(), cache.windows.ids_NS.shape[1]
    each = sum(tensor.nbytes for tensor in _of_one(cache, layers).values())
    tokens = length * min(len(cache.windows), SHARDS_AT_ONCE * cache.per)
    streams = 2 * tokens * config.hidden_size * layers.model.dtype.itemsize
    fewer = "use fewer or shorter windows (samples=, length=), or another disk with results="
    require_disk(cache.folder, sum(map(cache.rows, cache.missing)) * each + streams, "what a teacher says", fewer)


@torch.no_grad()
def require_agreement(cache: TeacherCache, layers: Layers, name: str) -> None:
    """Raise ValueError unless the teacher says of one window, in one forward, what is kept of it."""
    first = cache.inside(min(cache.whole))[0]
    chosen_1 = torch.tensor([first])
    _, hidden_NSD = forward_layers(layers, cache.windows.select(chosen_1))
    kept = {key: each.to(layers.device) for key, each in cache.targets(chosen_1).items()}
    off, start = [torch.zeros(0)], 0
    for logits_PV in _logits(cache, range(first, first + 1), layers, hidden_NSD):
        part = {key: each[start : start + len(logits_PV)] for key, each in kept.items()}
        off.append(cache.keeping.disagreement(logits_PV, part).abs().float().cpu())
        start += len(logits_PV)
    mean = float(torch.cat(off).mean()) if start else 0.0
    if not mean <= TOLERANCE:
        raise ValueError(
            f"{cache.folder} does not agree with {name}: what is kept of window {first} is off by {mean:.2g} nats a "
            "token; remove it, and it is made anew."
        )
    cache.note()
