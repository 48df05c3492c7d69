"""Students beside their teachers: runs of distillation put together by hand, and the stock models they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.recovery.adapters import trained_of
from moe_compress.compression.recovery.arithmetic import arithmetic_of
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.lineage import Lineage, lineage
from moe_compress.compression.recovery.whole_model import WholeModel
from moe_compress.data.windows import Windows
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.methods import registry
from moe_compress.methods.stage_options import TrainingOptions
from support import naive, readers, tiny
from support.pruned import reference, run_of, same_bits, stored

Options = dict[str, object]
WORDS = torch.randint(3, readers.VOCAB, (3, 10), generator=torch.Generator().manual_seed(3))


def windows_of(ids: Tensor = WORDS, mask: Tensor | None = None, said: Tensor | None = None) -> Windows:
    """Windows of one text, of which perhaps not all tokens count."""
    made = tiny.windows_of(ids, mask)
    return Windows(made.ids_NS, made.mask_NS, made.document_NS, made.domain_N, made.domains, "test", {}, said_NS=said)


def training(
    student: Path,
    options: Options,
    windows: Windows,
    words: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **engine: Any,
) -> DistillationRun:
    """A run of `distill` on a checkpoint of ours, with the model it was made of as its teacher.

    words: those of the method; engine: training options; batch: all windows, unless given.
    """
    run = run_of(options)
    task = registry.find("distill").run(**(words or {}))
    given = TrainingOptions(**{"batch": len(windows), **engine})
    ours = WholeModel(open_checkpoint(student), run, torch.float32, recompute=given.recompute)
    theirs = WholeModel(open_checkpoint(Path(str(options["model"]))), run, dtype)
    edits = [edit for stage in read_plan(student / PLAN)[0] for edit in stage.plan.edits]
    kin: Lineage = lineage(ours.model, theirs.model, edits)
    trained = trained_of(ours.model, task, 0)
    ours.arithmetic = arithmetic_of(ours.model, trained, run.device, dtype)
    return DistillationRun(task, given, ours, theirs, windows, trained, kin, 0)


def gradients(run: DistillationRun) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses of a step, and what it would move everything by."""
    losses, _ = run.step(0)
    parameters = run.optimiser.parameters
    return losses, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def require_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Gradients that differ by less than a share of the largest of all."""
    largest = max(float(each.norm()) for each in expected.values())
    assert found.keys() == expected.keys() and largest > 0
    for name, each in expected.items():
        assert float((found[name].double() - each.double()).norm()) <= tolerance * largest, name


Said = tuple[tuple[Tensor, list[Tensor]], dict[int, Tensor], PreTrainedModel]


def said_by(folder: object, family: str, ids: Tensor, trains: bool = False) -> Said:
    """Stock transformers in float64: logits and what leaves every layer; each router's logits [B, S, E]; the model."""
    model = reference(folder).requires_grad_(trains)
    model.set_experts_implementation("eager")
    found: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        block = getattr(layer, naive.BLOCK.get(family, "mlp"), None)
        if hasattr(block, "experts"):
            router = block.get_submodule(naive.ROUTER.get(family, "gate"))

            def keep(_module: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                logits = output[0] if isinstance(output, tuple) else output
                found[index] = logits.view(*ids.shape, -1)

            hooks.append(router.register_forward_hook(keep))
    states = _states(model, ids)
    for hook in hooks:
        hook.remove()
    return states, found, model


def _states(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what leaves every layer, before the final norm."""
    left: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: left.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, left


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Stored tensors that differ in any bit; both have the same ones."""
    old, new = stored(before), stored(after)
    assert old.keys() == new.keys()
    return {name for name in old if not same_bits(old[name], new[name])}


def reports(folder: Path) -> list[dict[str, Any]]:
    """What every stage reported."""
    found: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["report"]
    return found


def layer_notes(folder: Path, name: str) -> list[tuple[float, float]]:
    """Of each layer, what it was before and after."""
    return [tuple(note[name]) for note in reports(folder)[-1]["layers"].values()]
