"""Edits: everything a method changes about the structure, as values that can be read, saved and replayed.

An edit names its layer, goes to JSON and back, says whether a layer can take it, and is carried out by
`model/edited.py` on real and meta tensors alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.model import edited, hf
from moe_compress.model.families import COUNT_KEYS, family_of
from moe_compress.model.moe import MoEShape, moe_shapes, moe_views


@dataclass(frozen=True, slots=True)
class KeepExperts:
    """Keep these routed experts of one layer, drop the others; router rows and biases go with them."""

    kind: ClassVar[str] = "keep_experts"
    layer: int
    experts: tuple[int, ...]

    def check(self, shape: MoEShape) -> None:
        """Raise ValueError if the layer cannot work with these experts."""
        shape.require_ids(self.experts)


Edit = KeepExperts
KINDS = {cls.kind: cls for cls in (KeepExperts,)}


@dataclass(frozen=True)
class Plan:
    """What a method decided: edits, the scores [layer][expert] behind them, and what should be reported."""

    edits: list[Edit]
    scores: dict[int, list[float | None]]
    report: dict[str, Any]


def to_json(edit: Edit) -> dict[str, Any]:
    """An edit as a JSON object."""
    return {"edit": edit.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(edit).items()}}


def from_json(values: Mapping[str, Any]) -> Edit:
    """An edit from a JSON object; ValueError says what is wrong with it."""
    kind = values.get("edit")
    if kind not in KINDS:
        raise ValueError(f"unknown edit {kind!r} in the plan; known: {', '.join(KINDS)}.")
    try:
        layer, experts = values["layer"], values["experts"]
    except KeyError as error:
        raise ValueError(f"an edit {kind!r} in the plan lacks {error}.") from error
    if not isinstance(layer, int) or not all(isinstance(e, int) for e in experts):
        raise ValueError(f"an edit {kind!r} in the plan needs whole numbers for layer and experts.")
    return KINDS[kind](layer=layer, experts=tuple(experts))


def check_edits(model: PreTrainedModel, edits: Iterable[Edit]) -> None:
    """Raise ValueError if any edit does not fit the model; a skeleton is enough."""
    refuse_if_uneditable(model.config)
    shapes = {shape.layer: shape for shape in moe_shapes(model)}
    seen: set[int] = set()
    for edit in edits:
        if edit.layer not in shapes:
            raise ValueError(f"the plan edits layer {edit.layer}, which has no experts; MoE layers: {list(shapes)}.")
        if edit.layer in seen:
            raise ValueError(f"the plan edits layer {edit.layer} twice.")
        seen.add(edit.layer)
        edit.check(shapes[edit.layer])


def refuse_if_uneditable(config: PreTrainedConfig) -> None:
    """Raise ValueError, with the reason, for a family whose experts cannot be cut."""
    family = family_of(config)
    if family.no_expert_edits:
        raise ValueError(f"experts of {family.model_type} cannot be dropped: {family.no_expert_edits}.")


def apply_edits(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Carry out edits on a whole model in memory (or on a skeleton)."""
    if edits:
        edited.replay(model, {"moe": block_names(model), "edits": [to_json(edit) for edit in edits]})


def block_names(model: PreTrainedModel) -> dict[str, str]:
    """Where, inside a decoder layer, the MoE block, its experts and its router are."""
    return next(iter(moe_views(model).values())).names


def edited_values(values: Mapping[str, Any], edits: Sequence[Edit]) -> tuple[dict[str, Any], bool]:
    """config.json values after the edits, and whether they describe a plain checkpoint.

    Plain means: the ordinary architecture, built from the new values, has the very names and shapes of the
    edited model. Nobody guesses; both are built without weights and compared.
    """
    base, earlier = split_values(values)
    everything = [*earlier, *map(to_json, edits)]
    if not everything:
        return base, True
    if base.get("num_nextn_predict_layers"):
        # Their experts are not cut, and engines read one expert count for all layers: they are left out.
        base["num_nextn_predict_layers"] = 0
    config = hf.config_from(base)
    model = hf.skeleton(config, torch.bfloat16)
    names = block_names(model)
    edited.replay(model, {"moe": names, "edits": everything})
    plain = _plain_values(base, config, model)
    if plain is not None:
        return plain, True
    manifest = {"base_model_type": config.model_type, "moe": names, "edits": everything}
    return hf.edited_config_values(base, manifest), False


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """config.json values -> (those of the original architecture, the edits already carried out)."""
    base = copy.deepcopy(dict(values))
    base.pop("auto_map", None)  # the architecture is transformers' own, and its remote code is not copied
    manifest = base.pop("moe_compress", None)
    if manifest is None:
        return base, []
    base["model_type"] = manifest["base_model_type"]
    base["architectures"] = manifest["base_architectures"]
    return base, list(manifest["edits"])


def _plain_values(base: Mapping[str, Any], config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any] | None:
    counts = {view.num_experts for view in moe_views(model).values()}
    if len(counts) != 1:
        return None
    count = counts.pop()
    family = family_of(config)
    before = getattr(config, family.count_key)
    present = [key for key in COUNT_KEYS if base.get(key) == before] or [family.count_key]
    values = {**base, **dict.fromkeys(present, count)}
    rebuilt = hf.skeleton(hf.config_from(values), torch.bfloat16)
    return values if hf.shapes(rebuilt) == hf.shapes(model) else None
