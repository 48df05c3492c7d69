"""Compression plans of single layers, to read, to change and to carry out: who is merged, who pruned, who stays.

E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from moe_compress.analysis.argument_checks import validated
from moe_compress.edits.edits import Edit, KeepExperts, MergeExperts
from moe_compress.models.moe import MoEView
from moe_compress.utils.choices import one_of
from moe_compress.utils.devices import DTYPES, dtype_name

BLENDS = ("weighted", "average", "dominant")


@dataclass
class ExpertMergeResult:
    """Experts that become one: `source_experts` go into `target_expert`, whose router row stays.

    similarity: of the two members least alike, by outputs; weight_blend: `weighted` by `shares` (the routed mass of
    target and sources), `average`, or `dominant` (the target as it is).
    """

    source_experts: list[int]
    target_expert: int
    similarity: float
    weight_blend: str = "weighted"
    shares: list[float] = field(default_factory=list)

    @property
    def members(self) -> list[int]:
        """Target and sources."""
        return [self.target_expert, *self.source_experts]

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of each member in the merged expert."""
        one_of(self.weight_blend, BLENDS, "weight_blend")
        if self.weight_blend == "dominant":
            return (1.0, *[0.0] * len(self.source_experts))
        if self.weight_blend == "average" or not sum(self.shares) > 0:
            return (1.0,) * len(self.members)
        return tuple(self.shares)


@dataclass
class CompressionPlan:
    """What is to be done to one layer. Every expert is kept (unchanged), pruned, or in a merge.

    estimated_memory_reduction: share of the layer's routed expert weights; estimated_quality_impact: `predicted_error`
    in a word; predicted_error: relative error of the layer's routed output on a sample of the analysed tokens.
    """

    original_num_experts: int
    target_num_experts: int
    merges: list[ExpertMergeResult]
    pruned_experts: list[int]
    kept_experts: list[int]
    estimated_memory_reduction: float
    estimated_quality_impact: str
    expert_params: int | None = None
    layer_idx: int | None = None
    predicted_error: float | None = None

    @property
    def params_removed(self) -> int | None:
        """Expert parameters that go."""
        return None if self.expert_params is None else self.experts_removed * self.expert_params

    @property
    def experts_removed(self) -> int:
        """Experts that go."""
        return self.original_num_experts - self.target_num_experts

    @property
    def survivors(self) -> list[int]:
        """The experts whose router rows stay: those kept and the targets of merges."""
        return sorted([*self.kept_experts, *(merge.target_expert for merge in self.merges)])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Experts that become one, target first, and all others by themselves; by their first members."""
        alone = [(expert,) for expert in (*self.kept_experts, *self.pruned_experts)]
        return tuple(sorted([*alone, *(tuple(merge.members) for merge in self.merges)]))

    @property
    def compression_ratio(self) -> float:
        """Target over original experts."""
        return self.target_num_experts / self.original_num_experts

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompressionPlan:
        """The plan that `to_json` gave; ValueError for what is none."""
        _require_fields(cls, values)
        for merge in values["merges"] if isinstance(values["merges"], list) else ():
            _require_fields(ExpertMergeResult, merge)
        return validated(cls, values)


@dataclass
class CompressedMoEConfig:
    """What became of one layer's experts. expert_mapping: old -> new, -1 for pruned, the merged expert for its members;
    merged_from: merged expert -> those that it was; router_remap: the new router's rows, one a new expert.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)
    layer_idx: int
    original_num_experts: int
    compressed_num_experts: int
    expert_mapping: dict[int, int]
    merged_from: dict[int, list[int]]
    router_remap: Tensor | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, the router's rows included."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = self.router_remap
        remap = None if rows is None else {"dtype": dtype_name(rows.dtype), "rows": rows.tolist()}
        return {
            **found,
            "expert_mapping": {str(old): new for old, new in self.expert_mapping.items()},
            "merged_from": {str(new): old for new, old in self.merged_from.items()},
            "router_remap": remap,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompressedMoEConfig:
        """The config that `to_json` gave; ValueError for what is none."""
        _require_fields(cls, values)
        remap = values["router_remap"]
        try:
            rows = None if remap is None else torch.tensor(remap["rows"], dtype=DTYPES[remap["dtype"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("router_remap needs a `dtype` and `rows`, a list of lists of numbers.") from error
        return validated(cls, {**values, "router_remap": rows})


def _require_fields(kind: type, values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(kind)]
    if not isinstance(values, Mapping) or set(values) != set(names):
        given = ", ".join(map(str, values)) if isinstance(values, Mapping) else f"{values!r:.60}"
        raise ValueError(f"a {kind.__name__} has the fields {', '.join(names)}, not {given}.")


# --- carrying out -------------------------------------------------------------------------------------------


def edits_of(plan: CompressionPlan, layer: int, order_EF: Tensor) -> list[Edit]:
    """The plan as edits: members of a merge brought into one order and averaged, then the pruned experts dropped."""
    weights = {tuple(merge.members): merge.weights for merge in plan.merges}
    edits: list[Edit] = []
    if plan.merges:
        shares = tuple(weights.get(group, (1.0,)) for group in plan.groups)
        edits.append(MergeExperts(layer, plan.groups, shares, "centroid", aligned=True, arrays={"order": order_EF}))
    if plan.pruned_experts:
        left = tuple(place for place, group in enumerate(plan.groups) if group[0] not in plan.pruned_experts)
        edits.append(KeepExperts(layer, left))
    return edits


def require_whole(plan: CompressionPlan, layer: int, view: MoEView) -> None:
    """Raise ValueError unless the plan fits the layer and shares out its experts, each once."""
    if plan.layer_idx not in (None, layer):
        raise ValueError(f"the plan was made for layer {plan.layer_idx}, not for layer {layer}.")
    if plan.original_num_experts != view.num_experts:
        raise ValueError(
            f"the plan is for {plan.original_num_experts} experts, but layer {layer} has {view.num_experts}: it was "
            "compressed since, or it is another layer; make a new plan."
        )
    members = [e for merge in plan.merges for e in merge.members]
    listed = [*plan.kept_experts, *plan.pruned_experts, *members]
    if sorted(listed) != list(range(view.num_experts)):
        raise ValueError(f"the plan for layer {layer} must name each of its {view.num_experts} experts once: {listed}.")
    left = len(plan.kept_experts) + len(plan.merges)
    if left != plan.target_num_experts:
        raise ValueError(f"the plan for layer {layer} leaves {left} experts, not {plan.target_num_experts} as it says.")


def config_of(plan: CompressionPlan, layer: int, view: MoEView) -> CompressedMoEConfig:
    """Where each expert of a layer goes, and the router's new rows; the layer is only read."""
    merged = {merge.target_expert: merge.members for merge in plan.merges}
    mapping = dict.fromkeys(range(view.num_experts), -1)
    for new, old in enumerate(plan.survivors):
        mapping |= dict.fromkeys(merged.get(old, [old]), new)
    return CompressedMoEConfig(
        layer_idx=layer,
        original_num_experts=plan.original_num_experts,
        compressed_num_experts=plan.target_num_experts,
        expert_mapping=mapping,
        merged_from={mapping[first]: sorted(members) for first, members in merged.items()},
        router_remap=view.router_rows_ED.detach()[plan.survivors].cpu(),
    )
