"""Verifying a checkpoint: what a fresh stock process makes of good and of broken ones, and who is said to load it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.commands import main
from moe_compress.evaluation.verification import verify as verification
from moe_compress.evaluation.verification.compatibility import compatibility
from moe_compress.evaluation.verification.verify import verification as verified
from support import readers
from support.slow import slow_after

RTN = "quantize method=rtn group_size=8 clip=max"
FRESH = verification.run_isolated  # other tests run stock transformers in copies of a process that has imported it


def made(sentence: str, folder: Path, options: dict[str, object]) -> Path:
    found = moe_compress.compress(sentence, model=str(folder), **{**options, "eval": False}).folder
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("sentence", "form"),
    slow_after(1, [(f"{RTN} bits=4", "packed"), ("activations", "edited")]),
)
def test_a_good_checkpoint_is_verified(sentence, form, reader_folder, options, monkeypatch):
    monkeypatch.setattr(verification, "run_isolated", FRESH)
    found = verified(open_checkpoint(made(sentence, reader_folder("mixtral"), options)))
    assert found.passed and found.form == form and found.error is not None and found.error <= found.tolerance
    assert found.stock_class is not None and "MixtralForCausalLM" in found.stock_class
    assert f"{form} checkpoint: verified." in found.markdown() and "| vLLM" in found.markdown()


def test_a_checkpoint_without_one_of_its_tensors_is_not(reader_folder, tmp_path):
    """Stock transformers fills the gap with noise, says so at most, and goes on."""
    folder = tmp_path / "broken"
    shutil.copytree(reader_folder("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.strange.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = verified(open_checkpoint(folder))
    assert not found.passed and "missing keys: model.norm.weight" in found.problems
    assert any(problem.startswith("unexpected keys: ") for problem in found.problems)
    assert "NOT VERIFIED: " in found.markdown() and "| vLLM" in found.markdown()


def test_a_layout_that_stock_transformers_does_not_load_is_not_called_verified(reader_folder, options, monkeypatch):
    folder = made(f"{RTN} bits=4 format=gptq", reader_folder("mixtral"), options)
    found = verified(open_checkpoint(folder))
    assert not found.passed and found.problems == [] and found.stock_class is None
    assert "NOT VERIFIED: stock transformers reads no such layout" in found.markdown()
    monkeypatch.setattr("sys.argv", ["moe-compress", "verify", str(folder), f"results={options['results']}"])
    with pytest.raises(SystemExit, match="3"):
        main()
    assert (Path(str(options["results"])) / "verification" / f"{folder.name}.json").is_file()


CLIENTS: list[Any] = [
    ("mixtral", "expert_drop keep=6", (True, True, True), "as any other model"),
    ("mixtral", f"{RTN} bits=4", (True, True, True), "convert_hf_to_gguf.py makes the weights dense"),
    ("mixtral", f"{RTN} bits=3", (True, False, True), "4 and 8 bits, not 3: use format=dense"),
    ("mixtral", f"{RTN} bits=4 format=packed", (True, False, False), "trust_remote_code=True"),
    ("mixtral", f"{RTN} bits=4 format=gptq", (False, True, True), "use moe_compress.load, gptqmodel or vLLM"),
    ("mixtral", f"{RTN} bits=4 + activations", (False, False, False), "under an edited architecture"),
    ("minimax", "expert_drop keep=6", (True, False, False), "not known to"),
]


@pytest.mark.parametrize(("family", "sentence", "loads", "said"), slow_after(4, CLIENTS))
def test_who_loads_it_and_why_not(family, sentence, loads, said, reader_folder, options):
    found = compatibility(open_checkpoint(made(sentence, reader_folder(family), options)))
    assert tuple(verdict.loads for verdict in found) == loads
    assert any(said in verdict.why for verdict in found), [verdict.why for verdict in found]


@pytest.mark.parametrize(
    ("values", "loads"),
    [
        ({"num_hidden_layers": 27}, True),
        ({"num_hidden_layers": 25}, False),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, True),
        ({"num_hidden_layers": 48, "vocab_size": 102400}, False),
        ({"num_hidden_layers": 25, "q_lora_rank": 1536}, True),
    ],
)
def test_llama_cpp_knows_latent_attention_without_a_query_rank_by_its_depth(values, loads, reader_folder):
    """llama-model.cpp, deepseek2: lite models are those of 26 or 27 layers, or of 48 with Kanana's vocabulary."""
    checkpoint = open_checkpoint(reader_folder("deepseek_v2"))
    lite = dataclasses.replace(checkpoint, values={**checkpoint.values, "q_lora_rank": None, **values})
    (found,) = [verdict for verdict in compatibility(lite) if verdict.client == "llama.cpp"]
    assert found.loads == loads and (loads or "q_lora_rank" in found.why)


@pytest.mark.slow  # one more process; the others are of formats whose arithmetic is theirs
@pytest.mark.parametrize("attention", [True, False])
def test_weights_that_stock_keeps_in_sixteen_bits_are_compared_in_fp32(attention, options, tmp_path):
    """Qwen3-Next in 4 bits as published: its convolutions and norms stay bf16 in a model loaded in fp32."""
    kinds = ["linear_attention", "full_attention" if attention else "linear_attention", "linear_attention"]
    readers.save_model("qwen3_next", tmp_path / "model", layer_types=kinds)
    found = verified(open_checkpoint(made(f"{RTN} bits=4", tmp_path / "model", options)))
    assert found.error < found.tolerance
    assert found.passed == attention, found.problems
    assert attention or "loads it, but generates nothing: ValueError" in found.problems[0]  # transformers 5.23's cache


def test_different_logits_are_a_problem(reader_folder, options, monkeypatch):
    checkpoint = open_checkpoint(made("expert_drop keep=6", reader_folder("mixtral"), options))
    right = verification._ours(checkpoint)
    monkeypatch.setattr(verification, "_ours", lambda _: right * 1.01)
    stock = {"wrong": {}, "class": "It", "logits": right, "made": 4, "behind": 0.0}
    monkeypatch.setattr(verification, "_in_fresh_process", lambda *_: stock)
    found = verified(checkpoint)
    assert not found.passed and "logits differ by 9.9e-03" in found.problems[0]
    monkeypatch.setattr(verification, "_ours", lambda _: right)
    for wrong in ({"made": 0}, {"behind": 0.5}):
        monkeypatch.setattr(verification, "_in_fresh_process", lambda *_, wrong=wrong: stock | wrong)
        assert "are not the likeliest ones" in verified(checkpoint).problems[0]
    assert json.loads(json.dumps(found.to_json()))["passed"] is False and "NOT VERIFIED" in found.markdown()
