"""Which modules of a layer see what a norm returns, found out by running it once: nothing is known of families.

T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_compress.engine.observer import BatchInfo
from moe_compress.models.families import Family
from moe_compress.models.moe import moe_view
from moe_compress.models.sublayers import within


class NormReaders:
    """`found`: norm -> modules whose input is its output (linear maps, the router, the experts), by name."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.found: dict[str, list[str]] = {}

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to every norm and to everything that may read one."""
        view = moe_view(layer, self.family)
        special: dict[int, str] = {}
        if view is not None:
            special = {id(view.router): view.names["router"], id(view.experts): view.names["experts"]}
        self.made: dict[int, tuple[str, Tensor]] = {}
        self.found = {}
        self.hooks: list[Any] = []
        for name, module in layer.named_modules():
            if id(module) in special or (
                isinstance(module, nn.Linear) and not any(within(name, place) for place in special.values())
            ):
                self.hooks.append(module.register_forward_pre_hook(self._reads(name), with_kwargs=True))
            elif _is_norm(module):
                self.hooks.append(module.register_forward_hook(self._makes(name)))

    def _makes(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # kept, so that its place in memory stays its own
                self.made[output.data_ptr()] = name, output

        return hook

    def _reads(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            norm, output = self.made.get(x.data_ptr(), ("", None)) if x is not None else ("", None)
            if output is not None and x is not None and x.numel() == output.numel():
                self.found.setdefault(norm, []).append(name)

        return hook

    def begin(self, batch: BatchInfo) -> None:
        """One batch is as good as another."""
        self.made.clear()
        self.found = {}

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()
        self.made.clear()
        return {}


def _is_norm(module: nn.Module) -> bool:
    """One vector of weights and nothing else but perhaps a bias."""
    names = {name for name, parameter in module.named_parameters() if parameter is not None}
    return "Norm" in type(module).__name__ and "weight" in names <= {"weight", "bias"} and not [*module.children()]
