"""AWQ's first half: inputs of a layer's matrices made larger where it helps, and what makes them smaller by as much.

A norm feeds all that reads it, quantized or not, the router too: every reader is multiplied. The up projection of a
gated expert makes the input of its down projection. Whatever turns out to change what the layer returns is undone, and
reported. B experts, I inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.calibration.input_moments import Moments
from moe_compress.compression.weights.layer_probe import RecordedCall, in_full_precision, is_centred, is_close
from moe_compress.compression.weights.norm_readers import NormReaders
from moe_compress.engine.forward import LayerPass
from moe_compress.methods.weight_method import GroupSizes, InputRescaling
from moe_compress.models.families import Family
from moe_compress.models.matrices import INNER, ROUTED, ROUTER, Matrix, layer_matrices


@dataclass(frozen=True, slots=True)
class Rescale:
    """Divide what `maker` returns by scale_XI and multiply what the readers see it with.

    maker: a norm, or the name of a stack of up projections; readers: names of matrices; centred: a norm that multiplies
    by 1 + weight.
    """

    maker: str
    readers: tuple[str, ...]
    scale: Tensor
    centred: bool = False

    def apply(self, layer: nn.Module, family: Family) -> None:
        """Carry it out on a layer, whatever its dtype and device."""
        matrices = {matrix.name: matrix.weight_BOI for matrix in layer_matrices(layer, family)}
        for reader in self.readers:
            _multiply(matrices[reader], self.scale.unsqueeze(1))
        if self.maker in matrices:
            _multiply(matrices[self.maker], 1 / self.scale.unsqueeze(2))
            return
        norm: Any = layer.get_submodule(self.maker)
        for name in ("weight", "bias"):
            tensor = getattr(norm, name, None)
            if tensor is not None:
                shift = float(self.centred and name == "weight")
                new_I = (tensor.double() + shift) / self.scale[0].double().to(tensor.device) - shift
                tensor.copy_(new_I.to(tensor))

    def round(self, layer: nn.Module, family: Family, quantized: Collection[str], stored: torch.dtype) -> None:
        """Round what is not quantized as it will be stored, so that what follows is measured on that."""
        for matrix in layer_matrices(layer, family):
            if matrix.name in (*self.readers, self.maker) and matrix.name not in quantized:
                matrix.weight_BOI.copy_(matrix.weight_BOI.to(stored).to(matrix.weight_BOI))
        norm: Any = layer.get_submodule(self.maker) if f"{self.maker}.weight" in layer.state_dict() else nn.Module()
        for tensor in norm.state_dict().values():
            tensor.copy_(tensor.to(stored).to(tensor))


def _multiply(weight: Tensor, scale: Tensor) -> None:
    weight.copy_((weight.double() * scale.double().to(weight.device)).to(weight))


@dataclass
class Rescaler:
    """Searches the scales of one layer after the other."""

    family: Family
    rescaling: InputRescaling
    bits: int
    group_sizes: GroupSizes
    stored: torch.dtype

    def layer(
        self, index: int, layer: nn.Module, chosen: Sequence[Matrix], seen: Mapping[str, Moments], run: LayerPass
    ) -> tuple[list[Rescale], list[str]]:
        """What was carried out on the layer, and which norms could not be rescaled."""
        norms, called = NormReaders(self.family), RecordedCall(layer)
        run([norms, called], False, True)
        with in_full_precision(layer):
            return self._rescaled(index, layer, chosen, seen, norms.found, called)

    def _rescaled(
        self,
        index: int,
        layer: nn.Module,
        chosen: Sequence[Matrix],
        seen: Mapping[str, Moments],
        readers_by_norm: Mapping[str, Sequence[str]],
        called: RecordedCall,
    ) -> tuple[list[Rescale], list[str]]:
        """The same, in fp32: in bf16 a wrong rescaling hides behind the rounding of a stream with large entries."""
        everything = {matrix.name: matrix for matrix in layer_matrices(layer, self.family)}
        names = {matrix.name for matrix in chosen}
        done: list[Rescale] = []
        refused: list[str] = []
        for maker, readers, pow2 in [*self._norms(everything, readers_by_norm), *self._inside(everything)]:
            read = [everything[reader] for reader in readers]
            quantized = [matrix for matrix in read if matrix.name in names and self.group_sizes[index, matrix.name]]
            if not quantized or any(matrix.source not in seen for matrix in quantized):
                continue
            scale_XI = self._search(index, quantized, seen, pow2)
            centred = maker not in everything and is_centred(layer.get_submodule(maker))
            found = Rescale(maker, tuple(readers), scale_XI, centred)
            if not self._holds(layer, found, called):
                refused.append(f"{maker} of layer {index}")
            else:
                found.round(layer, self.family, names, self.stored)
                done.append(found)
        return done, refused

    def _norms(
        self, everything: Mapping[str, Matrix], readers_by_norm: Mapping[str, Sequence[str]]
    ) -> list[tuple[str, list[str], bool]]:
        """(norm, all matrices that read it, whether scales are powers of two)."""
        found = []
        for norm, modules in readers_by_norm.items():
            readers = [
                name
                for name, matrix in everything.items()
                if name in modules or (matrix.source == ROUTED and name.rpartition(".")[0] in modules)
            ]
            routed = any(everything[reader].source == ROUTER for reader in readers)
            found.append((norm, readers, self.rescaling.keeps_routing and routed))
        return found

    def _inside(self, everything: Mapping[str, Matrix]) -> list[tuple[str, list[str], bool]]:
        """(up projection, down projection) of experts and of gated MLPs."""
        pairs = []
        for name, matrix in everything.items():
            stem, _, last = name.rpartition(".")
            up = f"{stem}.{'up' if matrix.source == INNER else 'up_proj'}"
            gate = up.replace("up", "gate") if matrix.source != INNER else f"{stem}.gate"
            fits = last in ("down", "down_proj") and up in everything and gate in everything
            if fits and everything[up].weight_BOI.shape[1] == matrix.weight_BOI.shape[2]:
                pairs.append((up, [name], False))
        return pairs

    def _search(self, index: int, quantized: Sequence[Matrix], seen: Mapping[str, Moments], pow2: bool) -> Tensor:
        first = seen[quantized[0].source]
        none_B = torch.zeros(len(first.count_B), dtype=torch.bool, device=first.total.device)
        each = quantized[0].source == INNER
        square_XI = first.mean(1.0, none_B, False).diagonal(dim1=1, dim2=2) if each else first.pooled.diagonal()[None]
        stacks = []
        for matrix in quantized:
            moments = seen[matrix.source]
            # Experts count by how often they are used.
            share_B = moments.count_B / moments.count_B.sum().clamp_min(1)
            none_B = torch.zeros(len(share_B), dtype=torch.bool, device=share_B.device)
            stacks.append((matrix.weight_BOI, moments.mean(0.0, none_B, False) * share_B[:, None, None]))
        group_size = self.group_sizes[index, quantized[0].name]
        return self.rescaling.search(stacks, square_XI, self.bits, group_size, self.stored, pow2=pow2)

    def _holds(self, layer: nn.Module, rescale: Rescale, called: RecordedCall) -> bool:
        """Carry a rescaling out; if the layer does not return what it did before, nothing is left of it."""
        before = called.added(layer)
        whole = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        rescale.apply(layer, self.family)
        if is_close(called.added(layer), before):
            return True
        for name, tensor in layer.state_dict().items():
            tensor.copy_(whole[name])
        return False


def rescaled_moments(
    seen: Mapping[str, Moments], matrices: Sequence[Matrix], done: Sequence[Rescale]
) -> dict[str, Moments]:
    """Second moments of what the matrices see once the inputs are divided."""
    found = dict(seen)
    source = {matrix.name: matrix.source for matrix in matrices}
    for rescale in done:
        for name in {source[reader] for reader in rescale.readers if reader in source} & found.keys():
            found[name] = _divided(found[name], rescale.scale)
    return found


def _divided(moments: Moments, scale_XI: Tensor) -> Moments:
    outer_XII = scale_XI.unsqueeze(2) * scale_XI.unsqueeze(1)
    pooled = moments.pooled / outer_XII[0] if len(scale_XI) == 1 else (moments.total / outer_XII).sum(0)
    return replace(moments, total=moments.total / outer_XII, pooled=pooled)
