"""`factorise` before and behind other stages: what comes out loads, generates, verifies and is exported."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.verification.verify import verification
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from support import tiny
from support.editing import greedy, logits_of
from support.factorised import STRUCTURES
from support.pruned import report
from support.slow import slow_after, slow_families

DROPPED = "expert_drop ratio=0.25 + factorise structure=base_delta"
NARROWED = "channels ratio=0.25 + factorise structure=svd"
ROUNDED = "factorise structure={} rank=8 + quantize method=rtn bits=4 group_size=8 clip=max format=packed"
LATER = "factorise structure=shared_basis + expert_drop ratio=0.25"
MERGED = "expert_merge ratio=0.25 + factorise structure=base_delta"
PRUNED = "prune sparsity=0.5 + factorise structure=sparse_low_rank"


def sound(folder) -> None:
    """It loads as transformers loads it and as we do, generates with a cache what it generates without, verifies."""
    model, ours = load_model(folder, torch.float32), moe_compress.load(folder, torch.float32)
    torch.testing.assert_close(logits_of(ours), logits_of(model), rtol=1e-3, atol=2e-4)
    ids = tiny.token_ids(2, 10)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=True)
    assert torch.equal(made, greedy(model, ids, 5))
    found = verification(open_checkpoint(folder))
    assert found.passed, found.problems


@pytest.mark.parametrize(
    ("sentence", "experts", "width"),
    slow_after(
        1,
        [
            (DROPPED, 6, tiny.INNER),
            (LATER, 6, tiny.INNER),
            (NARROWED, 8, 16),
            (MERGED, 6, tiny.INNER),
            (PRUNED, 8, tiny.INNER),
        ],
    ),
)
def test_other_stages_before_and_behind(sentence, experts, width, made):
    folder = made("mixtral", sentence)
    views = moe_views(moe_compress.load(folder, torch.float32))
    for view in views.values():
        assert view.factored and view.num_experts == experts and view.widths == [width] * experts
    sound(folder)


@pytest.mark.parametrize("family", slow_families(("deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "jamba"), 0))
@pytest.mark.parametrize("sentence", [DROPPED, NARROWED, LATER])
def test_other_stages_in_other_families(sentence, family, made):
    sound(made(family, sentence))


@pytest.mark.parametrize("structure", slow_after(1, ["base_delta", "svd", "shared_basis", "basis_mixture", "wrapper"]))
def test_factors_are_rounded(structure, made):
    """To four bits a number, biases, residues and mixtures apart."""
    folder, whole = (
        made("mixtral", ROUNDED.format(structure)),
        made("mixtral", f"factorise structure={structure} rank=8"),
    )
    found, before = (moe_views(moe_compress.load(each, torch.float32)) for each in (folder, whole))
    for index, view in found.items():
        held = [module for module in view.experts.modules() if isinstance(module, PackedMatrix)]
        assert held and view.factored
        for part, stack in view.stacks().items():
            error = (stack - before[index].stacks()[part]).norm() / before[index].stacks()[part].norm()
            assert 0 < error < 0.3
    assert open_checkpoint(folder).bytes < open_checkpoint(whole).bytes
    sound(folder)


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 1))
@pytest.mark.parametrize("structure", slow_after(1, ["auto", *STRUCTURES]))
def test_an_export_computes_the_same_in_whole_matrices(structure, family, made, tmp_path):
    folder = made(family, f"factorise structure={structure}")
    plain = open_checkpoint(moe_compress.export(folder, tmp_path / "plain"))
    assert "moe_compress" not in plain.values and not list(plain.folder.glob("*.py"))
    model, stock = load_model(folder, torch.float32), load_model(plain.folder, torch.float32)
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-3, atol=2e-4)


def test_an_export_behind_other_stages(made, tmp_path):
    folder = made("mixtral", DROPPED)
    plain = open_checkpoint(moe_compress.export(folder, tmp_path / "plain"))
    assert plain.values["num_local_experts"] == 6 and "moe_compress" not in plain.values
    model, stock = load_model(folder, torch.float32), load_model(plain.folder, torch.float32)
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", slow_after(1, ["bfloat16", "float16"]))
def test_narrower_arithmetic_finds_about_the_same(dtype, lab, made, tmp_path):
    words = {**lab("mixtral"), "dtype": dtype, "out": str(tmp_path / "out")}
    folder = moe_compress.compress("factorise structure=svd", **words).folder
    found = report(folder)
    assert found["whitened"] == pytest.approx(report(made("mixtral", "factorise structure=svd"))["whitened"], rel=0.1)
    assert logits_of(moe_compress.load(folder, torch.float32)).isfinite().all()
