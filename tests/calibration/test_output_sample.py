"""Samples of outputs hold what the experts really return."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from moe_compress.calibration import output_sample as output_sample_module
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward as fold_module
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.methods.expert_drop.subset_search import subset_losses
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling.edit_layer import keep_experts, skip_experts
from moe_compress.models.moe import moe_views
from support import naive, tiny
from support.blocks import dense
from support.output_samples import CPU, IDS, PADDED, SAMPLE, probed
from support.slow import slow_after, slow_families
from support.tiny import windows_of


@functools.cache
def sampled() -> list[int]:
    """Places, in the flat text, of the tokens that the output sample takes."""
    real = PADDED.reshape(-1).nonzero().flatten().tolist()
    places = [real[n] for n in range(len(real)) if (n + 1) * SAMPLE // len(real) > n * SAMPLE // len(real)]
    assert len(places) == SAMPLE and len(real) == 32
    return places


def naive_output_sample(family: str) -> dict[int, dict[str, Tensor]]:
    """Layer -> what an output sample should hold, from the stock model in float64 and its experts one at a time."""
    model = tiny.make(family).double()
    model.set_experts_implementation("eager")
    config, found = model.config, {}
    with torch.no_grad():
        captured = naive._captured(model, family, IDS, PADDED)
    for index, seen in captured.items():
        block = getattr(naive.layers_of(model)[index], naive.BLOCK.get(family, "mlp"))
        router = block.get_submodule(naive.ROUTER.get(family, "gate"))
        named = [*block.named_buffers(), *block.named_parameters()]
        bias = sum(b.reshape(-1) for n, b in named if n.endswith(("e_score_correction_bias", "expert_bias")))
        experts = [naive.expert(family, config, block.experts, e) for e in range(tiny.EXPERTS)]
        logits, gates, outputs, targets = [], [], [], []
        with torch.no_grad():
            for place in sampled():
                x = seen["entering"][place].double()
                logits.append(router.weight @ x + (router.bias if family == "gpt_oss" else 0))
                routing = naive.ROUTE[family](config, logits[-1], bias)
                gates.append(torch.zeros(tiny.EXPERTS, dtype=torch.float64))
                for e, gate in zip(routing.ids, routing.gates, strict=True):
                    gates[-1][e] = gate
                outputs.append(torch.stack([one.run(x) for one in experts]))
                targets.append(seen["routed"][place].double())
        found[index] = {"logits": torch.stack(logits), "gates": torch.stack(gates)}
        found[index] |= {"outputs": torch.stack(outputs), "targets": torch.stack(targets)}
    return found


def close(got: Tensor, expected: Tensor) -> None:
    """fp32 against float64, all layers before included: relative to the size of the whole."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", slow_families([name for name in tiny.EDITABLE if name in naive.ROUTE], 5))
