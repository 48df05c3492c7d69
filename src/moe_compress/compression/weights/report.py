"""What a weight stage says of itself, from the notes of its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from moe_compress.compression.weights.layer_stores import MatrixChange
from moe_compress.methods import registry
from moe_compress.methods.weight_method import GroupSizes
from moe_compress.models.matrices import Kind
from moe_compress.recipes.recipe import Stage
from moe_compress.utils.logging import log

LayerNotes = Mapping[int, Mapping[str, Any]]
SHOWN = 3


def weights_report(stage: Stage, kinds: Sequence[Kind], notes: LayerNotes, sizes: GroupSizes) -> dict[str, Any]:
    """Shares of zeros or of packed weights; experts with too few tokens; changed routing; raised dampings.

    notes: of every layer in which something changed; sizes: inputs that share a scale, 0 where none can.
    """
    method = registry.find(stage.method)
    quantized, rescales = method.quantizes, method.implementation.rescales_inputs
    found = _quantized(kinds, notes) if quantized else _sparsity(kinds, notes)
    if quantized:
        found["skipped"] = _skipped(sizes)
    for key, name in (("unseen", "unseen"), ("tokens", "tokens"), ("routing", "routing_change")):
        found[name] = {i: note[key] for i, note in notes.items() if note.get(key)}
    found["damping_raised"] = _all(notes, "damped")
    if rescales(stage.parameters) is not None:
        found["rescaled"] = {i: note["rescaled"] for i, note in notes.items() if note.get("rescaled")}
        found["not_rescaled"] = _all(notes, "not_rescaled")
        found["routing_rescaled"] = {i: n["routing_rescaled"] for i, n in notes.items() if n.get("routing_rescaled")}
    return found


def counts(changes: Sequence[MatrixChange]) -> dict[str, dict[str, int]]:
    """Of one layer: zeros and weights, packed weights and their bits, by kind of matrix."""
    found: dict[str, dict[str, int]] = {key: defaultdict(int) for key in ("zeros", "weights", "packed", "bits")}
    for change in changes:
        kind, quantized = change.matrix.kind, change.quantized
        found["zeros"][kind] += int((change.result == 0).sum())
        found["weights"][kind] += change.result.numel()
        if quantized is not None:
            found["packed"][kind] += quantized.codes.numel()
            found["bits"][kind] += sum(quantized.bits) * quantized.codes[0].numel()
    return found


def warn_of_skipped(sizes: GroupSizes) -> None:
    """Say which matrices stay as they are."""
    left = _skipped(sizes)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        which = ", ".join(left[:SHOWN]) + more
        log.warning(
            "left as they are, for no group of 8 inputs or more divides their width, or readers take them plain: %s.",
            which,
        )


def _skipped(sizes: GroupSizes) -> list[str]:
    return [f"{name} of layer {layer}" for (layer, name), group_size in sizes.items() if not group_size]


def _all(notes: LayerNotes, key: str) -> list[str]:
    return [name for note in notes.values() for name in note.get(key, ())]


def _sparsity(kinds: Sequence[Kind], notes: LayerNotes) -> dict[str, Any]:
    """Shares of zeros by part of a layer and by layer."""
    zeros, weights = (_sums(kinds, notes, key) for key in ("zeros", "weights"))
    by_layer = {i: sum(note["zeros"].values()) / sum(note["weights"].values()) for i, note in notes.items()}
    return {"sparsity": {k: zeros[k] / weights[k] for k in kinds if weights[k]}, "sparsity_by_layer": by_layer}


def _quantized(kinds: Sequence[Kind], notes: LayerNotes) -> dict[str, Any]:
    """Shares of weights that are packed, their bits, and what was left as it is, by part of a layer."""
    packed, weights, bits, zeros = (_sums(kinds, notes, key) for key in ("packed", "weights", "bits", "zeros"))
    return {
        "quantized": {k: packed[k] / weights[k] for k in kinds if weights[k]},
        "bits": {k: bits[k] / packed[k] for k in kinds if packed[k]},
        "zeros": {k: zeros[k] / weights[k] for k in kinds if weights[k]},
    }


def _sums(kinds: Sequence[Kind], notes: LayerNotes, key: str) -> dict[str, int]:
    return {kind: sum(note[key].get(kind, 0) for note in notes.values()) for kind in kinds}
