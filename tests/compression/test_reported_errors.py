"""What a plan reports of its errors and shares is what the model shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import SetTopK
from moe_compress.edits.plan_file import read_plan
from moe_compress.models.moe import moe_views
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import make_options
from support import tiny
from support.editing import cut, logits_of, original
from support.slow import each_once, slow_after, slow_unless
from support.trimming import batched

Options = dict[str, object]

EIGHT = tiny.EXPERTS


def routed_outputs(model: Any, windows: Tensor) -> dict[int, Tensor]:
    """Layer -> what its routed experts return on all windows."""
    found: dict[int, Tensor] = {}
    handles = []
    for layer, view in moe_views(model).items():

        def keep(_module: nn.Module, _args: Any, output: Tensor, layer: int = layer) -> None:
            found[layer] = output.detach().double()

        handles.append(view.experts.register_forward_hook(keep))
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return found


def calibration_ids(options: Options) -> Tensor:
    run = Run(make_options(options).resolved(), RunLog(None))
    windows = run.windows("calibration", open_checkpoint(Path(str(options["model"]))))
    assert bool(windows.mask_NS.all())
    return windows.ids_NS


MODELS, PROPAGATE = ("mixtral", "deepseek_v3", "gpt_oss"), ("original", "compressed")


@pytest.mark.parametrize(
    ("family", "propagate"),
    slow_unless(each_once(MODELS, PROPAGATE), MODELS, PROPAGATE),
)
def test_reconstruction_errors_are_those_of_the_model(family, propagate, lab, made):
    """compressed: what is left of a layer behind all earlier cuts, against the original on the original stream."""
    folder = made(family, f"expert_drop score=naee keep=4 propagate={propagate}")
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    target = routed_outputs(original(source), ids)
    for number, edit in enumerate(stage.plan.edits):
        edits = stage.plan.edits[: number + 1] if propagate == "compressed" else [edit]
        rebuilt = routed_outputs(cut(source, edits), ids)[edit.layer]
        error = float((rebuilt - target[edit.layer]).norm() / target[edit.layer].norm())
        reported = stage.plan.report["reconstruction"][str(edit.layer)]
        assert reported["relative_error"] == pytest.approx(error, rel=1e-3)
        assert reported["tokens_with_unknown_experts"] == 0


@pytest.mark.parametrize("family", slow_after(2, ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"]))
def test_fewer_active_experts_cost_what_they_change(family, lab, made):
    folder = made(family, "top_k mean=1.5" if family.startswith("deepseek") else "top_k mean=1.34")
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    target = routed_outputs(original(source), ids)
    for layer, losses in stage.plan.scores.items():
        changed = routed_outputs(cut(source, [SetTopK(layer, 1)]), ids)[layer]
        expected = float((changed - target[layer]).norm() / target[layer].norm()) ** 2
        assert losses == [pytest.approx(expected, rel=1e-3), pytest.approx(0, abs=1e-6)]
    # The layers that go on with two are those whose change would be largest.
    dropped = {edit.layer for edit in stage.plan.edits}
    least = sorted(stage.plan.scores, key=lambda layer: stage.plan.scores[layer][0])[: len(dropped)]
    assert dropped == set(least)


SKIPPED, SKIPS = ("mixtral", "deepseek_v2", "deepseek_v3"), ("skip", "skip share=0.25", "skip beta=0.6")


@pytest.mark.parametrize(("family", "sentence"), slow_unless(each_once(SKIPPED, SKIPS), SKIPPED, SKIPS))
def test_as_many_experts_are_skipped_as_asked(family, sentence, lab, made):
    """On the calibration text, to the width of a bin: judged on each layer of the original model."""
    folder = made(family, sentence)
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    model = original(source)
    for edit in stage.plan.edits:
        gates: list[Tensor] = []
        view = moe_views(model)[edit.layer]
        handle = view.experts.register_forward_pre_hook(lambda _m, args, gates=gates: gates.append(args[2]))
        logits_of(model, ids)
        handle.remove()
        ratio_T = gates[0].amin(1) / gates[0].amax(1)
        skipped = float((ratio_T < edit.threshold).double().mean())
        if "beta" in sentence:
            assert edit.threshold == 0.6
        else:
            share = 0.25 if "share" in sentence else 0.5
            bins = [float((ratio_T < edit.threshold + step / 256).double().mean()) for step in (-1, 0, 1)]
            assert bins[0] <= share <= bins[2]
        assert edit.active == pytest.approx(2 - skipped, abs=0.02)
        assert edit.renormalise is (family != "deepseek_v2")  # whose gates are a softmax over all experts


@torch.no_grad()
@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "gpt_oss", "nemotron_h"]))
def test_novices_are_mean_outputs_over_the_tokens_routed_to_them(family, lab, made):
    sentence = "expert_drop keep=1 novice=mean" if family == "gpt_oss" else "expert_drop keep=4 novice=mean"
    (stage,), _ = read_plan(made(family, sentence) / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    model = batched(original(source)).double()
    for edit in stage.plan.edits:
        view, seen = moe_views(model)[edit.layer], []
        handle = view.experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args))
        logits_of(model, ids)
        handle.remove()
        ((hidden_TD, index_TK, _),) = seen
        gone = [e for e in range(EIGHT) if e not in edit.experts]
        used = 0.0
        for row, expert in zip(edit.arrays["outputs"], gone, strict=True):
            mine_TD = hidden_TD[(index_TK == expert).any(1)]
            ones = torch.ones(len(mine_TD), 1, dtype=torch.float64)
            mean_D = (
                view.experts(mine_TD, torch.full((len(mine_TD), 1), expert), ones).mean(0) if len(mine_TD) else 0 * row
            )
            torch.testing.assert_close(row.double(), mean_D.double(), rtol=1e-4, atol=1e-5)
            used += len(mine_TD)
        assert edit.active == pytest.approx(2 - used / len(hidden_TD), abs=1e-6)
