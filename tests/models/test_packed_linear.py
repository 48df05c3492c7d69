"""Matrices of few bits: how codes are packed, the kernels that multiply them, and modules that hold them."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import helpers
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.models.modeling import packed_kernels
from moe_compress.models.modeling.bit_packing import dequantized, pack, unpack
from moe_compress.models.modeling.packed_kernels import KERNEL_ROWS, kernel_lacks
from moe_compress.models.modeling.packed_linear import PackedMatrix
from support import naive_quantization as slow
from support import readers
from support.editing import logits_of

BITS = (2, 3, 4, 8)
MOST = KERNEL_ROWS["cpu"]
# Outputs, inputs and the inputs that share a scale. Processors take 16, 32 or 64 outputs together, and then pairs.
FITTING = [(16, 32, 32), (48, 128, 64), (80, 256, 128), (144, 256, 256), (96, 192, 96), (64, 320, 320), (1040, 32, 32)]
UNFIT = [
    (3, (24, 64), 32, torch.bfloat16, "a matrix of 24 x 64 does not fit the 4-bit kernel"),
    (4, (16, 40), 40, torch.bfloat16, "a matrix of 16 x 40 does not fit the 4-bit kernel"),
    (4, (16, 64), 16, torch.bfloat16, "the 4-bit kernel takes groups of 256, 128, 64, 32, not of 16"),
    (8, (16, 64), 32, torch.bfloat16, r"the 8-bit kernel takes one scale a row \(group_size=0\)"),
    (4, (16, 64), 32, torch.float32, "the kernels take bfloat16 activations, not float32"),
    (2, (16, 64), 32, torch.float16, "the kernels take bfloat16 activations, not float16"),
]


def codes_of(bits: int, *shape: int) -> Tensor:
    low, high = slow.limits(bits)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(bits: int, shape: tuple[int, int], group: int, dtype: torch.dtype, biased: bool = False) -> PackedMatrix:
    outputs, inputs = shape
    scale = (random(outputs, inputs // group).abs() / 8 + 0.01).to(dtype)
    bias = random(outputs, seed=2).to(dtype) if biased else None
    return PackedMatrix.of(codes_of(bits, outputs, inputs), scale, bits, bias)


def product(matrix: PackedMatrix, rows: Tensor) -> Tensor:
    """Of the very weights, in float64."""
    weight = slow.dequantized(codes_of(matrix.bits, *matrix.codes().shape).long(), matrix.scales.double())
    out = rows.double() @ weight.T
    return out if matrix.bias is None else out + matrix.bias.double()


def require_close(found: Tensor, expected: Tensor) -> None:
    """Within what bf16 leaves of a sum: the outputs of a kernel are rounded once, weights and scales before it."""
    assert found.isfinite().all()
    off = (found.double() - expected).abs()
    assert float(off.max()) < 0.02 * float(expected.abs().max()) and float(off.mean()) < 4e-3 * float(expected.std())


@pytest.fixture
def strict() -> Iterator[None]:
    """Every warning is an error: nothing falls back in silence, and nothing warns that did not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [1, 7, 16, 24, 31, 32, 33, 40, 63, 64, 100])
def test_codes_are_packed_as_compressed_tensors_does(bits, inputs):
    codes = codes_of(bits, 5, inputs)
    codes[0], codes[1] = slow.limits(bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert torch.equal(words, helpers.pack_to_int32(codes, bits))
    assert torch.equal(words, slow.pack(codes, bits))
    assert torch.equal(unpack(words, bits, inputs), codes)
    assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(slow.unpack(words, bits, inputs), codes.long())


@pytest.mark.parametrize("bits", BITS)
def test_stacks_are_packed_matrix_by_matrix(bits):
    codes = codes_of(bits, 2, 3, 4, 40)
    words = pack(codes, bits)
    for one, two in itertools.product(range(2), range(3)):
        assert torch.equal(words[one, two], pack(codes[one, two], bits))
    assert torch.equal(unpack(words, bits, 40), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_codes_times_scales(dtype):
    codes, scale = codes_of(8, 6, 24), random(6, 3).to(dtype)
    found = dequantized(codes, scale)
    assert found.dtype == dtype and torch.equal(found, slow.dequantized(codes.long(), scale.double()).to(dtype))


four_bits = pytest.mark.skipif(
    bool(kernel_lacks(matrix_of(4, (16, 32), 32, torch.bfloat16), torch.bfloat16, "cpu")),
    reason="this processor's layout of the 4-bit kernel is not known",
)


@four_bits
@pytest.mark.parametrize(("outputs", "inputs", "group"), FITTING)
@pytest.mark.parametrize("bits", [2, 3, 4])
@torch.no_grad()
def test_the_kernel_of_four_bits(bits, outputs, inputs, group, strict):
    biased, dtype = bits == 3, torch.float32 if bits == 2 else torch.bfloat16
    matrix = matrix_of(bits, (outputs, inputs), group, dtype, biased)
    words, codes = matrix.words.clone(), matrix.codes()
    for count in (1, MOST, MOST + 1, 3 * MOST):
        rows = random(count, inputs, seed=count).bfloat16()
        found = matrix(rows)
        assert found.dtype == torch.bfloat16 or (biased and dtype == torch.float32)
        require_close(found, product(matrix, rows))
        assert matrix.kernel is not None and not matrix.words.numel()
    assert torch.equal(matrix.codes(), codes) and torch.equal(matrix.state_dict()["words"], words)


@pytest.mark.parametrize("inputs", [8, 24, 40, 100])
def test_widths_that_the_kernel_of_eight_bits_cannot_take(inputs):
    """Not run: torch reads past the end, gives wrong numbers for one row and a segmentation fault for more."""
    assert kernel_lacks(matrix_of(8, (32, inputs), inputs, torch.bfloat16), torch.bfloat16, "cpu")


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 32), (17, 96), (64, 256)])
@torch.no_grad()
def test_the_kernel_of_eight_bits(outputs, inputs, strict):
    matrix = matrix_of(8, (outputs, inputs), inputs, torch.bfloat16, biased=True)
    words = matrix.words.clone()
    for count in (1, MOST, MOST + 1):
        rows = random(count, inputs, seed=count).bfloat16()
        require_close(matrix(rows), product(matrix, rows))
    assert matrix.kernel is not None and torch.equal(matrix.state_dict()["words"], words)


