"""One table of scores: what `score=` of expert_drop may say is read from the functions that are decorated here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe_compress.utils.declarations import Registered, declarations

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compress.calibration.model_statistics import LayerStatistics

PACKAGE = __name__.rpartition(".")[0]
ScoreNeed = Literal["text", "weights", "outputs", "nothing"]
NAMES = Registered(PACKAGE, "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score of whole experts; higher means: keep.

    needs: what its function is given: the layer's `sums` (text, weights), its output sample and its shape (outputs), or
    the number of experts, the layer and the seed (nothing); chooses_sets: it weighs whole sets of experts and has no
    score of one.
    """

    name: str
    needs: ScoreNeed
    paper: str
    summary: str
    function: Callable[..., Any]
    chooses_sets: bool = False

    def of(self, layer: LayerStatistics, seed: int) -> Tensor:
        """The scores of a layer's experts, float64 [E]; NaN marks an expert that no token reached."""
        assert not self.chooses_sets
        if self.needs == "outputs":
            return self.function(layer.output_sample(), layer.shape)
        if self.needs == "nothing":
            return self.function(layer.shape.num_experts, layer.shape.layer, seed)
        return self.function(layer.sums)


_SCORES: dict[str, Score] = {}


def score(
    name: str, *, needs: ScoreNeed, paper: str = "", chooses_sets: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a score under a name; see `Score`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _SCORES:
            raise ValueError(f"the score {name!r} is registered twice.")
        NAMES.add(name)
        summary = (function.__doc__ or "").partition("\n")[0]
        _SCORES[name] = Score(
            name=name, needs=needs, paper=paper, summary=summary, function=function, chooses_sets=chooses_sets
        )
        return function

    return register


def scores() -> Mapping[str, Score]:
    """All scores by name; imports the modules that hold them."""
    for declaration in declarations(PACKAGE, "score"):
        if declaration.positional[0] not in _SCORES:
            declaration.load()
    return _SCORES
