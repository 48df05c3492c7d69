"""Quantization-aware distillation: gradients of scales and codes, what stays as it was, and what it takes in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.recovery import stage as recovery_stage
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.trained_codes import (
    TrainedMatrix,
    away_from_zero,
    packed_again,
    pruned_kinds,
    release,
)
from moe_compress.models.modeling.packed_linear import PackedMatrix
from support import naive_recovery, quantized
from support.pruned import same_bits, stored
from support.recovered import changed_tensors, reports

GROUP, INPUTS, OUTPUTS, BITS = 4, 8, 6, 4
BOTH, SCALES = frozenset({"scales", "codes"}), frozenset({"scales"})
QUANTIZED = "quantize method=rtn clip=max group_size=8 bits=4 format="
PACKED = f"{QUANTIZED}packed"
FORMATS = [f"{QUANTIZED}{name}" for name in ("packed", "compressed-tensors", "gptq")]
STEPS = "steps=3 batch=4 lr=0.05"


def matrix_of() -> PackedMatrix:
    codes_OI = torch.randint(-8, 8, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    codes_OI[0] = torch.tensor([7, -8, 3, 0, 0, 1, 2, 5])
    scale_OG = 0.1 + quantized.random(OUTPUTS, INPUTS // GROUP, seed=2).abs()
    return PackedMatrix.of(codes_OI, scale_OG, BITS, quantized.random(OUTPUTS, seed=3))


def trained_matrix(*, with_codes: bool) -> TrainedMatrix:
    """One whose scales and latents ask for gradients; some latents are out of range, some between codes."""
    found = TrainedMatrix(matrix_of(), with_codes=with_codes)
    found.scales.requires_grad_()
    if found.latent is not None:
        found.latent.requires_grad_()
        found.latent.data += 0.4 * quantized.random(OUTPUTS, INPUTS, seed=4)
        found.latent.data[0, :2] *= 3
    return found


def brought_back(matrix: nn.Module) -> tuple[Tensor, Tensor]:
    """Rows that went through, and the gradient at what came out; gradients are left at the parameters."""
    x_RI, gradient_RO = quantized.random(5, INPUTS, seed=5), quantized.random(5, OUTPUTS, seed=6)
    matrix(x_RI).backward(gradient_RO)
    return x_RI, gradient_RO


@pytest.mark.parametrize("with_codes", [False, True])
def test_gradients_are_those_of_a_loop(with_codes):
    """Of scales: what a group's codes are worth; of what is behind a code: the weight's, where it is in range."""
    matrix = trained_matrix(with_codes=with_codes)
    x_RI, gradient_RO = brought_back(matrix)
    behind = None if matrix.latent is None else matrix.latent.detach()
    scale, latent = naive_recovery.coded_gradients(
        x_RI, gradient_RO, matrix.codes, matrix.scales.detach(), behind, BITS
    )
    torch.testing.assert_close(matrix.scales.grad.double(), scale, rtol=1e-5, atol=1e-5)
    assert matrix.bias.grad is None and torch.equal(matrix.bias, matrix_of().bias)
    if with_codes:
        assert bool((latent == 0).any()) and bool((latent != 0).any())
        torch.testing.assert_close(matrix.latent.grad.double(), latent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_codes", [False, True])
def test_a_matrix_that_learned_nothing_is_what_it_was(with_codes):
    packed = matrix_of()
    matrix, x_RI = TrainedMatrix(packed, with_codes=with_codes), quantized.random(5, INPUTS)
    assert torch.equal(matrix.weight(), packed.dense())
    torch.testing.assert_close(matrix(x_RI), packed._by_tiles(x_RI), rtol=0, atol=1e-6)
    coded = matrix.coded(torch.float32)
    assert torch.equal(coded.codes_OI, packed.codes()) and torch.equal(coded.scale_OG, packed.scales)


def test_nothing_of_its_size_is_kept_for_the_way_back():
    """But what holds it: rows come back to the weights by making them anew."""
    matrix, sizes = trained_matrix(with_codes=True), list[int]()

    def noted(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    x_RI = quantized.random(1, INPUTS)
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda kept: kept):
        out_RO = matrix(x_RI)
    assert max(sizes, default=0) <= INPUTS
    out_RO.sum().backward()
    assert float(matrix.latent.grad.norm()) > 0


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-42])
def test_a_scale_at_zero_gives_numbers(zero):
    """And can leave it again."""
    matrix = trained_matrix(with_codes=True)
    matrix.scales.data[0, 0], matrix.latent.data[0, 3] = zero, 0.0
    brought_back(matrix)
    assert all(bool(each.isfinite().all()) for each in (matrix.weight(), matrix.scales.grad, matrix.latent.grad))
    assert float(matrix.scales.grad[0, 0]) != 0
    coded = matrix.coded(torch.float16)
    assert float(coded.scale_OG[0, 0].abs()) == torch.finfo(torch.float16).smallest_normal


def test_scales_keep_their_signs_and_ordinary_ones_their_bits():
    scale = torch.tensor([1e-9, -1e-9, 0.3, -0.3])
    least = torch.finfo(torch.float16).smallest_normal
    assert away_from_zero(scale, torch.float16).tolist() == [least, -least, *scale[2:].tolist()]


@pytest.mark.parametrize("sentence", FORMATS)
@pytest.mark.parametrize("parts", [SCALES, BOTH])
def test_what_learned_nothing_is_packed_byte_for_byte(sentence, parts, wide_made):
    source = open_checkpoint(wide_made("mixtral", sentence))
    model = moe_compress.load(source.folder, torch.float32)
    release(model, parts)
    before = stored(source.folder)
    found: dict[str, Tensor] = {}
    for key, tensor in packed_again(source, model).items():
        ends = {".weight": tensor} if isinstance(tensor, Tensor) else tensor.parts()
        stem = key if isinstance(tensor, Tensor) else type(tensor).stem(key)
        found |= {key if isinstance(tensor, Tensor) else f"{stem}{end}": part for end, part in ends.items()}
    packed = {name for name in before if name.endswith(("words", "weight_packed", "qweight"))}
    assert packed and packed <= found.keys() <= before.keys()
    assert all(same_bits(before[name], tensor) for name, tensor in found.items())


def learned(lab, first: Path, words: str, out: Path) -> Path:
    """A checkpoint of ours that learns from the model it was made of."""
    options = {**lab("mixtral"), "model": str(first), "out": str(out)}
    return moe_compress.compress(f"{words} teacher={lab('mixtral')['model']}", **options).folder


def codes_of(folder: Path) -> dict[str, Tensor]:
    model = moe_compress.load(folder, torch.float32)
    return {name: module.codes() for name, module in quantized.packed_in(model).items()}


@pytest.mark.parametrize("words", ["qad", "distill train=scales", "distill train=scales,routers"])
def test_scales_learn_and_codes_stay(words, wide_lab, wide_made, tmp_path):
    first = wide_made("mixtral", PACKED)
    folder = learned(wide_lab, first, f"{words} {STEPS}", tmp_path / "out")
    ends = {name.rpartition(".experts.")[1] and name.rpartition(".")[2] for name in changed_tensors(first, folder)}
    routers = any("gate.weight" in name for name in changed_tensors(first, folder))
    assert "scales" in ends and "words" not in ends and routers == ("routers" in words)


def test_codes_change_and_the_loss_falls(wide_lab, wide_made, tmp_path):
    first = wide_made("mixtral", f"{PACKED.replace('bits=4', 'bits=2')}")
    folder = learned(wide_lab, first, "qad learns=codes steps=12 lr=0.005", tmp_path / "out")
    before, after = codes_of(first), codes_of(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    curve = reports(folder)[-1]["training"]["curve"]["logits"]
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("words", ["sparsity=0.5", "pattern=2:4"])
def test_codes_that_were_pruned_stay_zero(words, wide_lab, tmp_path):
    """In one run, and where the model that a run starts from was pruned."""
    place, given = str(tmp_path / "pruned"), wide_lab("mixtral")
    moe_compress.compress(f"prune method=magnitude {words}", **given, out=place)
    first = moe_compress.compress(PACKED, **{**given, "model": place, "out": str(tmp_path / "first")}).folder
    assert pruned_kinds(first) == {"experts"}
    before = codes_of(first)
    after = codes_of(learned(wide_lab, first, f"qad learns=codes {STEPS}", tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(not bool(after[name][before[name] == 0].any()) for name in before)


def test_where_nothing_was_pruned_zeros_may_learn(wide_lab, wide_made, tmp_path):
    first = wide_made("mixtral", PACKED)
    before = codes_of(first)
    after = codes_of(learned(wide_lab, first, f"qad learns=codes {STEPS}", tmp_path / "out"))
    assert pruned_kinds(first) == frozenset()
    assert any(bool(after[name][before[name] == 0].any()) for name in before)


@pytest.mark.parametrize("name", ["awq", "asymmetric"])
def test_zero_points_are_refused_before_a_weight_is_read(name, wide_lab, refused):
    said = refused(f"{QUANTIZED}{name} + qad", **wide_lab("mixtral"))
    assert "zero points" in said and "`quantize` with format=packed, compressed-tensors or gptq." in said


@pytest.mark.parametrize("learns", ["scales", "codes"])
@pytest.mark.parametrize("sentence", FORMATS[::2])
def test_what_a_student_takes_is_what_was_counted(learns, sentence, wide_lab, wide_made, tmp_path, monkeypatch):
    """Its parameters and buffers, and the gradients and moments of what is trained."""
    counted, held = list[tuple[int, int]](), list[tuple[int, int]]()
    count, make = recovery_stage._student_bytes, recovery_stage.training_of

    def noted(*args: object) -> tuple[int, int]:
        counted.append(count(*args))
        return counted[-1]

    def measured(*args: object) -> DistillationRun:
        made = make(*args)
        model = made.student.model
        kept = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        held.append((kept, 12 * sum(each.numel() for each in made.optimiser.parameters.values())))
        return made

    monkeypatch.setattr(recovery_stage, "_student_bytes", noted)
    monkeypatch.setattr(recovery_stage, "training_of", measured)
    learned(wide_lab, wide_made("mixtral", sentence), f"qad learns={learns} steps=1 batch=1", tmp_path / "out")
    assert counted[0] == pytest.approx(held[0], rel=0.03)