def test_an_output_sample_holds_what_the_stock_model_computes(family, family_checkpoint):
    output_samples, expected = probed(family_checkpoint(family)), naive_output_sample(family)
    assert output_samples.keys() == expected.keys()
    for index, sample in output_samples.items():
        logits, gates, outputs, targets = expected[index].values()
        close(sample.logits_TE, logits[:, : tiny.EXPERTS])
        close(dense(sample.index_TK, sample.gate_TK, tiny.EXPERTS), gates)
        assert torch.equal(sample.component_T, torch.tensor(sampled()) // 12)
        assert torch.equal(sample.ids_TM.sort(1).values, torch.arange(tiny.EXPERTS).expand(SAMPLE, -1))
        for t in range(SAMPLE):
            rows = torch.cat([outputs[t][sample.ids_TM[t]], targets[t][None]])
            close(sample.gram_TNN[t], rows @ rows.T)
        close(sample.mean_ED, outputs.mean(0))
        cosine_EE = torch.zeros(tiny.EXPERTS, tiny.EXPERTS, dtype=torch.float64)
        for t, i, j in itertools.product(range(SAMPLE), range(tiny.EXPERTS), range(tiny.EXPERTS)):
            a, b = outputs[t, i], outputs[t, j]
            cosine_EE[i, j] += (a @ b / (a.norm() * b.norm())) / SAMPLE
        close(sample.cosine_EE, cosine_EE)
        assert sample.inner_EFS.shape == (tiny.EXPERTS, tiny.INNER, SAMPLE)
        assert (sample.routing is None) == (family in ("phimoe", "llama4_text", "deepseek_v4", "inkling_text"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"])
def test_inner_activations_give_the_outputs(family, family_checkpoint):
    """Down projection and bias, by hand, of what the output sample calls its inputs: their mean is the mean output."""
    model = tiny.make(family)
    for index, sample in probed(family_checkpoint(family)).items():
        experts = getattr(model.model.layers[index], naive.BLOCK.get(family, "mlp")).experts
        down = experts.down_proj.detach()
        down = down.transpose(1, 2) if family in ("gpt_oss", "llama4_text") else down
        mean_ED = torch.stack([down[e] @ sample.inner_EFS[e] for e in range(tiny.EXPERTS)]).mean(2)
        close(sample.mean_ED, mean_ED + experts.down_proj_bias.detach() if family == "gpt_oss" else mean_ED)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2", "phimoe"])
def test_each_token_ranks_its_experts_by_selection_score(family, family_checkpoint):
    bias = {"deepseek_v3": "mlp.gate.e_score_correction_bias", "minimax_m2": "mlp.e_score_correction_bias"}
    model = tiny.make(family)
    for index, sample in probed(family_checkpoint(family)).items():
        score_TE = sample.logits_TE
        if family in bias:
            score_TE = score_TE.sigmoid() + dict(model.model.layers[index].named_buffers())[bias[family]]
        for t in range(SAMPLE):
            used = set(sample.index_TK[t].tolist())
            expected = sorted(range(tiny.EXPERTS), key=lambda e: (e not in used, -float(score_TE[t, e])))
            assert sample.ids_TM[t].tolist() == expected


def test_only_the_best_are_ranked_of_many_experts(tmp_path):
    model = tiny.make("qwen3_moe", num_experts=40, num_experts_per_tok=5)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path))
    for sample in probed(checkpoint).values():
        assert sample.ids_TM.shape == (SAMPLE, 20) and sample.gram_TNN.shape == (SAMPLE, 21, 21)
        assert torch.equal(sample.ids_TM, sample.logits_TE.argsort(1, descending=True)[:, :20])
        assert torch.equal(sample.ids_TM[:, :5].sort(1).values, sample.index_TK.sort(1).values)


def assert_same(a: dict[int, OutputSample], b: dict[int, OutputSample]) -> None:
    assert a.keys() == b.keys()
    for layer, one in a.items():
        for name, tensor in one.tensors().items():
            other = b[layer].tensors()[name]
            if tensor.is_floating_point():
                close(tensor, other)
            else:
                assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    "family", slow_after(3, ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "jamba"])
)
def test_an_output_sample_does_not_depend_on_batches_or_chunks(family, family_checkpoint, monkeypatch):
    whole = probed(family_checkpoint(family))
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12)
    alone = probed(family_checkpoint(family))
    assert_same(alone, whole)
    monkeypatch.setattr(output_sample_module, "CHUNK", 3 * tiny.EXPERTS * 2 * tiny.INNER)
    assert_same(probed(family_checkpoint(family)), whole)


def test_only_the_first_inner_activations_are_kept(family_checkpoint, monkeypatch):
    whole = probed(family_checkpoint("mixtral"))
    monkeypatch.setattr(output_sample_module, "INNER_TOKENS", 8)
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12)
    for index, sample in probed(family_checkpoint("mixtral")).items():
        close(sample.inner_EFS, whole[index].inner_EFS[:, :, :8])


def test_a_sample_of_all_takes_every_real_token(family_checkpoint):
    for sample in probed(family_checkpoint("mixtral"), sample=4096).values():
        assert len(sample.logits_TE) == int(PADDED.sum())


def test_an_output_sample_survives_being_saved(family_checkpoint):
    sample = probed(family_checkpoint("deepseek_v3"))[1]
    again = OutputSample.from_tensors(load(save(sample.tensors())))
    assert_same({1: again}, {1: sample})
    assert again.routing is not None and again.routing.groups == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "lfm2_moe", "minimax_m2", "deepseek_v3", "olmoe"])
