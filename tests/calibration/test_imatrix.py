"""An imatrix holds what stock transformers multiplies with: squares summed in float64, expert by expert."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe_compress import api
from moe_compress.checkpoints.gguf.architectures import architecture_of
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.models.families import FAMILIES
from support.stock_inputs import StockSums

# What a matrix of a layer is called here and there, outside the experts.
MATRICES = {
    "mixtral": {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"},
    "deepseek_v3": {
        "attn_q_b": "self_attn.q_b_proj", "attn_kv_b": "self_attn.kv_b_proj", "ffn_down": "mlp.down_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    },
    "gpt_oss": {"attn_v": "self_attn.v_proj"},
    "nemotron_h": {"ffn_down_shexp": "mixer.shared_experts.down_proj"},
}  # fmt: skip


@pytest.mark.parametrize("family", MATRICES)
def test_sums_are_those_of_the_stock_model(family, lab, tmp_path):
    options = {**lab(family), "samples": 3, "length": 24}
    folder = Path(options.pop("model"))
    made = api.export_imatrix(folder, tmp_path / "imatrix.gguf", **options)
    run = api.start(api.make_options({**options, "model": folder}).resolved())
    ids = run.windows("calibration", open_checkpoint(folder)).ids_NS
    read = gguf.GGUFReader(made)
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    stock = StockSums(folder, MATRICES[family]).run(ids)
    assert len(stock) > 3
    for name, (sums, counts) in stock.items():
        assert np.array_equal(tensors[f"{name}.counts"], counts), name
        np.testing.assert_allclose(tensors[f"{name}.in_sum2"], sums, rtol=2e-4, atol=1e-7, err_msg=name)
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in read.tensors)
    assert {name.rpartition(".")[0] for name in tensors if name.endswith("in_sum2")} == {
        name.rpartition(".")[0] for name in tensors if name.endswith("counts")
    }
    said = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.type": "imatrix", "imatrix.datasets": ["calibration.txt"], "imatrix.chunk_count": len(ids),
        "imatrix.chunk_size": 24,
    }  # fmt: skip


def test_experts_without_a_gate_have_no_entry_for_one(lab, tmp_path):
    options = {**lab("nemotron_h"), "samples": 2, "length": 16}
    made = api.export_imatrix(options.pop("model"), tmp_path / "imatrix.gguf", **options)
    names = {tensor.name for tensor in gguf.GGUFReader(made).tensors}
    assert not [name for name in names if "ffn_gate_exps" in name] and [name for name in names if "ffn_up_exps" in name]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.llama_cpp])
def test_llama_cpp_has_a_name_for_every_family_that_it_knows(family):
    assert architecture_of(family, [*gguf.MODEL_ARCH_NAMES.values()])


def test_what_cannot_be_written_is_said_before_anything_is_read(
    lab, made, family_folder, tmp_path, monkeypatch, forwards
):
    options = lab("mixtral")
    model = options.pop("model")
    (tmp_path / "there.gguf").touch()
    for folder, out, said in (
        (model, "there.gguf", "is there already"),
        (family_folder("jetmoe"), "new.gguf", "has no architecture for jetmoe"),
        (made("mixtral", "expert_drop score=random budget=global seed=1"), "new.gguf", "is an edited checkpoint"),
    ):
        forwards.clear()
        with pytest.raises(ValueError, match=said):
            api.export_imatrix(folder, tmp_path / out, **options)
        assert not forwards
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="GGUF files need the package gguf: pip install gguf"):
        api.export_imatrix(model, tmp_path / "new.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
