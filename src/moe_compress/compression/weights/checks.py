"""What can be known of a stage that changes weights before it runs: whether it fits, and what memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import QUANTIZATION as PLAIN
from moe_compress.checkpoints.partly_packed import packed_kinds
from moe_compress.compression.weights.stage_matrices import StageMatrices
from moe_compress.methods import registry
from moe_compress.models.matrices import INNER, kinds_of
from moe_compress.recipes.recipe import Stage

# Tables as large as a Gram matrix that a solver holds beside it, for one source at a time.
SOLVER_TABLES = 4
FP32_BYTES = 4


def check_weights(stage: Stage, matrices: StageMatrices) -> None:
    """Raise ValueError for whatever the stage's words ask that these matrices cannot have."""
    check, options = registry.find(stage.method).check, matrices.options
    if check is not None:
        check(matrices.by_layer, **stage.parameters)
    at_once, least = options.experts_at_once, options.min_tokens
    if at_once < 0 or least < 1:
        raise ValueError(f"experts_at_once={at_once} min_tokens={least}: counts from 0 (all) and from 1 up are needed.")
    if options.propagate == "original" and "router" in matrices.kinds:
        raise ValueError("where=router compares the routing on the compressed stream: use propagate=compressed.")
    if not 0 <= options.shrink < float("inf"):
        raise ValueError(f"shrink={options.shrink}: a number of tokens from 0 up is needed.")


def require_rescalable(stage: Stage, model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a method that makes inputs larger where what else reads them stays packed.

    values: config.json's of what the stage leaves.
    """
    if registry.find(stage.method).implementation.rescales_inputs(stage.parameters) is None or not values.get(PLAIN):
        return
    kinds = kinds_of(stage.parameters["where"], stage.parameters["spare"])
    stays = sorted(packed_kinds(model, values) - {*kinds})
    if stays:
        raise ValueError(
            f"method=awq changes all that reads a norm, but {', '.join(stays)} would stay packed: use method=gptq, or "
            "where=all."
        )


def gram_bytes(
    chosen: StageMatrices, *, crosses: bool = False, tables: int = SOLVER_TABLES
) -> dict[int, tuple[int, int]]:
    """By layer: bytes that the Gram matrices of one expert and their solution take, and how many are held at once.

    crosses: besides them those that pair two streams; tables: that a solver holds for every expert.
    """
    found = {}
    for index, matrices in chosen.by_layer.items():
        stacks = {matrix.source: matrix.weight_BOI for matrix in matrices if matrix.kind == "experts"}
        squares = [stack.shape[2] ** 2 for stack in stacks.values()]
        each = FP32_BYTES * ((2 if crosses else 1) * sum(squares) + tables * max(squares, default=0))
        experts = max((len(stack) for stack in stacks.values()), default=0)
        found[index] = each, min(chosen.options.experts_at_once or experts, experts)
    return found


def output_gram_bytes(chosen: StageMatrices, pools: bool) -> dict[int, int]:
    """By layer: bytes of second moments of gradients: at gate and up of each expert (pools: of all), and at down."""
    found = {}
    for index, matrices in chosen.by_layer.items():
        shapes = [(matrix.source, *matrix.weight_BOI.shape) for matrix in matrices if matrix.kind == "experts"]
        found[index] = FP32_BYTES * sum(
            outputs**2 * (1 if pools or source == INNER else experts) for source, experts, outputs, _ in shapes
        )
    return found