@pytest.mark.parametrize(("bits", "shape", "group", "dtype", "reason"), UNFIT)
@torch.no_grad()
def test_where_no_kernel_fits_a_warning_says_why(bits, shape, group, dtype, reason):
    matrix, rows = matrix_of(bits, shape, group, torch.bfloat16, biased=True).to(dtype), random(5, shape[1]).to(dtype)
    with pytest.warns(UserWarning, match=f"made dense for every product: ({reason}|the layout of torch)"):
        found = matrix(rows)
    assert matrix.kernel is None and found.dtype == dtype
    assert torch.equal(found, torch.nn.functional.linear(rows, matrix.dense(), matrix.bias))
    require_close(found, product(matrix, rows))


@four_bits
@torch.no_grad()
def test_what_does_not_ask_for_a_kernel(strict):
    """Other rows once the kernel has the weights, no rows at all, rows of several dimensions."""
    matrix = matrix_of(4, (32, 64), 32, torch.bfloat16)
    assert matrix(random(0, 64).bfloat16()).shape == (0, 32) and matrix.kernel is None
    rows = random(2, 3, 64).bfloat16()
    require_close(matrix(rows), product(matrix, rows))
    assert matrix.kernel is not None and matrix(rows).shape == (2, 3, 32)
    kernel = matrix.kernel
    assert matrix.prepare(torch.bfloat16, rows.device) == "" and matrix.kernel is kernel
    assert torch.equal(matrix(rows.float()), rows.float() @ matrix.dense().float().T)
    assert matrix(random(0, 64).bfloat16()).shape == (0, 32)


def test_gradients_flow_to_the_inputs(strict):
    matrix, rows = matrix_of(4, (32, 64), 32, torch.bfloat16), random(3, 64).bfloat16().requires_grad_()
    matrix(rows).sum().backward()
    assert matrix.kernel is None and torch.equal(rows.grad, matrix.dense().sum(0).expand(3, -1))


PLAIN_PROCESSOR = """
import importlib, sys, torch, types
package = types.ModuleType("shipped")
package.__path__ = [sys.argv[1]]
sys.modules["shipped"] = package
packed = importlib.import_module("shipped.packed_linear")
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
codes = torch.randint(-8, 8, (80, 64), dtype=torch.int8)
matrix = packed.PackedMatrix.of(codes, torch.ones(80, 2).bfloat16(), 4)
for rows in (1, 64):
    found = matrix(torch.ones(rows, 64).bfloat16())
    assert torch.equal(found[0], codes.sum(1).bfloat16()) and found.shape == (rows, 80)
assert torch.equal(matrix.codes(), codes)
"""


def test_processors_without_vector_instructions():
    """Their layout is another, as is ARM's: with a kernel or without, nothing breaks. The module needs torch alone."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PLAIN_PROCESSOR, str(Path(packed_kernels.__file__).parent)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@four_bits
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (8, 64)])
@torch.no_grad()
def test_a_module_is_what_it_was_whatever_is_done_with_it(bits, group, strict):
    matrix, rows = matrix_of(bits, (48, 64), group, torch.bfloat16, biased=True), random(4, 64).bfloat16()
    before = {name: tensor.clone() for name, tensor in matrix.state_dict().items()}
    assert set(before) == {"words", "scales", "bias"}
    assert (matrix.group, matrix.in_features, matrix.out_features) == (group, 64, 48)
    expected = matrix(rows)
    other = copy.deepcopy(matrix)
    assert torch.equal(other(rows), expected)
    room = PackedMatrix.empty(torch.empty(48, 64, dtype=torch.bfloat16), bits, group, torch.empty(48).bfloat16())
    room.load_state_dict(matrix.state_dict())
    assert torch.equal(room(rows), expected)
    for moved in (matrix.to("cpu"), other.to(torch.float32)):
        assert moved.kernel is None and torch.equal(moved.words, before["words"]) and not moved.words.requires_grad
        assert torch.equal(moved.scales, before["scales"].to(moved.scales.dtype))
    assert torch.equal(matrix(rows), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in matrix.state_dict().items())


@four_bits
@torch.no_grad()
def test_a_whole_model_runs_in_the_kernels(options, tmp_path, strict):
    """Experts and attention of a bf16 model, 4 bits, groups of 32; what comes out is what its dense form gives."""
    model = readers.save_model("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    words = "quantize method=rtn group_size=32 where=experts,attention"
    folder = moe_compress.compress(words, **{**options, "model": str(model), "eval": False}).folder
    model, dense = moe_compress.load(folder, torch.bfloat16), load_model(folder, torch.bfloat16)
    found = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    assert len(found) == len(open_checkpoint(folder).packed) == 3 * (3 * 8 + 4)
    one, other = (logits_of(each, torch.arange(3, 63)[None]).float() for each in (model, dense))
    assert sum(module.kernel is not None for module in found) > 0.8 * len(found)
    # The median: where rounding sends a token to another expert, its logits are others.
    assert float((one - other).abs().median() / other.std()) < 0.03
