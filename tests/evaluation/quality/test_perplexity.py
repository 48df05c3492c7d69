"""Perplexity, KL and agreement: against stock transformers and against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import KeepExperts
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.evaluation.quality import perplexity
from moe_compress.models.hf import layer_calls
from support import tiny
from support.tiny import CPU, windows_of


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "granitemoe"])
def test_perplexity_is_the_stock_loss(family, family_folder, family_checkpoint):
    ids = tiny.token_ids()
    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    layers = StreamedLayers(family_checkpoint(family), CPU, torch.float32)
    found, *_ = perplexity.measure(layers, windows_of(ids))
    assert torch.allclose(found.nll, nll.view(3, -1).sum(1), rtol=1e-5)
    assert found.tokens.tolist() == [11, 11, 11]
    resident, *_ = perplexity.measure(ResidentLayers(model), windows_of(ids))
    assert torch.allclose(resident.nll, found.nll, rtol=1e-6)


def test_padding_predicts_nothing(family_checkpoint):
    ids = tiny.token_ids()
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
    layers = StreamedLayers(family_checkpoint("mixtral"), CPU, torch.float32)
    padded, *_ = perplexity.measure(layers, windows_of(ids, mask))
    alone, *_ = perplexity.measure(layers, windows_of(ids[1:2, :7]))
    assert padded.tokens.tolist() == [11, 6, 2]
    assert math.isclose(float(padded.nll[1]), float(alone.nll[0]), rel_tol=1e-5)


def test_chunks_of_logits_change_nothing(family_checkpoint, monkeypatch):
    layers = StreamedLayers(family_checkpoint("mixtral"), CPU, torch.float32)
    whole, hidden, _ = perplexity.measure(layers, windows_of(tiny.token_ids()))
    monkeypatch.setattr(layer_calls, "LOGITS_PER_CHUNK", 5 * tiny.VOCAB)
    chunked = perplexity.score_hidden(layers.model, hidden, windows_of(tiny.token_ids()))
    assert torch.allclose(chunked.nll, whole.nll, rtol=1e-6)


def test_kl_and_agreement_against_the_original(family_folder, family_checkpoint, tmp_path):
    ids, windows = tiny.token_ids(), windows_of(tiny.token_ids())
    model = AutoModelForCausalLM.from_pretrained(family_folder("mixtral")).eval()
    with torch.no_grad():
        log_q = model(ids).logits[:, :-1].double().log_softmax(-1)
    layers = StreamedLayers(family_checkpoint("mixtral"), CPU, torch.float32)
    first, hidden, _ = perplexity.measure(layers, windows)
    perplexity.save_original(tmp_path / "original.safetensors", first, hidden)
    original = perplexity.load_original(tmp_path / "original.safetensors", layers.model, windows)
    same, *_ = perplexity.measure(layers, windows, original)
    assert same.kl is not None and float(same.kl.abs().max()) < 1e-6
    assert torch.equal(same.agree, same.tokens)
    apply_edits(model, [KeepExperts(1, (0, 1, 2, 5))])
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].double().log_softmax(-1)
    other, *_ = perplexity.measure(ResidentLayers(model), windows, original)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).sum(1)
    assert torch.allclose(other.kl, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(other.agree, (log_q.argmax(-1) == log_p.argmax(-1)).sum(1).double())
