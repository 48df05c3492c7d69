"""Tables in four formats."""

from __future__ import annotations

import json
import math
import re

import pytest

from moe_compress import api
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.evaluation.speed.columns import timed
from moe_compress.reports import companions, html_report
from moe_compress.reports.reading import failures_of
from moe_compress.reports.record import Failure, Metric
from moe_compress.reports.table import SAME, make_tables, write_tables
from support.records import ORIGINAL, PROTOCOL, SAME_AS, WORSE, record, speed_file


def test_runs_that_did_not_finish_are_rows_of_every_format(tmp_path):
    lost = Failure(name="lost", model="tiny", recipe="prune a=9", reason="no room\non the disk", written="2026-02-01")
    done = Failure(name="worse", model="tiny", recipe="expert_drop keep=6", reason="killed", written="2025-12-31")
    for failure in (lost, done):
        failure.save(tmp_path / "failures")
    for each in (ORIGINAL, WORSE.model_copy(update={"name": "worse-0a1b2c"})):
        each.save(tmp_path / "records")
    (table,) = api.table([tmp_path / "records"])
    assert [failure.name for failure in table.failures] == ["lost"] and len(table.frame) == len(table.rows) == 2
    write_tables([table], tmp_path)
    for file in ("tables.md", "tables.tex", "tiny-012345.csv"):
        text = (tmp_path / file).read_text()
        assert "did not finish: no room on the disk" in text and "killed" not in text
    (values,) = json.loads((tmp_path / "tables.json").read_text())
    assert [each["reason"] for each in values["failures"]] == ["no room\non the disk"]
    path = tmp_path / "failures" / "lost.json"
    path.write_text(path.read_text().replace("prune a=9", "prune a=1"))
    assert "is not a failure of moe-compress: it was changed" in failures_of([tmp_path / "records"])[1][0]


def test_no_detectable_difference_where_the_interval_holds_zero(tmp_path):
    seeds = [record(f"s{n}", 2.0 + n / 1000, [("prune", {"a": 1, "seed": n})], seed=n) for n in range(3)]
    uneven = [record(f"u{n}", 2.0 + n / 50, [("prune", {"a": 2, "seed": n})], seed=n) for n in range(3)]
    unsure = record("unsure", 2.0, [("prune", {"a": 3})])
    unsure.metrics["delta_nll"] = Metric(value=0.0, unit="nats/token")
    (table,) = make_tables([ORIGINAL, WORSE, SAME_AS, *seeds, *uneven, unsure])
    found = dict(zip(table.frame["recipe"], table.frame["change of NLL"], strict=True))
    assert found == {
        "original": "",
        "expert_drop keep=6": "+0.5000 [+0.4900, +0.5100]",
        "quantize bits=100%_&{}": f"+0.0010 [-0.0090, +0.0110] {SAME}",
        "prune a=1 (3 seeds)": f"+0.0010 (+0.0000 to +0.0020) {SAME}",
        "prune a=2 (3 seeds)": "+0.0200 (+0.0000 to +0.0400)",
        "prune a=3": "+0.0000",
    }
    assert list(table.frame["KL"]) == [""] * 6


def test_all_formats_say_the_same(tmp_path):
    other = record("other-protocol", 3.0, protocol={**PROTOCOL, "id": "f" * 16})
    paths = write_tables(make_tables([ORIGINAL, WORSE, SAME_AS, other]), tmp_path)
    names = ["tables.md", "tables.tex", "tables.json", "tiny-012345.csv", "tiny-ffffff.csv"]
    assert [path.name for path in paths] == names and all(path.is_file() for path in paths)
    first, second = json.loads((tmp_path / "tables.json").read_text())
    assert [len(first["rows"]), len(second["rows"])] == [3, 1] and first["protocol"] == PROTOCOL
    row = next(row for row in first["rows"] if row["recipe"] == "expert_drop keep=6")
    (run,) = row["runs"]
    assert run["metrics"]["delta_nll"]["value"] == 0.5 and run["metrics"]["delta_nll"]["unit"] == "nats/token"
    assert run["metrics"]["delta_nll"]["interval"] == list(WORSE.metrics["delta_nll"].interval)
    assert row["sizes"] == WORSE.sizes and row["detectable"] and run["stages"][0]["given"] == {"keep": 6, "seed": 0}
    assert first["rows"][0]["detectable"] is None and "kl" not in run["metrics"]


def test_latex_is_escaped_and_whole(tmp_path):
    odd = record("odd", 3.0, [("[star*", {"x": "a\\b ~^ <>|\nnext"})])
    (table,) = make_tables([ORIGINAL, SAME_AS, odd])
    text = table.latex()
    assert r"quantize bits=100\%\_\&\{\}" in text
    assert r"{}[star* x=a\textbackslash{}b \textasciitilde{}\textasciicircum{} \textless{}\textgreater{}" in text
    body = text.split(r"\endfoot")[1].split(r"\end{longtable}")[0].strip().splitlines()
    assert len(body) == 3 and all(line.endswith(r" \\") for line in body)
    columns = re.search(r"linewidth}([lr]+)}", text)[1]
    bare = [re.sub(r"\\.", "", line.removesuffix(r" \\")) for line in body]
    assert {line.count("&") for line in bare} == {len(columns)}
    for line in bare:
        assert not set(line) & set("%$#_~^") and line.count("{") == line.count("}")


