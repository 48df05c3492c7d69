"""Which matrices of a model a weight stage changes, worked out once; a skeleton is enough."""

from __future__ import annotations

from transformers import PreTrainedModel

from moe_compress.methods import registry
from moe_compress.methods.factor_method import Factoring
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, kinds_of, layer_matrices
from moe_compress.models.modeling.factored_experts import FactoredLinear
from moe_compress.models.moe import moe_views
from moe_compress.recipes.recipe import Stage


def factoring_of(stage: Stage) -> Factoring:
    """What the method of a stage that leaves factors tells of them."""
    factoring = registry.find(stage.method).implementation.factoring
    assert factoring is not None
    return factoring


class StageMatrices:
    """A stage's words about a model: its options, the grid it asks for, and the matrices it changes.

    kinds: parts of a layer; by_layer: their matrices; packable: those that may be stored as codes, for routers are no
    linear maps and stay plain numbers; grid: None for methods that do not quantize. ValueError if no matrix is chosen.
    """

    def __init__(self, stage: Stage, model: PreTrainedModel) -> None:
        self.model, self.options = model, WeightStageOptions.of(stage.parameters)
        self.kinds, family = kinds_of(self.options.where, self.options.spare), family_of(model.config)
        layers = enumerate(hf.decoder_layers(model))
        self.by_layer: dict[int, list[Matrix]] = {i: layer_matrices(layer, family, self.kinds) for i, layer in layers}
        if registry.find(stage.method).implementation.factoring is not None:
            chosen = moe_views(model)  # layers that look experts up stay whole
            self.by_layer = {i: found if i in chosen else [] for i, found in self.by_layer.items()}
        if not any(self.by_layer.values()):
            raise ValueError(
                f"where={self.options.where}: {model.config.model_type} has no such part that can be told apart."
            )
        grid = registry.find(stage.method).implementation.grid
        self.grid = grid(stage.parameters) if grid is not None else None
        self._require_factors(stage)

    def _require_factors(self, stage: Stage) -> None:
        """Raise ValueError for experts that are held in factors, unless these are only rounded to the nearest."""
        factors = registry.find(stage.method).implementation.factoring is not None
        if (
            factors
            and "shared" in self.kinds
            and any(isinstance(each, FactoredLinear) for each in self.model.modules())
        ):
            raise ValueError(f"{stage.method}: shared experts are held in factors already: use where=experts.")
        factored = any(view.factored for view in moe_views(self.model).values())
        shared_out = registry.find(stage.method).implementation.allocates_bits(stage.parameters) is not None
        if "experts" in self.kinds and factored and (self.grid is None or stage.needs != "nothing" or shared_out):
            raise ValueError(
                f"{stage.method}: experts that are held in factors can be rounded to the nearest alone (quantize "
                "method=rtn with one width for all): put this stage before factorise, or choose other parts (where=)."
            )

    @property
    def packable(self) -> dict[int, list[Matrix]]:
        """Without the routers."""
        return {i: [m for m in matrices if m.kind != "router"] for i, matrices in self.by_layer.items()}

    @property
    def routers(self) -> dict[int, list[Matrix]]:
        """The routers alone."""
        return {i: [m for m in matrices if m.kind == "router"] for i, matrices in self.by_layer.items()}
