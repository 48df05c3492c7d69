"""Gram matrices of what a layer's experts multiply, however much memory there is: at once, in turns, or pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from moe_compress.calibration.expert_grams import ExpertGrams, SpreadPool, Sums, SumsOnDisk
from moe_compress.calibration.input_crosses import InputCrosses
from moe_compress.calibration.input_moments import InputMomentCollector, Moments, Statistic
from moe_compress.compression.weights.output_grams import outputs_of
from moe_compress.edits.factors import Part
from moe_compress.engine.forward import LayerPass
from moe_compress.engine.observer import Observer
from moe_compress.methods.factor_method import Factoring, LayerExperts
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Grams
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models.families import Family
from moe_compress.models.matrices import INNER, ROUTED, Kind, Matrix
from moe_compress.models.moe import MoEView

SOURCES: Mapping[Part, str] = {"gate": ROUTED, "up": ROUTED, "down": INNER}


@dataclass(slots=True)
class GramCollector:
    """Sums up Gram matrices layer by layer; rows count as much as what an expert adds does, by its gate's square.

    options: of the stage; pools: one Gram matrix for all experts, with each expert's own diagonal; scratch: where sums
    lie while experts come in turns; stored: the dtype in which factors will be stored; outputs: whether `scratch` holds
    how much the loss minds what projections put out; gradients: mean squares of that, where they were measured; kinds:
    what changes: routed experts, and linear maps of shared ones, whose rows all count alike.
    """

    family: Family
    options: WeightStageOptions
    pools: bool
    scratch: Path
    device: torch.device
    stored: torch.dtype
    outputs: bool = False
    gradients: Mapping[int, Mapping[Part, float]] = field(default_factory=dict)
    kinds: Sequence[Kind] = ("experts",)
    found: dict[str, ExpertGrams] = field(default_factory=dict)
    linears: dict[str, Tensor] = field(default_factory=dict)
    crossed: dict[str, ExpertGrams] = field(default_factory=dict)
    kept: list[SumsOnDisk] = field(default_factory=list)

    def collect(self, view: MoEView, run: LayerPass, go_on: bool, originals: Sequence[Tensor] | None = None) -> None:
        """Run a layer as often as its experts need turns; `go_on` with the last of them.

        originals: of each batch, what experts were sent before anything was compressed, to be paired with what they are
        sent now.
        """
        turns = self._turns(view.num_experts) if "experts" in self.kinds else []
        if "shared" in self.kinds:
            beside = InputMomentCollector(self.family, ["shared"], "input_grams", None)
            run([beside], go_on and not turns)
            self.linears = {source: moments.total[0] for source, moments in beside.found.items()}
        crosses = InputCrosses(self.family, originals) if originals is not None else None
        grams, crossed = _Gathered("grams", self), _Gathered("crosses", self)
        for experts in turns:
            own: Statistic = "input_squares" if self.pools else "input_grams"
            observer = InputMomentCollector(self.family, ["experts"], own, experts, by_gate=True, pooled="input_grams")
            observers: list[Observer] = [observer]
            if crosses is not None:
                crosses.experts = experts
                observers.append(crosses)
            run(observers, go_on and experts is turns[-1])
            grams.take(experts, observer.found)
            crossed.take(experts, crosses.found if crosses is not None else {})
        self.found, self.crossed = grams.of_layer(), crossed.of_layer()

    def _turns(self, experts: int) -> list[range | None]:
        """Experts whose sums are held at the same time; None: all of them."""
        at_once = self.options.experts_at_once
        if self.pools or not 0 < at_once < experts:
            return [None]
        return [range(start, min(start + at_once, experts)) for start in range(0, experts, at_once)]

    def experts(
        self,
        index: int,
        view: MoEView,
        factoring: Factoring,
        own: Mapping[str, Any],
        sizes: Mapping[Part, Size],
        order_EF: Tensor | None = None,
        beside: Sequence[Matrix] = (),
    ) -> LayerExperts:
        """A layer's experts with what they multiply (None where no text was read), those projections that change.

        order_EF: the order in which neurons have been put; beside: linear maps of shared experts that change.
        """
        stacks: dict[Part, Tensor] = {}
        if "experts" in self.kinds:
            stacks = {part: stack_EOI for part in get_args(Part) if (stack_EOI := view.stacks().get(part)) is not None}
        chosen = factoring.projections(list(stacks), own) if stacks else []
        outputs: dict[Part, Grams] = {}
        if self.outputs:
            outputs = outputs_of(self.scratch, index, view.num_experts, self.options, order_EF, self.device)
        return LayerExperts(
            layer=index,
            weights={part: stacks[part].detach() for part in chosen},
            grams={part: self.found.get(SOURCES[part]) for part in chosen},
            crosses={part: self.crossed[SOURCES[part]] for part in chosen if SOURCES[part] in self.crossed},
            outputs={part: outputs[part] for part in chosen if part in outputs},
            gradients=self.gradients.get(index, {}),
            sizes=sizes,
            linears={matrix.name: matrix.weight_BOI[0] for matrix in beside},
            linear_grams=self.linears,
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
        for kept in self.kept:
            kept.remove()
        self.found, self.crossed, self.linears, self.kept = {}, {}, {}, []


class _Gathered:
    """Sums of one kind, by source, as experts come in turns: in memory where all come at once, else in files."""

    def __init__(self, name: str, collector: GramCollector) -> None:
        self.name, self.collector = name, collector
        self.counts: dict[str, list[int]] = {}
        self.on_disk: dict[str, SumsOnDisk] = {}
        self.last: Mapping[str, Moments] = {}

    def take(self, experts: range | None, found: Mapping[str, Moments]) -> None:
        """The sums of those whose turn it was (None: of all), and the pooled ones of all that have been."""
        self.last = found
        for source, moments in found.items():
            self.counts.setdefault(source, []).extend(moments.count_B.tolist())
            if experts is None:
                continue
            if source not in self.on_disk:
                self.on_disk[source] = SumsOnDisk(self.collector.device)
                self.collector.kept.append(self.on_disk[source])
            file = self.collector.scratch / f"{self.name}-{source}-{experts.start}"
            self.on_disk[source].keep(experts, file, moments.total)

    def of_layer(self) -> dict[str, ExpertGrams]:
        """What comes of them, by source."""
        options, found = self.collector.options, {}
        for source, moments in self.last.items():
            sums: Sums = self.on_disk.get(source, moments.total)
            if self.collector.pools:
                sums = SpreadPool(moments.pooled, moments.total)
            found[source] = ExpertGrams(
                sums,
                self.counts[source],
                moments.pooled,
                moments.pooled_count,
                options.shrink,
                options.min_tokens,
                options.unseen == "pooled",
            )
        return found
