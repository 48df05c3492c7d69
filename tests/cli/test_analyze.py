"""The commands `analyze` and `compare`, and the guide's example."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import moe_compress
from moe_compress.cli.commands import app, main
from support import readers


def test_the_guide_s_full_example():
    compressor = moe_compress.ExpertCompressor("tiny-mixtral")
    hooks = moe_compress.MoEHooks(compressor.model)
    assert len(hooks.moe_layer_indices) == 5
    for layer_idx in hooks.moe_layer_indices[:2]:
        analysis = compressor.analyze_compression_potential(layer_idx)
        assert analysis["tokens"] == 64 * 256 and analysis["domains"] == ["code", "prose", "tasks"]
        plan = compressor.plan_compression(layer_idx, strategy="balanced")
        config = compressor.apply_compression(plan, layer_idx, inplace=True)
        assert (config.original_num_experts, config.compressed_num_experts) == (8, 6)
    prompt = compressor.tokenizer("def fibonacci(n):", return_tensors="pt")
    assert compressor.model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 5
    with pytest.raises(AttributeError, match="no attribute 'ExpertCompresser'"):
        _ = moe_compress.ExpertCompresser


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["moe-compress", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said.err
    return said.out


def test_the_analyze_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = ("samples=8", "length=64")
    said = command(monkeypatch, capsys, "analyze", "tiny-mixtral", "layers=1,3", *small)
    assert "| 1 " in said and "| 3 " in said and "| 2 " not in said and "512 tokens" in said
    folder = tmp_path / "runs" / "analysis" / "tiny-mixtral"
    pictures = {f"{name}.{kind}" for name in ("utilization", "similarity", "reap", "turns") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == {"analysis.json", *pictures}
    found = json.loads((folder / "analysis.json").read_text())
    assert [layer["layer_idx"] for layer in found["layers"]] == [1, 3] and len(found["streams"]["whole layer"]) == 5
    again = moe_compress.analyze("tiny-mixtral", layers=[3], out=tmp_path / "here", samples=8, length=64)
    assert len(again.files) == 9 and again.layers[0].utilization == found["layers"][1]["utilization"]
    (tmp_path / "prompts.txt").write_text("The capital of France is\n\ndef fibonacci(n):\n")
    few = command(monkeypatch, capsys, "analyze", "tiny-mixtral", "prompts=prompts.txt", "layers=0", "out=few")
    assert "No verdicts: only" in few and (tmp_path / "few" / "reap.png").is_file()


def test_the_compare_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": line}) + "\n" for line in readers.LINES[:3]), encoding="utf-8"
    )
    words = ("--prompts", "prompts.jsonl", "max_tokens=6")
    same = command(monkeypatch, capsys, "compare", "tiny-mixtral", "tiny-mixtral", *words)
    assert same.count("100% of 6 tokens the same") == 3 and "KL (nats): 0.0000" in same
    assert "same top token: 1.0000" in same
    other = command(monkeypatch, capsys, "compare", "tiny-mixtral", "tiny-mixtral-seed1", *words)
    assert "KL (nats): 0.0000" not in other and "before:" in other and "after:" in other
    found = moe_compress.compare("tiny-mixtral", "tiny-mixtral-seed1", max_tokens=4, eval_samples=4)
    assert found.tokens == 4 * 255 and found.text == "zoo" and len(found.generations) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("analyze", "tiny-mixtral", "layers=one"), "numbers of layers are needed"),
        (("analyze", "tiny-mixtral", "layers=9", "samples=4", "length=32"), "layer 9 has no experts; MoE layers: 0, 1"),
        (("analyze", "tiny-mixtral", "prompts=nowhere.txt"), "there is no file of prompts nowhere.txt"),
        (("analyze", "tiny-mixtral", "treshold=1"), "unknown key 'treshold'"),
        (("analyze", "tiny-mixtral", "model=tiny-deepseek"), "without model="),
        (("compare", "tiny-mixtral"), "takes two models"),
        (("compare", "tiny-mixtral", "tiny-mixtral", "max_tokens=many"), "a whole number is needed"),
        (("compare", "tiny-mixtral", "tiny-mixtral", "--prompts", "nowhere.txt"), "there is no file of prompts"),
    ],
)
def test_mistakes_are_one_sentence(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "word"), [("analyze", "layers=3,7"), ("compare", "prompts=FILE")])
def test_help(name, word):
    said = CliRunner().invoke(app, [name, "--help"])
    assert said.exit_code == 0 and word in said.output