def test_rules_are_found_in_half_precision(family, dtype, family_checkpoint):
    checkpoint = family_checkpoint(family)
    observer = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()))
    seen, _ = forward_layers(StreamedLayers(checkpoint, CPU, dtype), windows_of(IDS, PADDED), [observer])
    for parts in seen:
        assert not parts[0] or OutputSample.from_tensors(parts[0]).routing is not None


def test_another_target_can_be_set(family_checkpoint):
    checkpoint = family_checkpoint("deepseek_v3")
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    first = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()), SAMPLE)
    plain = [parts[0] for parts in forward_layers(layers, windows_of(IDS, PADDED), [first])[0]]
    assert plain[0] == {} and first.routed.shape == (SAMPLE, tiny.HIDDEN)
    last = OutputSample.from_tensors(plain[2])
    close(first.routed.square().sum(1), last.gram_TNN[:, -1, -1])
    wanted = torch.randn(SAMPLE, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    second = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()), SAMPLE)
    second.targets = wanted
    other = OutputSample.from_tensors(forward_layers(layers, windows_of(IDS, PADDED), [second])[0][2][0])
    close(other.gram_TNN[:, :-1, :-1], last.gram_TNN[:, :-1, :-1])
    close(other.gram_TNN[:, -1, -1], wanted.square().sum(1))
    close(second.routed, first.routed)
    everything = float(subset_losses(other, [range(tiny.EXPERTS)])[0])
    assert everything == pytest.approx(float((wanted - first.routed).norm() / wanted.norm()), rel=1e-5)


def test_tokens_that_no_expert_reports_are_noticed(family_checkpoint, monkeypatch):
    monkeypatch.setattr(fold_module.hf, "use_experts_function", lambda model: None)
    with pytest.raises(AssertionError, match="layer 0: 0 tokens were heard of, not 20"):
        probed(family_checkpoint("mixtral"))


def observed(model: Any, *others: Any) -> list[list[dict[str, Tensor]]]:
    """What an output sample and other observers see of a model in memory."""
    observer = OutputSampler(family_of(model.config), model.config, int(PADDED.sum()), SAMPLE)
    return forward_layers(ResidentLayers(model), windows_of(IDS, PADDED), [observer, *others])[0]


@pytest.mark.parametrize("family", ["deepseek_v2", "llama4_text"])
def test_an_output_sample_and_sums_are_taken_in_one_pass(family):
    model = tiny.make(family)
    sums = ExpertStatistics(family_of(model.config), model.config, 4)
    alone = forward_layers(ResidentLayers(model), windows_of(IDS, PADDED), [sums])[0]
    for (sample,), (same, table), (expected,) in zip(observed(model), observed(model, sums), alone, strict=True):
        for parts, other in ((sample, same), (table, expected)):
            assert parts.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in parts.items())


def test_skipped_experts_have_no_gate_and_leave_no_rule():
    model = tiny.make("qwen3_moe")
    view = moe_views(model)[1]
    skip_experts(hf.decoder_layers(model)[1], view.names, threshold=0.8, renormalise=False)
    parts = [OutputSample.from_tensors(layer[0]) for layer in observed(model)]
    assert parts[0].routing is not None and parts[1].routing is None
    used_T = (parts[1].gate_TK > 0).sum(1)
    assert set(used_T.tolist()) == {1, 2}
    for t in range(SAMPLE):
        assert set(parts[1].ids_TM[t, : int(used_T[t])].tolist()) == set(
            parts[1].index_TK[t][parts[1].gate_TK[t] > 0].tolist()
        )
        places = [parts[1].ids_TM[t].tolist().index(e) for e in parts[1].index_TK[t].tolist()]
        gate_K, gram_NN = parts[1].gate_TK[t], parts[1].gram_TNN[t]
        close(gate_K @ gram_NN[places][:, places] @ gate_K, gram_NN[-1, -1])


def test_a_layer_whose_router_leads_elsewhere_is_refused():
    model = tiny.make("mixtral")
    keep_experts(hf.decoder_layers(model)[1], moe_views(model)[1].names, experts=range(6), novices=True)
    with pytest.raises(ValueError, match="layer 1: its router leads several ways"):
        observed(model)
