"""expert_drop keeps the best by their scores; an expert without tokens obeys the policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.expert_drop.expert_drop import expert_drop
from moe_compress.methods.score_registry import scores as registered
from moe_compress.models.shape import model_shape
from support import naive, tiny
from support.expert_statistics import CPU, IDS, Sums, measured
from support.tiny import windows_of

TEXT_SCORES = sorted(name for name, score in registered().items() if score.needs == "text")


def observed(checkpoint: Checkpoint, sums: Sums) -> ModelStatistics:
    shape = model_shape(StreamedLayers(checkpoint, CPU, torch.float32).model)
    layers = [LayerStatistics(moe, sums[moe.layer], checkpoint.num_layers, "full") for moe in shape.moe]
    return ModelStatistics(shape=shape, layers=layers)


@pytest.mark.parametrize("score", ["reap", "frequency", "aimer"])
def test_expert_drop_keeps_the_best_of_each_real_layer(score, family_checkpoint):
    """DeepSeek-V2's first layer is dense: layers keep their own numbers."""
    checkpoint = family_checkpoint("deepseek_v2")
    expected = naive.reference(tiny.make("deepseek_v2"), "deepseek_v2", IDS)
    plan = expert_drop(observed(checkpoint, measured(checkpoint, windows_of(IDS))), score=score, keep=5)
    assert [edit.layer for edit in plan.edits] == [1, 2] == sorted(expected)
    for edit in plan.edits:
        values = expected[edit.layer].scores()[score].nan_to_num(-torch.inf)
        assert set(edit.experts) == set(values.topk(5).indices.tolist())


@pytest.fixture(scope="module")
def unreached(tmp_path_factory) -> SimpleNamespace:
    """GPT-OSS whose expert 3 of layer 1 is never chosen: its router bias is out of reach."""
    model = tiny.make("gpt_oss")
    model.model.layers[1].mlp.router.bias.data[3] = -1e4
    folder: Path = tiny.save(model, tmp_path_factory.mktemp("unreached"))
    checkpoint = open_checkpoint(folder)
    ids = tiny.token_ids(rows=16, length=32, seed=3)
    return SimpleNamespace(model=observed(checkpoint, measured(checkpoint, windows_of(ids))))


def test_only_the_unreachable_expert_is_unseen(unreached):
    unseen = {
        layer.shape.layer: (layer.sums["count"] == 0).nonzero().flatten().tolist() for layer in unreached.model.layers
    }
    assert unseen == {0: [], 1: [3], 2: []}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("score", TEXT_SCORES)
def test_an_expert_without_tokens_obeys_the_policy(score, reverse, unreached):
    kept = {}
    for policy in ("drop", "keep"):
        plan = expert_drop(unreached.model, score=score, keep=6, unseen=policy, reverse=reverse)
        kept[policy] = {edit.layer: set(edit.experts) for edit in plan.edits}
        assert plan.report["experts_without_tokens"] == {1: [3]}
        assert all(len(ids) == 6 for ids in kept[policy].values())
        measured_scores = [value for values in plan.scores.values() for value in values if value is not None]
        assert len(measured_scores) >= 23 and torch.tensor(measured_scores).isfinite().all()
    assert 3 not in kept["drop"][1] and 3 in kept["keep"][1]
    assert kept["drop"][0] == kept["keep"][0] and kept["drop"][2] == kept["keep"][2]
    with pytest.raises(ValueError, match=r"layer 1: no calibration token reached experts \[3\]"):
        expert_drop(unreached.model, score=score, keep=6, unseen="error", reverse=reverse)


def test_protecting_an_expert_leaves_the_reported_scores_alone(unreached):
    plain = expert_drop(unreached.model, keep=6)
    spared = expert_drop(unreached.model, keep=6, protect="0:2,1:3")
    assert spared.scores == plain.scores
    kept = {edit.layer: edit.experts for edit in spared.edits}
    assert 2 in kept[0] and 3 in kept[1]
