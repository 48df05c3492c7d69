"""What a method is given: the model as numbers, what a calibration pass saw of it, and ways to look closer.

E experts, L layers. Nothing here names a file: weights and output samples are handed over as functions that fetch them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moe_compress.calibration.output_sample import OutputSample
from moe_compress.edits.edits import Edit
from moe_compress.models.moe import MoEView
from moe_compress.models.shape import ModelShape, MoEShape

Evaluate = Callable[[Sequence[Edit]], float]
Sums = Mapping[str, Tensor]


def _unavailable() -> contextlib.AbstractContextManager[MoEView]:
    raise ValueError("the weights of this layer are not at hand.")


def _no_output_sample() -> OutputSample:
    raise ValueError("this layer has no output sample: the method has to say needs='outputs'.")


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What is known of one MoE layer: its shape, [E] sums over the calibration text, and context.

    view: the layer's weights, read when asked for, inside a `with`; output_sample: all its experts on some tokens;
    by_domain: `count` and `tokens` of each domain of the text alone.
    """

    shape: MoEShape
    sums: Sums
    total_layers: int
    paper_gate: str
    view: Callable[[], contextlib.AbstractContextManager[MoEView]] = _unavailable
    output_sample: Callable[[], OutputSample] = _no_output_sample
    by_domain: Mapping[str, Sums] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatistics:
    """A model as a method sees it.

    layers: the MoE layers; block_influence: for every decoder layer how far it and its sub-layers turn the stream (mean
    1 - cos, `calibration/block_influence.py`); span_influence_LL: the same between the stream before layer i and before
    layer j, [L+1, L+1];
    evaluate: how well the model would agree with the original after some edits, from 0 to 1, on text that is in no sum
    and no loss here, if in mean outputs and span_influence_LL (only where the parameters ask for a search).
    """

    shape: ModelShape
    layers: Sequence[LayerStatistics]
    block_influence: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    span_influence_LL: Tensor | None = None
    evaluate: Evaluate | None = None
