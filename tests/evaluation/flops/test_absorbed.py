"""Latent attention as engines run it: what a naive absorbed step multiplies, as torch counts it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_compress.evaluation.flops.report import flops
from moe_compress.models.component_map import attentions_of
from moe_compress.models.components import absorbed_decode, components
from support import readers, tiny

CONTEXT, BATCH = 24, 2


def absorbed_step(attention: torch.nn.Module, heads: int) -> int:
    """FLOPs of one token of each sequence: queries into the latent space, scores, values, and back out of it."""
    latent, rope = attention.kv_b_proj.in_features, attention.qk_rope_head_dim
    nope, value = attention.qk_nope_head_dim, attention.v_head_dim
    query, turned = torch.zeros(heads, BATCH, nope), torch.zeros(BATCH, heads, rope)
    up_k, up_v = torch.zeros(heads, nope, latent), torch.zeros(heads, latent, value)
    cached, keys = torch.zeros(BATCH, CONTEXT, latent), torch.zeros(BATCH, CONTEXT, rope)
    with FlopCounterMode(display=False) as counter:
        inside = (query @ up_k).transpose(0, 1)
        weights = torch.bmm(inside, cached.transpose(1, 2)) + torch.bmm(turned, keys.transpose(1, 2))
        torch.bmm(weights, cached).transpose(0, 1) @ up_v
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_an_absorbed_step_is_what_engines_multiply(family):
    model = tiny.make(family)
    decode = sum(each.decode for each in components(model, CONTEXT, CONTEXT, BATCH, torch.float32))
    expanded = sum(each.pair * CONTEXT + 2 * each.expansion * CONTEXT for each in attentions_of(model))
    steps = [absorbed_step(layer.self_attn, model.config.num_attention_heads) for layer in model.model.layers]
    assert absorbed_decode(model, decode, CONTEXT, BATCH) == decode - BATCH * expanded + sum(steps)


def test_the_report_says_it_of_latent_attention_alone(tmp_path):
    for family, said in (("deepseek_v3", True), ("mixtral", False)):
        report = flops(readers.save_model(family, tmp_path / family), results=str(tmp_path))
        assert ("(absorbed)" in report.markdown()) == said == (report.absorbed_decode is not None)
