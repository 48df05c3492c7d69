"""Edited models are ordinary models: streamed, saved, copied, trained, and to every kernel."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_compress.calibration.artefact import observers_for
from moe_compress.checkpoints.load import load_model
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from support import tiny
from support.edit_kinds import KINDS, REFUSED, edits_of
from support.editing import IDS, cut, logits_of
from support.slow import each_once, slow_after, slow_unless
from support.stock_process import generated
from support.tiny import CPU, windows_of

WRITTEN = ("mixtral", "deepseek_v3", "gpt_oss", "minimax", "jamba")
once = each_once(WRITTEN, KINDS)


@pytest.mark.parametrize(("family", "kind"), slow_unless(once, WRITTEN, KINDS))
def test_the_engine_runs_edited_checkpoints_exactly(family, kind, written):
    """With everything watched that a calibration records."""
    if (family, kind) in REFUSED:
        pytest.skip("refused")
    checkpoint, windows = written(family, kind), windows_of(IDS)
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    _, hidden = forward_layers(layers, windows, observers_for(checkpoint, layers, windows, output_samples=False))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view(*IDS.shape, -1)
    assert torch.equal(logits, logits_of(load_model(checkpoint.folder, torch.float32)))


@pytest.mark.parametrize("family", slow_after(2, ["mixtral", "jamba"]))
@pytest.mark.parametrize("kind", ["mixed", "novices", "skip moe"])
def test_an_edited_model_is_an_ordinary_model(family, kind, written, tmp_path):
    """Saved by transformers, copied, generating with a static cache, trained."""
    model = load_model(written(family, kind).folder, torch.float32)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load_model(tmp_path / "saved", torch.float32)), expected)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    words = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(model.generate(tiny.token_ids(2, 18), **words), generated(model))
    model.train().requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    for view in moe_views(model).values():
        assert all(parameter.grad.isfinite().all() for parameter in view.experts.parameters())


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "moe_compress"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_nobody_is_nobody_to_every_kernel(family, kernel, sources, request):
    if kernel == "eager" and family in ("gpt_oss", "nemotron_h"):
        reason = "the eager experts of this family take the id that means nobody for an expert's"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason, raises=(IndexError, RuntimeError)))
    source = sources(family)
    for kind in ("skip experts", "novices", "merge sum"):
        model = cut(source, edits_of(kind, source))
        expected = logits_of(model)
        model.set_experts_implementation(kernel)
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
