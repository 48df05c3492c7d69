"""A whole model as numbers: its layers, which of them have experts, what may be removed. A skeleton is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from moe_compress.model import hf
from moe_compress.model.edits import DropLayer, Edit
from moe_compress.model.moe import MoEShape, moe_shapes
from moe_compress.model.sublayers import attention_layers, block_names, is_whole_layer, lost_part, mixing_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """moe: the layers with experts; total: all decoder layers; whole_layers: a MoE block is a layer of its own;
    attention: the layers whose attention could be removed; mixing: all in which tokens attend to others; halved:
    those that have lost their MoE block or their attention already.
    """

    moe: list[MoEShape]
    total: int
    whole_layers: bool = False
    attention: list[int] = field(default_factory=list)
    mixing: list[int] = field(default_factory=list)
    halved: list[int] = field(default_factory=list)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The numbers of a model or a skeleton. ValueError if it has no layer with experts that can be told apart."""
    shapes = moe_shapes(model)
    if not shapes:
        raise ValueError(f"{type(model).__name__} has no layer whose experts can be told apart.")
    layers = hf.decoder_layers(model)
    whole = is_whole_layer(layers[shapes[0].layer], block_names(model))
    attention, mixing = attention_layers(model), mixing_layers(model)
    halved = [index for index, layer in enumerate(layers) if lost_part(layer)]
    return ModelShape(
        moe=shapes, total=len(layers), whole_layers=whole, attention=attention, mixing=mixing, halved=halved
    )


def removals(layers: Sequence[int]) -> list[Edit]:
    """Edits that drop these layers, whose numbers are those before any of them is gone: from the last to the first."""
    return [DropLayer(layer) for layer in sorted(layers, reverse=True)]
