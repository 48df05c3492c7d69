"""Perplexity, KL, intervals, sizes: against stock transformers and against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import tiny
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import KeepChannels, KeepExperts
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.evaluation import statistics
from moe_compress.evaluation.quality import perplexity
from moe_compress.evaluation.quality.perplexity import Measurement
from moe_compress.models import hf
from moe_compress.models.sizes import sizes
from test_identity import CPU, windows_of


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
    assert torch.equal(resident.nll, found.nll)


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
    monkeypatch.setattr(perplexity, "LOGITS_PER_CHUNK", 5 * tiny.VOCAB)
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


def measurement(nll: list[float], tokens: list[float]) -> Measurement:
    zeros = torch.zeros(len(nll), dtype=torch.long)
    return Measurement(torch.tensor(nll).double(), torch.tensor(tokens).double(), zeros, ("text",))


def test_paired_interval_is_narrower_than_the_unpaired_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 120).astype(float)
    difficulty = rng.normal(3, 0.8, 120)
    base = measurement((difficulty * tokens).tolist(), tokens.tolist())
    worse = measurement(((difficulty + rng.normal(0.05, 0.02, 120)) * tokens).tolist(), tokens.tolist())
    found = statistics.metrics(worse, base)
    low, high = found["delta_nll"]["interval"]
    assert low < 0.05 < high and high - low < 0.02
    perplexity_low, perplexity_high = found["perplexity"]["interval"]
    assert math.log(perplexity_high / perplexity_low) > 5 * (high - low)


def test_one_document_has_no_interval():
    assert statistics.metrics(measurement([30.0], [10.0]), None)["perplexity"]["interval"] is None


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


@pytest.mark.parametrize("documents", [20, 60])
def test_intervals_cover_what_they_are_of(documents):
    """Many texts drawn from one source whose numbers are known: losses, changes, KL and agreement by document."""
    rng = np.random.default_rng(4)
    truth = {"delta_nll": 0.02, "kl": 0.1, "top1_agreement": 0.8, "nll": 2.02}
    held = dict.fromkeys(truth, 0)
    for _ in range(120):
        tokens = rng.integers(80, 121, documents).astype(float)
        level = rng.normal(2.0, 0.5, documents)
        sums = {
            "before": level * tokens,
            "nll": (level + rng.normal(0.02, 0.03, documents)) * tokens,
            "kl": rng.gamma(4, 0.1 / 4, documents) * tokens,
            "agree": rng.binomial(tokens.astype(int), 0.8).astype(float),
        }
        made = {name: torch.from_numpy(values) for name, values in sums.items()}
        domain = torch.zeros(documents, dtype=torch.long)
        counts = torch.from_numpy(tokens)
        first = Measurement(made["before"], counts, domain, ("all",), None, None)
        second = Measurement(made["nll"], counts, domain, ("all",), made["kl"], made["agree"])
        found = statistics.metrics(second, first)
        for name, value in truth.items():
            low, high = found[name]["interval"]
            held[name] += low <= value <= high
    assert all(0.87 <= count / 120 <= 0.995 for count in held.values()), held


def test_domains_have_changes_of_their_own_and_answers_flip():
    sums = {"tokens": torch.tensor([10.0, 10, 20, 20]), "domain": torch.tensor([0, 0, 1, 1])}
    right = torch.tensor([True, True, False, False, True])
    first = Measurement(torch.tensor([1.0, 2, 3, 4]), **sums, domains=("a", "b"), kl=None, agree=None, correct=right)
    right = torch.tensor([True, False, True, False, False])
    second = Measurement(torch.tensor([2.0, 3, 5, 6]), **sums, domains=("a", "b"), kl=None, agree=None, correct=right)
    found = statistics.metrics(second, first)
    assert found["delta_nll_a"]["value"] == pytest.approx(2 / 20) and found["delta_nll_b"]["value"] == pytest.approx(
        0.1
    )
    assert found["delta_nll"]["value"] == pytest.approx(6 / 60)
    assert found["task_flips"]["value"] == 0.6 and found["delta_task_accuracy"]["value"] == pytest.approx(-0.2)
