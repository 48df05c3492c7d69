"""Gram matrices of what a layer's experts multiply, however much memory there is: at once, in turns, or pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from moe_compress.calibration.expert_grams import ExpertGrams, SpreadPool, SumsOnDisk
from moe_compress.calibration.input_moments import InputMomentCollector, Moments, Statistic
from moe_compress.edits.factors import Part
from moe_compress.engine.forward import LayerPass
from moe_compress.methods.factor_method import Factoring, LayerExperts
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.registry import WeightStageOptions
from moe_compress.models.families import Family
from moe_compress.models.matrices import INNER, ROUTED
from moe_compress.models.moe import MoEView

SOURCES: Mapping[Part, str] = {"gate": ROUTED, "up": ROUTED, "down": INNER}


@dataclass(slots=True)
class GramCollector:
    """Sums up Gram matrices layer by layer; rows count as much as what an expert adds does, by its gate's square.

    options: of the stage; pools: one Gram matrix for all experts, with each expert's own diagonal; scratch: where sums
    lie while experts come in turns; stored: the dtype in which factors will be stored.
    """

    family: Family
    options: WeightStageOptions
    pools: bool
    scratch: Path
    device: torch.device
    stored: torch.dtype
    found: dict[str, ExpertGrams] = field(default_factory=dict)
    kept: dict[str, SumsOnDisk] = field(default_factory=dict)

    def collect(self, view: MoEView, run: LayerPass, go_on: bool) -> None:
        """Run a layer as often as its experts need turns; `go_on` with the last of them."""
        turns = self._turns(view.num_experts)
        self.kept = {source: SumsOnDisk(self.device) for source in (ROUTED, INNER)} if len(turns) > 1 else {}
        counts: dict[str, list[int]] = {}
        for experts in turns:
            own: Statistic = "input_squares" if self.pools else "input_grams"
            observer = InputMomentCollector(self.family, ["experts"], own, experts, by_gate=True, pooled="input_grams")
            run([observer], go_on and experts is turns[-1])
            for source, moments in observer.found.items():
                counts.setdefault(source, []).extend(moments.count_B.tolist())
                if experts is not None:
                    self.kept[source].keep(experts, self.scratch / f"grams-{source}-{experts.start}", moments.total)
        for source, moments in observer.found.items():
            self.found[source] = self._grams(source, moments, counts[source])

    def _turns(self, experts: int) -> list[range | None]:
        """Experts whose sums are held at the same time; None: all of them."""
        at_once = self.options.experts_at_once
        if self.pools or not 0 < at_once < experts:
            return [None]
        return [range(start, min(start + at_once, experts)) for start in range(0, experts, at_once)]

    def _grams(self, source: str, moments: Moments, counts: list[int]) -> ExpertGrams:
        sums = SpreadPool(moments.pooled, moments.total) if self.pools else self.kept.get(source, moments.total)
        return ExpertGrams(
            sums,
            counts,
            moments.pooled,
            moments.pooled_count,
            self.options.shrink,
            self.options.min_tokens,
            self.options.unseen == "pooled",
        )

    def experts(
        self, index: int, view: MoEView, factoring: Factoring, own: Mapping[str, Any], sizes: Mapping[Part, Size]
    ) -> LayerExperts:
        """A layer's experts with what they multiply (None where no text was read), those projections that change."""
        stacks = {part: stack_EOI for part in get_args(Part) if (stack_EOI := view.stacks().get(part)) is not None}
        chosen = factoring.projections(list(stacks), own)
        return LayerExperts(
            layer=index,
            weights={part: stacks[part].detach() for part in chosen},
            grams={part: self.found.get(SOURCES[part]) for part in chosen},
            sizes=sizes,
            stored=self.stored,
        )

    @property
    def counts(self) -> dict[str, list[int]]:
        """Tokens of every expert, and experts that saw too few, for reports."""
        found = self.found.get(ROUTED)
        return {"tokens": list(found.counts), "unseen": found.rare} if found is not None else {}

    def require_seen(self, index: int) -> None:
        """Raise ValueError for experts with too few tokens, if the recipe says that there may be none."""
        rare = self.found[ROUTED].rare if ROUTED in self.found else []
        if rare and self.options.unseen == "error":
            named = ", ".join(map(str, rare[:3]))
            raise ValueError(
                f"experts {named} of layer {index}: fewer than {self.options.min_tokens} tokens of the calibration "
                "text. Calibrate on more (samples=), or say unseen=pooled or unseen=plain."
            )

    def release(self) -> None:
        """The layer is done."""
        for kept in self.kept.values():
            kept.remove()
        self.found, self.kept = {}, {}