def test_two_models_of_one_name_have_a_file_each(tmp_path):
    other = record("tiny-original-2", 2.0, base={"commit": None, "fingerprint": "other"})
    paths = write_tables(make_tables([ORIGINAL, other]), tmp_path)
    assert [path.name for path in paths[3:]] == ["tiny-012345.csv", "tiny-012345-2.csv"]


def test_what_is_not_measured_is_an_empty_cell():
    bare = record("bare", 2.0, [("prune", {})], metrics={}, sizes={"parameters": 1e6, "bytes": 1.0})
    (table,) = make_tables([ORIGINAL, bare])
    row = table.frame.iloc[1]
    assert row["perplexity"] == row["change of NLL"] == row["MFLOPs per token"] == "" and row["parameters"] == "1.00 M"


def test_a_wrecked_model_has_a_row_and_no_point(tmp_path):
    perplexity = Metric(value=math.inf, unit="perplexity", interval=(1e300, math.inf))
    wrecked = WORSE.model_copy(update={"metrics": {"perplexity": perplexity}})
    for each in (ORIGINAL, SAME_AS, wrecked):
        each.save(tmp_path / "records")
    made = html_report.make_report([tmp_path / "records"], tmp_path / "out", report_columns())
    assert made.skipped == [] and "inf" in made.files[0].read_text()


@pytest.mark.parametrize(
    "harm",
    [
        lambda found: found.update(model=5),
        lambda found: found["found"]["points"][0].update(batch=[1]),
        lambda found: found["found"]["points"][0]["decode"].update(speedup_interval=[2, 1]),
        lambda found: found["found"]["points"][0]["decode"].update(speedup=-1.0, speedup_interval=[-2, 1]),
        lambda found: found["found"]["points"][0]["prefill"].update(speedup=float("nan")),
        lambda found: found.pop("fingerprint"),
    ],
)
def test_a_broken_speed_file_is_named_and_left_out(harm, tmp_path):
    found = speed_file("worse", 2.0)
    harm(found)
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(found))
    good, wrong = companions.read_json([path], timed, "speed")
    assert good == [] and "speed.json is no speed file of moe-compress" in wrong[0]


def test_names_cannot_break_a_table_nor_leave_the_folder(tmp_path):
    odd = record("odd", 2.5, [("prune", {"x": "a|b\nnew"})])
    (table,) = make_tables([ORIGINAL, odd])
    body = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(body) == 4 and all(len(re.findall(r"(?<!\\)\|", line)) == len(table.frame.columns) + 1 for line in body)
    elsewhere = [each.model_copy(update={"model": "../../evil\nname"}) for each in (ORIGINAL, odd)]
    for path in write_tables(make_tables(elsewhere), tmp_path / "out"):
        assert path.parent == tmp_path / "out" and path.is_file() and "\n" not in path.name
    several = [ORIGINAL.model_copy(update={"base": {"fingerprint": f"{n}", "commit": None}}) for n in range(4)]
    assert len({path.name for path in write_tables(make_tables(several), tmp_path / "several")}) == 7


def test_a_table_names_only_the_settings_of_its_own_rows(tmp_path):
    for made in (ORIGINAL, WORSE, *(each.model_copy(update={"model": "other"}) for each in (ORIGINAL, SAME_AS))):
        renamed = made.model_copy(update={"name": f"{made.model}-{made.name}", "digest": None})
        renamed.save(tmp_path / "records")
    (tmp_path / "speed").mkdir()
    timing = {**speed_file("tiny-worse", 2.0), "fingerprint": "of worse"}
    (tmp_path / "speed" / "worse.json").write_text(json.dumps(timing))
    text = api.report([tmp_path / "records"], tmp_path / "out")[0].read_text()
    other, tiny = text.split('id="table-1"')
    assert "abacus" in tiny and "prefill x" in tiny and "speed: 1 x 16 tokens" in text
    assert text.count("speed: 1 x 16 tokens") == 1 and "prefill x" not in other
    assert "larger models before smaller ones" in text


def test_what_was_measured_on_several_texts_is_below_where_rows_are_columns():
    extra = {
        "perplexity_b.txt": Metric(value=8.0, unit="perplexity", interval=(7.5, 8.5)),
        "delta_nll_b.txt": Metric(value=0.25, unit="nats/token", interval=(0.2, 0.3)),
        "delta_nll_c.txt": Metric(value=-0.05, unit="nats/token", interval=(-0.2, 0.3)),
    }
    several = WORSE.model_copy(update={"metrics": {**WORSE.metrics, **extra}})
    (table,) = make_tables([ORIGINAL, several])
    assert table.turned.rows[-2:] == [
        ["change of NLL, b.txt", "", "+0.2500 [+0.2000, +0.3000]"],
        ["change of NLL, c.txt", "", f"-0.0500 [-0.2000, +0.3000] {SAME}"],
    ]
    assert "b.txt" in table.markdown(turned=True) and "b.txt" not in table.markdown()
