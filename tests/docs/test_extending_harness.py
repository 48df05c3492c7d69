"""docs/extending/harness.md: its example is a harness like any other."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress import api
from moe_compress.evaluation import harnesses
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.reports import companions
from moe_compress.reports.reading import gather
from moe_compress.utils.declarations import declarations
from support.pages import DOCS, ROOT, blocks, commands, examples, require_command

TEXT = (DOCS / "extending" / "harness.md").read_text(encoding="utf-8")


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    """The page's files in the package, and the table of harnesses read anew, as it is at import."""
    name = in_package("harness")
    found = declarations(harnesses.PACKAGE, "harness")
    harnesses.HARNESSES.update({each.positional[0]: harnesses._harness(each) for each in found})
    return name


@pytest.fixture
def pruned(lab) -> tuple[Path, dict[str, object]]:
    given = {**lab("mixtral"), "eval": True}
    result = moe_compress.compress("prune method=magnitude sparsity=0.5", **given)
    assert result.folder is not None
    return result.folder, given


def test_its_words_are_checked_before_it_is_imported(example):
    for words in commands(TEXT):
        require_command(words[2:])
    harness = harnesses.HARNESSES["zeros"]
    assert harness.typed({"smallest": "1e-4", "original": "none"}) == {"smallest": 1e-4, "original": None}
    for words, said in (({"smalest": "1"}, "zeros has no option 'smalest'"), ({"smallest": "a"}, "a number is needed")):
        with pytest.raises(ValueError, match=said):
            harness.typed(words)
    assert example not in sys.modules


def test_it_counts_zeros_and_keeps_its_report(example, pruned, tmp_path):
    folder, given = pruned
    report = api.zeros(folder, results=str(tmp_path))
    model = moe_compress.load(str(folder))
    for layer, share in zip(model.model.layers, report.after, strict=True):
        weights = [weight for weight in layer.parameters() if weight.dim() > 1]
        zero = sum(int((weight == 0).sum()) for weight in weights)
        assert share == pytest.approx(zero / sum(weight.numel() for weight in weights)) and share > 0.3
    assert report.before == [0.0] * len(report.after) and report.original == Path(str(given["model"])).name
    (file,) = (tmp_path / "zeros").glob("*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["after"] == report.after and "digest" in kept and file.stem == f"{folder.name}-{report.id[:6]}"
    assert re.findall(r"0\.0%", report.markdown()) == ["0.0%"] * len(report.before)
    with pytest.raises(ValueError, match="smallest=-1"):
        api.zeros(folder, smallest=-1, results=str(tmp_path))


def test_the_page_shows_its_column(example, pruned):
    folder, given = pruned
    place = Path(str(given["results"]))
    report = harnesses.HARNESSES["zeros"].run(folder, results=str(place))
    columns = harnesses.report_columns()["zeros"]
    found, problems = companions.read_json((place / "zeros").glob("*.json"), columns.read, "zeros")
    assert not problems
    joined = columns.join([each for one in found for each in one], gather(place / "records")[0])
    (values,) = joined.by_record.values()
    assert values["zeros"].value == pytest.approx(sum(report.after) / len(report.after))
    assert joined.how == "weights of at most 0.0"
    page = moe_compress.report(place / "records", out=place / "page")[0].read_text(encoding="utf-8")
    assert re.search(r"<th[^>]*>\s*(<\w+[^>]*>\s*)*zeros", page)


def test_the_command_is_there_once_the_file_is(tmp_path):
    """As a newcomer adds it: a file in the tree, nothing else."""
    source = tmp_path / "src"
    subprocess.run(["cp", "-rs", str(ROOT / "src"), str(source)], check=True)
    for path, code in zip(examples(TEXT), blocks(TEXT, "python"), strict=True):
        (tmp_path / path).write_text(code, encoding="utf-8")
    shown = {}
    for words in (["--help"], ["zeros", "--help"], ["zeros", "tiny-mixtral", "smalest=1"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moe_compress", *words],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        shown[" ".join(words)] = done.stdout + done.stderr
    assert "Count the weights that are zero" in shown["--help"]
    assert "smallest=0.0" in shown["zeros --help"] and "count as zero" in shown["zeros --help"]
    assert "zeros has no option 'smalest'" in shown["zeros tiny-mixtral smalest=1"]
    shutil.rmtree(source)


def test_outside_the_package_it_is_registered_by_its_import(elsewhere, pruned, tmp_path, monkeypatch):
    folder, _ = pruned
    monkeypatch.setattr(harnesses, "HARNESSES", dict(harnesses.HARNESSES))
    module = elsewhere("harness", "my_harness")
    report = module.zeros(folder, results=tmp_path)
    assert [*(tmp_path / "zeros").glob("*.json")] and torch.tensor(report.after).gt(0).all()
    with pytest.raises(ValueError, match="zeros has no option 'nope'"):
        module.zeros(folder, nope=1)


def test_the_tables_name_every_argument():
    rows = re.findall(r"^\| (the name|`\w+(?:\(\))?`) \|", TEXT, re.MULTILINE)
    assert set(inspect.signature(harnesses.harness).parameters) - {"name"} <= {row.strip("`") for row in rows}
    members = {name for name in (*SavedReport.__annotations__, *vars(SavedReport)) if not name.startswith("_")}
    assert members - {"save"} == {row.strip("`()") for row in rows} & members
