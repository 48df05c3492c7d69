"""Plans without weights: known sizes, and forecasts that come true."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest

import moe_compress
from moe_compress.checkpoints import resolve
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.forecast import as_markdown, forecast
from moe_compress.compression.preflight import bytes_to_write
from moe_compress.recipes.parser import parse
from moe_compress.utils import files
from moe_compress.utils.files import gigabytes
from support.slow import slow_after


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


@pytest.mark.parametrize(
    "sentence", slow_after(1, ["expert_drop keep=6", "expert_drop score=random budget=global seed=1"])
)
def test_the_forecast_comes_true(sentence, reader_folder, options):
    found = moe_compress.plan(sentence, model=reader_folder("mixtral"), **options)
    made = moe_compress.compress(sentence, model=reader_folder("mixtral"), **options)
    assert made.record.sizes["parameters"] == found.after.parameters
    assert made.record.sizes["bytes"] == found.after.bytes
    assert made.record.form == found.form


@pytest.mark.parametrize(
    ("sentence", "model", "note"),
    [
        ("skip share=0.5", "tiny-mixtral", "How many experts are skipped depends on the text"),
        ("expert_drop novice=mean", "tiny-mixtral", "How many tokens meet a mean output depends on the text"),
        ("expert_drop", "tiny-mixtral", ""),
    ],
)
def test_a_forecast_says_what_it_leaves_open(sentence, model, note):
    found = moe_compress.plan(sentence, model=model)
    assert len(found.notes) == (1 if note else 0)
    assert note in as_markdown(found) and "above the bare process" in as_markdown(found)


def test_the_disk_is_asked_for_what_the_forecast_says(tmp_path, monkeypatch):
    one, two = (parse(words) for words in ("expert_drop keep=2", "expert_drop keep=6 + expert_drop keep=2"))
    expected = forecast(one, resolve.config_folder("tiny-mixtral"))
    out = tmp_path / "out"
    assert bytes_to_write(one, expected, out) == expected.after.bytes < expected.before.bytes
    assert bytes_to_write(two, expected, out) == expected.after.bytes + expected.before.bytes
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=expected.after.bytes - 1))
    with pytest.raises(ValueError, match=re.escape(f"needs {gigabytes(expected.after.bytes)}, but")):
        moe_compress.compress("expert_drop keep=2", out=out, results=tmp_path / "runs")
