"""The commands from end to end, on tiny models that can read: what is written, what is not done twice, what is said."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
import readers
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.terminal import show_tables
from moe_compress.models import hf
from moe_compress.models.shape import moe_shapes

Folder = Callable[[str], Path]
Options = dict[str, object]
FAMILIES = ("mixtral", "deepseek_v3")


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_compress")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def same_checkpoint(a: Path, b: Path) -> bool:
    files = ("config.json", "model.safetensors.index.json", "tokenizer.json")
    return weights(a) == weights(b) and all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def kept(folder: Path) -> dict[int, list[int]]:
    """Layer -> kept experts by their first numbers, from the saved plan of an expert drop."""
    found: dict[int, list[int]] = {}
    for stage in json.loads((folder / "plan.json").read_text())["stages"]:
        for edit in stage["edits"]:
            before = found.get(edit["layer"])
            found[edit["layer"]] = [before[e] for e in edit["experts"]] if before else edit["experts"]
    return found


def scores(folder: Path) -> dict[str, list[float]]:
    """Layer -> scores of the only stage, from the saved plan."""
    (stage,) = json.loads((folder / "plan.json").read_text())["stages"]
    return stage["scores"]


def counts(folder: Path) -> dict[int, int]:
    """Layer -> experts that the checkpoint holds."""
    checkpoint = open_checkpoint(folder)
    return {s.layer: s.num_experts for s in moe_shapes(hf.skeleton(checkpoint.config, torch.float32))}


# --- compress ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_writes_a_checkpoint_a_record_and_a_row(family, reader_folder, options, tmp_path):
    result = moe_compress.compress("expert_drop score=reap keep=6", model=reader_folder(family), **options)
    assert result.folder.parent == tmp_path / "results" / "checkpoints"
    assert set(counts(result.folder).values()) == {6}
    model, info = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    ids = tokenizer("the lazy dog", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[-1] == readers.VOCAB
    assert (result.folder / "LICENSE").is_file()

    record = result.record
    assert record.recipe[0]["given"] == {"score": "reap", "keep": 6}
    assert record.metrics["perplexity"].value > 0 and record.metrics["kl"].value > 0
    assert record.sizes["parameters"] < result.original.sizes["parameters"]
    assert record.sizes["touched"] < result.original.sizes["touched"]  # the router's rows are fewer
    assert {p.stem for p in (tmp_path / "results" / "records").iterdir()} == {record.name, result.original.name}

    (table,) = moe_compress.table([tmp_path / "results" / "records"])
    assert list(table.frame["recipe"]) == ["original", "expert_drop score=reap keep=6"]
    events = [json.loads(line) for f in (tmp_path / "results" / "logs").iterdir() for line in f.open()]
    assert [event["event"] for event in events] == ["started", "calibrated", "written", "evaluated"]


def test_a_second_recipe_runs_no_forward(reader_folder, options, forwards, caplog):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    first = moe_compress.compress("expert_drop score=reap keep=6", **options)
    assert len(forwards) > 0
    forwards.clear()
    caplog.clear()
    second = moe_compress.compress("expert_drop score=easy_ep ratio=0.5 budget=global", **options)
    assert not forwards
    assert "no forward needed" in caplog.text
    assert counts(first.folder) != counts(second.folder)


def test_the_same_recipe_again_does_nothing(reader_folder, options, forwards, caplog):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    first = moe_compress.compress("expert_drop keep=6", **options)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    forwards.clear()
    assert moe_compress.compress("expert_drop keep=6", **options).folder == first.folder
    assert not forwards and "is already there" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_changed_text_under_the_same_name_is_another_recipe(reader_folder, options, texts, tmp_path):
    text = tmp_path / "text.txt"
    options = {**options, "eval": False, "model": reader_folder("mixtral"), "data": text, "out": tmp_path / "out"}
    text.write_text("\n\n".join(readers.LINES * 4))
    moe_compress.compress("expert_drop keep=6", **options)
    text.write_text("\n\n".join(line.upper() for line in readers.LINES * 4))
    with pytest.raises(ValueError, match="already holds something"):
        moe_compress.compress("expert_drop keep=6", **options)


def test_methods_without_text_run_no_forward(reader_folder, options, forwards):
    for sentence in ("expert_drop score=random", "expert_drop score=aimer", "identity"):
        moe_compress.compress(sentence, model=reader_folder("deepseek_v3"), **{**options, "eval": False})
    assert not forwards


def test_the_identity_recipe_changes_no_tensor(reader_folder, options):
    result = moe_compress.compress("identity", model=reader_folder("deepseek_v3"), **options)
    source, written = open_checkpoint(reader_folder("deepseek_v3")), open_checkpoint(result.folder)
    with source.read(source.tensors) as before, written.read(written.tensors) as after:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name][...], after[name][...]) for name in before)
    assert result.record.metrics["delta_nll"].value == 0 and result.record.metrics["top1_agreement"].value == 1


def test_random_depends_on_the_seed_and_seeds_share_a_row(reader_folder, options, tmp_path):
    for seed in (0, 1):
        moe_compress.compress("expert_drop score=random keep=4", model=reader_folder("mixtral"), seed=seed, **options)
    first, second = sorted((tmp_path / "results" / "checkpoints").iterdir())
    assert kept(first) != kept(second)
    (table,) = moe_compress.table([tmp_path / "results" / "records"])
    assert list(table.frame["recipe"]) == ["original", "expert_drop score=random keep=4 (2 seeds)"]


# --- stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compose_and_their_plan_is_one(family, reader_folder, options, tmp_path):
    options = {**options, "eval": False, "model": reader_folder(family)}
    both = moe_compress.compress("expert_drop keep=6 + expert_drop keep=4 score=frequency", **options).folder
    assert sorted(p.name for p in both.parent.iterdir()) == [both.name]
    one = moe_compress.compress("expert_drop keep=6", out=tmp_path / "one", **options).folder
    two = moe_compress.compress(
        "expert_drop keep=4 score=frequency", out=tmp_path / "two", **{**options, "model": one}
    ).folder
    assert weights(both) == weights(two)
    first, second = kept(one), kept(two)
    assert kept(both) == {layer: [first[layer][e] for e in experts] for layer, experts in second.items()}
    again = moe_compress.apply(both / "plan.json", **{**options, "out": tmp_path / "again", "model": ""})
    assert same_checkpoint(again.folder, both)


def test_stages_pass_through_an_edited_checkpoint(reader_folder, options):
    sentence = "expert_drop score=random budget=global ratio=0.25 seed=1 + expert_drop ratio=0.25"
    result = moe_compress.compress(sentence, model=reader_folder("mixtral"), **options)
    found = counts(result.folder)
    assert result.record.form == "edited" and len(set(found.values())) > 1
    model = moe_compress.load(result.folder)
    assert [view.experts.down_proj.shape[0] for view in model.model.layers[0].modules() if hasattr(view, "experts")]
    assert len(result.record.recipe) == len(result.record.report) == 2


def test_a_checkpoint_where_a_stage_would_go_is_never_removed(reader_folder, options, tmp_path):
    options = {**options, "eval": False, "model": reader_folder("mixtral"), "out": tmp_path / "out"}
    mine = moe_compress.compress("expert_drop keep=6", **{**options, "out": tmp_path / "out.stage1"}).folder
    with pytest.raises(ValueError, match=r"out\.stage1 already holds something"):
        moe_compress.compress("expert_drop keep=7 + expert_drop keep=4", **options)
    result = moe_compress.compress("expert_drop keep=6 + expert_drop keep=4", **options)
    assert set(counts(result.folder).values()) == {4} and set(counts(mine).values()) == {6}


# --- plans and recipes as files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_edited_by_hand_is_applied_without_calibration(family, reader_folder, options, forwards, tmp_path):
    quiet = {**options, "eval": False}
    made = moe_compress.compress("expert_drop keep=6", model=reader_folder(family), **quiet).folder
    forwards.clear()
    same = moe_compress.apply(made / "plan.json", out=tmp_path / "same", **quiet).folder
    assert same_checkpoint(same, made)
    plan = json.loads((made / "plan.json").read_text())
    edit = plan["stages"][-1]["edits"][-1]
    edit["experts"] = [0, 1, 4, 5]
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    mine = moe_compress.apply(str(tmp_path / "mine.json"), out=tmp_path / "mine", **quiet).folder
    assert counts(mine)[edit["layer"]] == 4
    assert kept(mine)[edit["layer"]] == [0, 1, 4, 5]
    assert not forwards
    evaluated = moe_compress.evaluate(mine, **options)
    assert evaluated.record.form == "edited" and "delta_nll" in evaluated.record.metrics


def test_a_plan_goes_to_another_model_only_if_told_to(reader_folder, options, tmp_path, caplog):
    quiet = {**options, "eval": False}
    made = moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **quiet).folder
    other = readers.save_model("mixtral", tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"other is another model, or another version of it: .* say any_model=true"):
        moe_compress.apply(made / "plan.json", model=other, **quiet)
    result = moe_compress.apply(made / "plan.json", model=other, any_model=True, **quiet)
    assert kept(result.folder) == kept(made) and "is another model" in caplog.text
    assert result.folder.name.startswith("other-plan-")


@pytest.mark.parametrize("sentence", ["expert_drop score=man keep=6", "expert_drop ratio=0.5 + expert_drop keep=2"])
def test_the_recipe_in_the_checkpoint_rebuilds_it(sentence, reader_folder, options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    made = moe_compress.compress(sentence, "seed=3", model=folder, **options).folder
    again = moe_compress.compress(
        str(made / "recipe.yaml"), out=tmp_path / "again", results=tmp_path / "elsewhere", eval=False
    )
    assert same_checkpoint(again.folder, made)
    assert (again.folder / "plan.json").read_bytes() == (made / "plan.json").read_bytes()


# --- what a recipe may say ----------------------------------------------------------------------------------------


def test_padded_documents(reader_folder, options, caplog):
    short = moe_compress.compress(
        "expert_drop", model=reader_folder("mixtral"), **{**options, "pack": False, "length": 40, "eval": False}
    )
    report = json.loads((short.folder / "moe_compress.json").read_text())["report"][0]["calibration"]
    assert report["packed"] is False and report["windows"] == 8
    assert 0 < report["tokens"] < 8 * 40
    longer = {**options, "pack": False, "length": 60, "eval": False, "out": short.folder.with_name("longer")}
    again = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **longer)
    assert kept(again.folder) == kept(short.folder)  # padding counts for nothing


def test_domains_are_mixed_afterwards(reader_folder, options, texts, forwards):
    options = {**options, "data": str(texts / "domains.jsonl"), "eval": False, "model": reader_folder("mixtral")}
    made = moe_compress.compress("expert_drop score=frequency keep=2", **options)
    domains = json.loads((made.folder / "moe_compress.json").read_text())["report"][0]["calibration"]["domains"]
    assert domains == {"code": 4, "prose": 4}
    forwards.clear()

    def frequencies(mix: str) -> list[list[float]]:
        folder = moe_compress.compress("expert_drop score=frequency keep=2", mix=mix, **options).folder
        return list(scores(folder).values())

    prose, code, both = frequencies("prose:1"), frequencies("code:1"), frequencies("prose:2,code:1")
    expected, got = 2 * torch.tensor(prose) + torch.tensor(code), torch.tensor(both)
    torch.testing.assert_close(got / got.sum(), expected / expected.sum())
    assert not forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_reverse_drops_what_would_stay(family, reader_folder, options):
    options = {**options, "eval": False, "model": reader_folder(family)}
    best = kept(moe_compress.compress("expert_drop keep=4 score=frequency", **options).folder)
    worst = kept(moe_compress.compress("expert_drop keep=4 score=frequency reverse=true", **options).folder)
    used = scores(moe_compress.compress("expert_drop keep=4 score=frequency", **options).folder)
    for layer, experts in best.items():
        total = {side: sum(used[str(layer)][e] for e in ids) for side, ids in [("b", experts), ("w", worst[layer])]}
        assert total["b"] > total["w"]


def test_protected_experts_stay(reader_folder, options):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    plain = kept(moe_compress.compress("expert_drop keep=4", **options).folder)
    dropped = next(e for e in range(8) if e not in plain[1])
    guarded = moe_compress.compress(f"expert_drop keep=4 protect=1:{dropped}", **options).folder
    assert dropped in kept(guarded)[1]
    assert {layer: ids for layer, ids in kept(guarded).items() if layer != 1} == {
        layer: ids for layer, ids in plain.items() if layer != 1
    }
    manifest = json.loads((guarded / "moe_compress.json").read_text())
    assert manifest["report"][0]["protected"] == {"1": [dropped]}


def test_super_experts_stay(options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model", num_hidden_layers=4)
    checkpoint = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        checkpoint.model.layers[1].mlp.experts.down_proj[5] *= 100
    checkpoint.save_pretrained(folder)
    words = "expert_drop score=frequency reverse=true keep=2 protect=super"
    made = moe_compress.compress(words, model=folder, **{**options, "eval": False}).folder
    assert 5 in kept(made)[1]
    assert json.loads((made / "moe_compress.json").read_text())["report"][0]["protected"] == {"1": [5]}


@pytest.mark.parametrize(("family", "floor"), [("mixtral", 2), ("deepseek_v3", 4)])
def test_a_global_budget_keeps_every_layer_s_floor(family, floor, reader_folder, options, monkeypatch):
    options = {**options, "eval": False, "model": reader_folder(family)}
    made = moe_compress.compress("expert_drop score=weight_norm budget=global ratio=0.5", **options).folder
    found = counts(made)
    assert sum(found.values()) == 4 * len(found) and min(found.values()) >= floor
    lowest = moe_compress.compress(f"expert_drop score=ean budget=global keep={floor}", **options).folder
    assert set(counts(lowest).values()) == {floor}


def test_experts_without_tokens(options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[3] = 0
        model.model.layers[2].mlp.gate.weight[4] = 0
        model.model.layers[2].post_attention_layernorm.weight.mul_(50)  # routing is all or nothing
    model.save_pretrained(folder)
    options = {**options, "eval": False, "model": folder, "samples": 1}
    dropped = moe_compress.compress("expert_drop keep=6", **options).folder
    missed = json.loads((dropped / "moe_compress.json").read_text())["report"][0]["experts_without_tokens"]["2"]
    assert missed
    assert len(set(missed) & set(kept(dropped)[2])) == max(0, len(missed) - 2)
    spared = moe_compress.compress("expert_drop keep=6 unseen=keep", **options).folder
    assert len(set(missed) & set(kept(spared)[2])) == min(len(missed), 6)
    with pytest.raises(ValueError, match="no calibration token reached experts"):
        moe_compress.compress("expert_drop keep=6 unseen=error", **options)


# --- evaluate, plan, table, load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_resident_models_give_the_same_numbers(family, reader_folder, options):
    made = moe_compress.compress(
        "expert_drop budget=global score=random seed=1", model=reader_folder(family), **{**options, "eval": False}
    ).folder
    streamed = moe_compress.evaluate(made, **options)
    resident = moe_compress.evaluate(
        made, **{**options, "resident": True, "results": options["results"] + "2", "name": "resident"}
    )
    assert streamed.record.metrics == resident.record.metrics
    assert streamed.original.metrics == resident.original.metrics
    assert streamed.record.protocol == resident.record.protocol
    assert (streamed.record.name.startswith(made.name), resident.record.name) == (True, "resident")


def test_an_original_is_measured_once(reader_folder, options, forwards):
    moe_compress.evaluate(reader_folder("mixtral"), **options)
    forwards.clear()
    result = moe_compress.evaluate(reader_folder("mixtral"), **options)
    assert not forwards and result.record is result.original
    assert "delta_nll" not in result.record.metrics


def test_each_protocol_has_its_record_and_its_table(reader_folder, options, texts, tmp_path):
    made = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **options).folder
    moe_compress.evaluate(made, **{**options, "eval_data": str(texts / "calibration.txt")})
    tables = moe_compress.table([tmp_path / "results" / "records"])
    assert len(tables) == 2
    assert all(list(table.frame["form"]) == ["original", "plain"] for table in tables)


def test_evaluation_against_another_original(reader_folder, options, tmp_path):
    other = readers.save_model("mixtral", tmp_path / "other", seed=5)
    result = moe_compress.evaluate(reader_folder("mixtral"), original=other, **options)
    assert result.record.model == "other" and result.record.metrics["kl"].value > 0.01


@pytest.mark.parametrize(
    ("model", "billions", "gibibytes"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 46.70, 86.99),
        ("deepseek-ai/deepseek-moe-16b-base", 16.38, 30.50),
        ("deepseek-ai/DeepSeek-V3", 671.03, 626.92),
        ("openai/gpt-oss-20b", 20.91, None),
    ],
)
def test_plan_knows_well_known_models_offline(model, billions, gibibytes):
    found = moe_compress.plan("expert_drop ratio=0.5", model=model)
    assert found.before.parameters / 1e9 == pytest.approx(billions, abs=0.006)
    if gibibytes is not None:
        assert found.before.bytes / 2**30 == pytest.approx(gibibytes, abs=0.006)
    assert found.after.parameters < 0.6 * found.before.parameters
    assert found.form == "plain" and found.after.flops_per_token <= found.before.flops_per_token


def test_plan_needs_only_a_config(reader_folder, tmp_path):
    shutil.copy(reader_folder("deepseek_v3") / "config.json", tmp_path)
    found = moe_compress.plan("expert_drop keep=6 + expert_drop keep=4", model=tmp_path)
    full = open_checkpoint(reader_folder("deepseek_v3"))
    assert found.before.bytes == full.bytes and found.form == "plain"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    assert moe_compress.plan("expert_drop budget=global", model=tmp_path).form == "edited"
    assert moe_compress.plan("expert_drop budget=global + expert_drop keep=4", model=tmp_path).form == "plain"


@pytest.mark.parametrize("sentence", ["expert_drop keep=6", "expert_drop score=random budget=global seed=1"])
def test_the_forecast_comes_true(sentence, reader_folder, options):
    found = moe_compress.plan(sentence, model=reader_folder("mixtral"), **options)
    made = moe_compress.compress(sentence, model=reader_folder("mixtral"), **options)
    assert made.record.sizes["parameters"] == found.after.parameters
    assert made.record.sizes["bytes"] == found.after.bytes
    assert made.record.form == found.form


def test_load_gives_an_ordinary_model(reader_folder, options):
    made = moe_compress.compress("expert_drop budget=global", model=reader_folder("mixtral"), **options).folder
    model = moe_compress.load(made, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert moe_compress.load(reader_folder("mixtral")).dtype == torch.float32


def test_an_original_that_moved_or_changed(options, caplog, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    made = moe_compress.compress("expert_drop", model=folder, **{**options, "eval": False}).folder
    readers.save_model("mixtral", folder, seed=3)
    moe_compress.evaluate(made, **options)
    assert "is not what it was when" in caplog.text
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the original of .* is needed \(or original=\): there is no model"):
        moe_compress.evaluate(made, **options)
    assert moe_compress.evaluate(made, original=tmp_path / "moved", **options).record.model == "moved"


def test_windows_longer_than_the_model_was_made_for(reader_folder, options, caplog):
    moe_compress.evaluate(reader_folder("mixtral"), **{**options, "eval_length": 80})
    assert "windows of 80 tokens" in caplog.text and "was made for 64" in caplog.text


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "as_columns"), [(80, True), (340, False)])
def test_a_narrow_terminal_gets_rows_as_columns(
    columns, as_columns, reader_folder, options, monkeypatch, capsys, tmp_path
):
    moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **options)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_tables(moe_compress.table([tmp_path / "results" / "records"]))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns and "…" not in "".join(lines)
    assert any("original" in line and "keep=6" in line for line in lines) == as_columns


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    sources = str(Path(moe_compress.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "moe_compress", *map(str, words)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": sources, **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_line_from_compress_to_table(reader_folder, options, tmp_path):
    folder = tmp_path / "a folder with spaces"
    shutil.copytree(reader_folder("mixtral"), folder)
    words = [f"{key}={value}" for key, value in options.items() if key != "results"]
    done = run("compress", "expert_drop score=reap ratio=0.25", *words, f"model={folder}", "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| original" in done.stdout and "| expert_drop score=reap ratio=0.25" in done.stdout
    assert done.stdout.splitlines()[-1] == "checkpoint: here"
    assert "checkpoint written: here" in done.stderr and "━" not in done.stderr  # no bar where no terminal is
    done = run("table", cwd=tmp_path)
    assert done.returncode == 0 and "expert_drop" in (tmp_path / "runs" / "tables.md").read_text()
    assert list((tmp_path / "runs").glob("*.csv"))
