"""The plan of a real compression on a GGUF file of its model: the tensors of the checkpoint that it made."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_compress import api
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.cli.commands import main
from moe_compress.edits.plan_file import PLAN
from support.gguf_files import Read

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
PARTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def converted(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """A Mixtral's tensors by GGUF's names, without the reordering of queries and keys."""
    files = [load_file(path) for path in checkpoint.folder.glob("*.safetensors")]
    stored = {key: tensor for tensors in files for key, tensor in tensors.items()}
    found = {"token_embd.weight": stored["model.embed_tokens.weight"], "output.weight": stored["lm_head.weight"]}
    found["output_norm.weight"] = stored["model.norm.weight"]
    for layer in range(checkpoint.num_layers):
        place = f"model.layers.{layer}"
        found |= {f"blk.{layer}.{new}.weight": stored[f"{place}.{old}.weight"] for old, new in LAYER.items()}
        for old, new in PARTS.items():
            count = sum(key.startswith(f"{place}.block_sparse_moe.experts") for key in stored) // len(PARTS)
            stack = [stored[f"{place}.block_sparse_moe.experts.{expert}.{old}.weight"] for expert in range(count)]
            found[f"blk.{layer}.{new}.weight"] = np.stack(stack)
    return found


def converted_file(checkpoint: Checkpoint, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(Path(checkpoint.name).name)
    config = checkpoint.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for name, tensor in converted(checkpoint).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SENTENCE = "expert_drop score=random keep=5 seed=1 + block_drop drop=1 + expert_drop keep=4 + top_k k=1"


def test_a_compressions_plan_gives_what_it_gave_the_model(lab, made, tmp_path):
    options = lab("mixtral")
    before, after = open_checkpoint(Path(str(options["model"]))), open_checkpoint(made("mixtral", SENTENCE))
    source = converted_file(before, tmp_path / "whole.gguf")
    read = Read(api.export_gguf_plan(after.folder / PLAN, source))
    expected = converted(after)
    assert read.raw.keys() == expected.keys() and after.num_layers == before.num_layers - 1
    for name, tensor in expected.items():
        assert np.array_equal(read.raw[name], tensor), name
    keys = {"expert_count": 4, "expert_used_count": 1, "block_count": after.num_layers}
    assert {key: read.values[f"llama.{key}"] for key in keys} == keys


def test_a_plan_says_the_shape_of_its_model_and_older_ones_are_asked_it(lab, made, tmp_path):
    folder, options = made("mixtral", SENTENCE), lab("mixtral")
    base = open_checkpoint(Path(str(options["model"])))
    plan = json.loads((folder / PLAN).read_text())
    shape = {"model_type": "mixtral", "layers": base.num_layers, "hidden_size": base.config.hidden_size, "experts": 8}
    assert plan["base"].pop("shape") == shape
    older = tmp_path / PLAN
    older.write_text(json.dumps(plan))
    source = converted_file(base, tmp_path / "whole.gguf")
    newer = api.export_gguf_plan(folder / PLAN, source)
    assert newer.read_bytes() == api.export_gguf_plan(older, source, tmp_path / "again.gguf").read_bytes()
    plan["base"]["shape"] = [1]
    older.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"the plan says \[1\] of its model's shape"):
        api.export_gguf_plan(older, source, tmp_path / "no.gguf")


def test_the_plan_of_a_merge_is_refused(lab, made, tmp_path):
    folder = made("mixtral", "expert_merge ratio=0.25")
    source = converted_file(open_checkpoint(Path(str(lab("mixtral")["model"]))), tmp_path / "whole.gguf")
    with pytest.raises(ValueError, match=r"its edit merge_experts of layer 0 needs numbers that whole\.gguf"):
        api.export_gguf_plan(folder / PLAN, source)


# --- the command line ------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["moe-compress", *map(str, words)])
    with contextlib.suppress(SystemExit):
        main()
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_command_line_takes_both(lab, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = lab("mixtral")
    converted_file(open_checkpoint(Path(str(options["model"]))), tmp_path / "whole.gguf")
    plan = Path(shutil.copy(made("mixtral", SENTENCE) / PLAN, tmp_path))
    assert "written: small.gguf" in said(
        capsys, monkeypatch, "export", "gguf-plan", plan, "whole.gguf", "out=small.gguf"
    )
    words = [f"{key}={options[key]}" for key in ("data", "samples", "length", "results")]
    assert "written: i.gguf" in said(capsys, monkeypatch, "export", "imatrix", options["model"], "out=i.gguf", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "small.gguf", "i.gguf", "plan.json"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gguf-plan"], "export gguf-plan takes plan.json and MODEL.gguf"),
        (["gguf-plan", "plan.json", "out=x"], "export gguf-plan takes plan.json and MODEL.gguf"),
        (["gguf-plan", "p", "m", "ot=x"], "export gguf-plan has no option 'ot'; it takes: out, any_model"),
        (["gguf-plan", "p", "m", "any_model=7"], "any_model=7: allowed: true, false"),
        (["gguf-plan", "p.json", "m.gguf"], "there is no file p.json"),
        (["imatrix"], "export imatrix takes MODEL"),
        (["imatrix", "tiny-mixtrl"], "tiny-mixtral"),
        (["imatrix", "tiny-mixtral", "samples=x"], "samples=x"),
        (["--help"], "Words of export gguf-plan:"),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in said(capsys, monkeypatch, "export", *words)
    assert not [*tmp_path.iterdir()]
