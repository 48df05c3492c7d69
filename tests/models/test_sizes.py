"""Sizes and FLOPs from a skeleton."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import KeepChannels, KeepExperts
from moe_compress.models import hf
from moe_compress.models.sizes import sizes
from support import tiny


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe", "olmoe", "gpt_oss", "glm4_moe"]
)
def test_flops_agree_with_torchs_counter(family):
    model = tiny.make(family)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny.token_ids(1, length), use_cache=False)
    counted = sizes(model, length, torch.float32).flops_per_token * length
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_sizes_from_a_skeleton(family, family_checkpoint):
    checkpoint = family_checkpoint(family)
    counted = sizes(hf.skeleton(checkpoint.config, torch.float32), 16, torch.float32)
    assert counted.bytes == checkpoint.bytes
    assert counted.touched < counted.parameters


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_experts_of_different_widths_count_as_their_mean(family):
    layer, kept = tiny.LAYERS - 1, torch.arange(16, dtype=torch.int32).expand(tiny.EXPERTS, -1)
    found = {}
    for what, widths in (("whole", None), ("half", None), ("uneven", (8, 16) * (tiny.EXPERTS // 2))):
        model = tiny.make(family)
        width = 8 if what == "half" else 16
        edits = [KeepChannels(layer, width, widths, arrays={"channels": kept[:, :width]})]
        apply_edits(model, edits)
        found[what] = sizes(model, 16, torch.float32)
    for size in ("parameters", "touched", "flops_per_token"):
        whole, half, uneven = (getattr(found[what], size) for what in ("whole", "half", "uneven"))
        assert 2 * uneven == pytest.approx(whole + half, abs=2 * tiny.EXPERTS), size
        assert half < uneven < whole


def test_dropping_experts_leaves_flops_alone():
    model = tiny.make("mixtral")
    before = sizes(model, 16, torch.float32)
    apply_edits(model, [KeepExperts(layer, (0, 2, 5)) for layer in range(tiny.LAYERS)])
    after = sizes(model, 16, torch.float32)
    assert after.parameters < before.parameters
    assert after.flops_per_token == pytest.approx(before.flops_per_token, rel=0.02)
