"""Layer drop and block drop: remove MoE sub-layers or whole decoder layers that hardly turn the stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.edits.edits import Edit, Plan, SkipSublayer, removals
from moe_compress.methods.registry import Need, method
from moe_compress.models.shape import ModelShape

PAPER = "Unified-MoE-Compression (arXiv 2406.02500)"
Part = Literal["moe", "attention"]


def _needs(parameters: Mapping[str, Any]) -> Need:
    return "nothing" if parameters["layers"] is not None else "text"


def _listed(text: str, known: Iterable[int], what: str) -> list[int]:
    """`3,7` -> [3, 7]; ValueError unless all of them are known."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"layers={text}: write layer numbers such as 3,7.")
    found = sorted({int(word) for word in words})
    if len(found) < len(words):
        raise ValueError(f"layers={text}: a layer is there twice.")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(f"layers={text}: {what} {list(known)}.")
    return found


def _require_count(drop: int | None, possible: int, what: str) -> int:
    if possible < 2:
        raise ValueError(f"drop={drop}: of {possible} {what}, none can be dropped.")
    if drop is None or not 0 < drop < possible:
        raise ValueError(f"drop={drop}: of {possible} {what}, 1 to {possible - 1} can be dropped.")
    return drop


# --- layer drop ---------------------------------------------------------------------------------------------


def check_layers(shape: ModelShape, *, drop: int | None, layers: str | None, part: Part, **_: Any) -> Plan:
    """Whether so many sub-layers can go: a plan with arbitrary ones."""
    candidates = _candidates(shape, part)
    if layers is not None:
        return Plan(_skips(shape, _listed(layers, candidates, f"layers with {part}:"), part), {}, {})
    whole = _whole(shape, candidates)
    count = _require_count(drop, len(whole), f"layers with {part}")
    return Plan(_skips(shape, whole[-count:], part), {}, {})


def _candidates(shape: ModelShape, part: Part) -> list[int]:
    return [moe.layer for moe in shape.moe] if part == "moe" else shape.attention


def _whole(shape: ModelShape, layers: Sequence[int]) -> list[int]:
    """Those that have not lost their other part: nothing would be left of them."""
    return [layer for layer in layers if layer not in shape.halved]


def _skips(shape: ModelShape, layers: Sequence[int], part: Part) -> list[Edit]:
    if part == "moe" and shape.whole_layers:
        return removals(layers)
    return [SkipSublayer(layer, part) for layer in layers]


@method(
    "model",
    group="trimming",
    paper=PAPER,
    needs=_needs,
    check=check_layers,
    exclusive=(("drop", "layers"),),
    shown_in_names=("drop", "layers"),
    goes_with={"metric": "layers=none"},
)
def layer_drop(
    model: ModelStatistics,
    *,
    drop: int | None = 1,
    layers: str | None = None,
    metric: Literal["with_norm", "without_norm"] = "with_norm",
    part: Part = "moe",
) -> Plan:
    """Remove the MoE block (with shared experts and norm) of the layers where it hardly turns the stream.

    drop: how many, or layers: which ones (3,7); metric: compare the stream before and after the sub-layer (the
    paper's S(NM)), or the sub-layer's own input behind its norm and its output (S(M)); what is removed is the same;
    part: the MoE block, or the attention.
    """
    if layers is not None:
        chosen = _listed(layers, _candidates(model.shape, part), f"layers with {part}:")
        return Plan(_skips(model.shape, chosen, part), {}, {})
    name = part if metric == "with_norm" else f"{part}_inner"
    influence = {
        layer: model.block_influence[layer][name] for layer in _whole(model.shape, _candidates(model.shape, part))
    }
    count = _require_count(drop, len(influence), f"layers with {part}")
    chosen = _least(influence, count)
    scores: dict[int, list[float | None]] = {layer: [1 - turn] for layer, turn in influence.items()}
    return Plan(_skips(model.shape, chosen, part), scores, {"dropped": chosen, "similarity": metric})


