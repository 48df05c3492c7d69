"""What a training shares out among processes: the windows of a step, and, where that is asked for, the layers (FSDP2).

Each layer is a unit of its own, for layers are called one by one; embeddings, the final norm and the head stay whole in
every process, and so do codes, and parameters of another dtype than the layer's, such as routers in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.run.processes import Processes


def shard_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its share of a layer's parameters, in place; a call of the layer puts them together for it."""
    coded = {each for module in layer.modules() if isinstance(module, PackedMatrix) for each in module.parameters()}
    numbers = Counter[torch.dtype]()
    for each in layer.parameters():
        if each.is_floating_point() and each not in coded:
            numbers[each.dtype] += each.numel()
    if not numbers:
        return
    usual = max(numbers, key=lambda dtype: numbers[dtype])
    kept = {each for each in layer.parameters() if each in coded or each.dtype != usual}
    # A layer that is called by itself counts as a root, which would stay whole unless told otherwise.
    unit = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    # Losses are divided by the tokens of all processes already: sums, not means.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: of one that is shared out on the CPU in the first process, and but its shape in the others.

    All processes have to ask for it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.to("meta" if tensor.device_mesh.get_rank() else "cpu")


def everywhere(number: Tensor) -> Tensor:
    """A number that was computed of what is shared out, in all processes."""
    return number.full_tensor() if isinstance(number, DTensor) else number


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has all of, shared out as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are whole, and those that are shared out: kernels over many tensors take one kind at a time."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for each in parameters:
        kinds[isinstance(each, DTensor)].append(each)
    return [kind for kind in kinds if kind]


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Cut the norm of all gradients together to `most`."""
    felt = by_kind(each for each in parameters if each.grad is not None)
    norms = [
        everywhere(nn.utils.get_total_norm([each.grad for each in kind if each.grad is not None])) for kind in felt
    ]
    if not norms:
        return
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for kind in felt:
        nn.utils.clip_grads_with_norm_(kind, most, total)


def add_gradients(
    processes: Processes, parameters: Sequence[nn.Parameter], losses: Mapping[str, float]
) -> dict[str, float]:
    """Sum gradients over all processes, in place, and losses; gradients of what is shared out are sums already.

    A parameter that has a gradient in no process still has none then, which AdamW leaves where it is.
    """
    if processes.count == 1:
        return dict(losses)
    own = [each for each in parameters if not isinstance(each, DTensor)]
    there = [float(each.grad is not None) for each in own]
    sums = torch.tensor([*losses.values(), *there], dtype=torch.float64)
    processes.add([sums])
    for each, some in zip(own, sums[len(losses) :].tolist(), strict=True):
        if some and each.grad is None:
            each.grad = torch.zeros_like(each)
    processes.add([each.grad for each in own if each.grad is not None])
    return dict(zip(losses, sums.tolist(), strict=False))
