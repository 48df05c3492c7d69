"""What can be known of a stage that changes weights before it runs: whether it fits, and what memory it takes."""

from __future__ import annotations

from transformers import PreTrainedModel

from moe_compress.compression.weights.format_choice import group_sizes
from moe_compress.methods import registry
from moe_compress.methods.registry import WeightStageOptions
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, kinds_of, layer_matrices
from moe_compress.recipes.recipe import Stage

# Tables as large as a Gram matrix that a solver holds beside it, for one source at a time.
SOLVER_TABLES = 4
FP32_BYTES = 4


def check_weights(stage: Stage, model: PreTrainedModel) -> None:
    """Raise ValueError for whatever can be known of a weight stage from a skeleton."""
    matrices, check = chosen_matrices(stage, model), registry.find(stage.method).check
    if check is not None:
        check(matrices, **stage.parameters)
    group_sizes(stage, model)
    options = WeightStageOptions.of(stage.parameters)
    at_once, least = options.experts_at_once, options.min_tokens
    if at_once < 0 or least < 1:
        raise ValueError(f"experts_at_once={at_once} min_tokens={least}: counts from 0 (all) and from 1 up are needed.")
    if options.propagate == "original" and "router" in kinds_of(options.where, options.spare):
        raise ValueError("where=router compares the routing on the compressed stream: use propagate=compressed.")
    if not 0 <= options.shrink < float("inf"):
        raise ValueError(f"shrink={options.shrink}: a number of tokens from 0 up is needed.")


def chosen_matrices(stage: Stage, model: PreTrainedModel) -> dict[int, list[Matrix]]:
    """The matrices that a stage changes, by layer. ValueError if there are none."""
    where, spare = stage.parameters["where"], stage.parameters["spare"]
    kinds, family = kinds_of(where, spare), family_of(model.config)
    found = {i: layer_matrices(layer, family, kinds) for i, layer in enumerate(hf.decoder_layers(model))}
    if not any(found.values()):
        raise ValueError(f"where={where}: {model.config.model_type} has no such part that can be told apart.")
    return found


def gram_bytes(stage: Stage, model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """By layer: bytes that the Gram matrices of one expert and their solution take, and how many are held at once."""
    found = {}
    for index, matrices in chosen_matrices(stage, model).items():
        stacks = {matrix.source: matrix.weight_BOI for matrix in matrices if matrix.kind == "experts"}
        squares = [stack.shape[2] ** 2 for stack in stacks.values()]
        each = FP32_BYTES * (sum(squares) + SOLVER_TABLES * max(squares, default=0))
        experts = max((len(stack) for stack in stacks.values()), default=0)
        found[index] = each, min(stage.parameters["experts_at_once"] or experts, experts)
    return found