def _spared(shape: ModelShape, influence: Mapping[int, float], count: int) -> set[int]:
    """The layers that stay for their experts and for their attention: of each the one that turns the stream most."""
    kinds = [{moe.layer for moe in shape.moe}, set(shape.mixing) or set(range(shape.total))]
    if count == shape.total - 1:  # the one that is left has to have both
        kinds = [set.intersection(*kinds)]
        if not kinds[0]:
            raise ValueError(f"drop={count}: no single layer has both experts and attention, so two have to stay.")
    return {max(kind, key=lambda layer: (influence[layer], layer)) for kind in kinds}


def _least(influence: Mapping[int, float], count: int, spared: Iterable[int] = ()) -> list[int]:
    """The layers that turn the stream least, ascending; ValueError where that could not be measured."""
    unknown = [layer for layer, turn in influence.items() if not math.isfinite(turn)]
    if unknown:
        raise ValueError(f"how layers {unknown[:5]} turn the stream could not be measured: name the layers (layers=).")
    candidates = set(influence) - set(spared)
    return sorted(sorted(candidates, key=lambda layer: (influence[layer], layer))[:count])


# --- block drop ---------------------------------------------------------------------------------------------


def check_blocks(shape: ModelShape, *, drop: int | None, layers: str | None, mode: str, **_: Any) -> Plan:
    """Whether so many layers can go: a plan with arbitrary ones; one with experts and one with attention stay."""
    everything = list(range(shape.total))
    if layers is not None:
        return Plan(removals(_listed(layers, everything, "there are layers")), {}, {})
    count = _require_count(drop, shape.total, "layers")
    if mode == "consecutive":
        start = _run_starts(shape, count)[-1]
        return Plan(removals(everything[start : start + count]), {}, {})
    influence = {layer: -float(layer) for layer in everything}
    return Plan(removals(_least(influence, count, _spared(shape, influence, count))), {}, {})


@method(
    "model",
    group="trimming",
    paper=PAPER,
    needs=_needs,
    check=check_blocks,
    exclusive=(("drop", "layers"),),
    shown_in_names=("drop", "layers", "mode"),
    goes_with={"mode": "layers=none"},
)
def block_drop(
    model: ModelStatistics,
    *,
    drop: int | None = 1,
    layers: str | None = None,
    mode: Literal["discrete", "consecutive"] = "discrete",
) -> Plan:
    """Remove whole decoder layers that hardly turn the stream.

    drop: how many, or layers: which ones (3,7); mode: those that turn it least one by one, or the run of layers that
    turns it least from its beginning to its end.
    """
    if layers is not None:
        chosen = _listed(layers, range(model.shape.total), "there are layers")
        return Plan(removals(chosen), {}, {})
    count = _require_count(drop, model.shape.total, "layers")
    influence = {layer: found["block"] for layer, found in model.block_influence.items()}
    discrete = mode == "discrete"
    chosen = _least(influence, count, _spared(model.shape, influence, count)) if discrete else _best_run(model, count)
    scores: dict[int, list[float | None]] = {layer: [1 - turn] for layer, turn in influence.items()}
    return Plan(removals(chosen), scores, {"dropped": chosen, "mode": mode})


def _best_run(model: ModelStatistics, count: int) -> list[int]:
    """The `count` consecutive layers between whose ends the stream turns least."""
    span_influence_LL = model.span_influence_LL
    assert span_influence_LL is not None
    starts = _run_starts(model.shape, count)
    start = min(starts, key=lambda start: (float(span_influence_LL[start, start + count]), start))
    return list(range(start, start + count))


def _run_starts(shape: ModelShape, count: int) -> list[int]:
    """Where a run of `count` layers can begin that leaves layers with experts and with attention."""
    needed = [{moe.layer for moe in shape.moe}, *([set(shape.mixing)] if shape.mixing else [])]
    starts = range(shape.total - count + 1)
    possible = [n for n in starts if not any(kind <= set(range(n, n + count)) for kind in needed)]
    if not possible:
        raise ValueError(f"drop={count}: every run of so many layers holds all layers with experts or with attention.")
    return possible
