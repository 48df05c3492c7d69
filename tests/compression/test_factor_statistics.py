"""What factors save, in the words of compression_statistics.yaml: the founding document's example, and packed ones."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import MixtralConfig

from moe_compress.checkpoints.folder import STATISTICS
from moe_compress.compression.factor_statistics import factor_statistics
from moe_compress.compression.weights.factored_layer import factor_layer
from moe_compress.edits.factors import Form
from moe_compress.models import hf
from moe_compress.models.sublayers import block_names
from support.pruned import stored
from support.slow import slow_after


def mixtral(form: Form, layers: int = 1) -> object:
    """A skeleton with 8 experts of 4096 x 14336, of which a token uses two, all in factors."""
    config = MixtralConfig(num_hidden_layers=layers, vocab_size=64, architectures=["MixtralForCausalLM"])
    assert (config.hidden_size, config.intermediate_size) == (4096, 14336)
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    model = hf.skeleton(config, torch.bfloat16)
    for layer in hf.decoder_layers(model):
        factor_layer(layer, block_names(model), dict.fromkeys(("gate", "up", "down"), form))
    return model


@pytest.mark.parametrize("layers", [1, 2])
def test_the_document_s_example(layers):
    """Wrappers of rank 64 around one core, which is that core and rank 128: a token that uses two experts multiplies
    4% more than before where the core runs in each of them, and 46% less where it runs once.
    """
    found = factor_statistics(mixtral(Form(rank=128, core=True), layers), 2)
    whole, core, each = 8 * 4096 * 14336, 4096 * 14336, 128 * (4096 + 14336)
    assert found["total_params_original"] == 3 * layers * whole
    assert found["total_params_compressed"] == 3 * layers * (core + 8 * each)
    assert found["active_params_original"] == 3 * layers * 2 * core
    assert found["active_params_compressed"] == 3 * layers * (core + 2 * each)
    for counts in (found, found["layers"][0], *found["layers"][0]["projections"].values()):
        assert counts["total_compression_ratio"] == 0.16518 and counts["total_reduction_percent"] == 83.482
        assert counts["active_compression_ratio"] == 0.54018 and counts["active_change_percent"] == -45.982
        assert counts["executed_ratio_shared_per_expert"] == 1.04018
        assert counts["executed_ratio_shared_once"] == 0.54018
    assert found["total_memory_original_gb"] == pytest.approx(2 * 3 * layers * whole / 1e9, abs=1e-9)
    assert found["memory_saved_gb"] == pytest.approx(2 * 3 * layers * (whole - core - 8 * each) / 1e9, abs=1e-9)


@pytest.mark.parametrize(
    ("form", "total", "active", "per_expert", "once"),
    [
        (Form(rank=1024), 0.32143, 0.32143, 0.32143, 0.32143),  # 1024 / 4096 + 1024 / 14336
        # A basis of 1024 x 4096 for all, 14336 x 1024 of each.
        (Form(basis=1024), 0.25893, 0.28571, 0.32143, 0.28571),
        # Two bases of that size, which a token multiplies as they are: no more than its experts.
        (Form(bases=(2, 1024)), 0.26786, 0.32143, 0.39286, 0.32143),
    ],
)
def test_what_is_shared_is_used_whole(form, total, active, per_expert, once):
    """Of up projections; the others stay whole."""
    config = MixtralConfig(num_hidden_layers=1, vocab_size=64, architectures=["MixtralForCausalLM"])
    model = hf.skeleton(config, torch.bfloat16)
    factor_layer(hf.decoder_layers(model)[0], block_names(model), {"up": form})
    found = factor_statistics(model, 2)["layers"][0]["projections"]
    counts = ("total_compression_ratio", "active_compression_ratio")
    runs = ("executed_ratio_shared_per_expert", "executed_ratio_shared_once")
    assert [found["up"][name] for name in (*counts, *runs)] == [total, active, per_expert, once]
    assert found["gate"]["total_compression_ratio"] == found["gate"]["executed_ratio_shared_per_expert"] == 1


@pytest.mark.parametrize("bits", slow_after(1, [4, 8]))
def test_packed_factors_count_as_numbers_and_take_less(bits, made):
    words = f"quantize method=rtn bits={bits} group_size=8 clip=max format=packed"
    folder = made("mixtral", f"factorise structure=base_delta rank=8 + {words}")
    found = yaml.safe_load((folder / STATISTICS).read_text())
    whole = yaml.safe_load((made("mixtral", "factorise structure=base_delta rank=8") / STATISTICS).read_text())
    for name in ("total_params_compressed", "active_params_compressed", "executed_ratio_shared_once"):
        assert found[name] == whole[name]
    held = [t for name, t in stored(folder).items() if ".separate." in name or ".shared_parts." in name]
    assert found["total_memory_compressed_gb"] == round(sum(t.numel() * t.element_size() for t in held) / 1e9, 9)
    assert found["total_memory_compressed_gb"] < whole["total_memory_compressed_gb"]


def test_nothing_is_said_of_models_without_factors(made):
    assert not (made("mixtral", "prune") / STATISTICS).exists()
