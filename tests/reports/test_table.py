"""Tables in four formats, digests, fronts with known answers, the page in a browser, model cards."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from moe_compress import api
from moe_compress.hub.card import licence_of, model_card
from moe_compress.reports import charts, companions, html_report, pareto, svg
from moe_compress.reports.reading import failures_beside, gather, load_records, read_records
from moe_compress.reports.record import Failure, Metric, Record, digest_of
from moe_compress.reports.table import SAME, make_tables, write_tables

HOSTILE = '<script>document.title = "owned"</script><img src="https://example.org/x.png" onerror="boom()">'
DOCUMENTS, TOKENS = 60, 100.0
PROTOCOL = {
    "id": "0123456789abcdef",
    "text": {"source": "zoo", "tokens": 6000, "windows": 60, "length": 101},
    "dtype": "float32",
    "device": "cpu",
}


def record(name: str, nll: float, stages: list[tuple[str, dict]] = (), **changes) -> Record:
    """A run whose mean loss is `nll`, or what `changes` say instead."""
    delta = Metric(value=nll - 2, unit="nats/token", interval=(nll - 2.01, nll - 1.99))
    perplexity = Metric(value=math.exp(nll), unit="perplexity", interval=(math.exp(nll) - 0.1, math.exp(nll) + 0.1))
    values = {
        "name": name,
        "model": "tiny",
        "base": {"commit": None, "fingerprint": "abc"},
        "recipe": [{"method": m, "given": given, "parameters": {**given, "unsaid": 1}} for m, given in stages],
        "seed": 0,
        "form": "plain" if stages else "original",
        "protocol": PROTOCOL,
        "metrics": {"perplexity": perplexity, **({"delta_nll": delta} if stages else {})},
        "sizes": {"parameters": 2e6, "bytes": 4 * 2**20, "touched": 1e6, "flops_per_token": 2e6},
        "cost": {},
        "report": [],
        "environment": {"python": "3.11"},
        "written": "2026-01-01T00:00:00+00:00",
    }
    return Record(**{**values, **changes})


def sized(mib: float, flops: float = 2e6) -> dict[str, dict[str, float]]:
    return {"sizes": {"parameters": 1e6, "bytes": mib * 2**20, "touched": 1e6, "flops_per_token": flops}}


ORIGINAL = record("tiny-original", 2.0)
WORSE = record("worse", 2.5, [("expert_drop", {"keep": 6, "seed": 0})], **sized(3))
SAME_AS = record("same_as", 2.001, [("quantize", {"bits": "100%_&{}"})], **sized(2, 3e6))


# --- failures -----------------------------------------------------------------------------------------------------


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
    assert "is not a failure of moe-compress: it was changed" in failures_beside([tmp_path / "records"])[1][0]


# --- formats ------------------------------------------------------------------------------------------------------


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


# --- records ------------------------------------------------------------------------------------------------------


def test_a_changed_record_is_named_and_the_others_are_read(tmp_path):
    for each in (ORIGINAL, WORSE, SAME_AS):
        each.save(tmp_path)
    values = json.loads((tmp_path / "worse.json").read_text())
    assert values["digest"] == digest_of(values) and load_records([tmp_path / "worse.json"])[0].metrics == WORSE.metrics
    (tmp_path / "worse.json").write_text(json.dumps(values, sort_keys=True))  # other spaces, another order
    assert len(gather([tmp_path])[0]) == 3
    values["metrics"]["perplexity"]["value"] = 1.0
    (tmp_path / "worse.json").write_text(json.dumps(values))
    (tmp_path / "torn.json").write_text('{"version": 1, "na')
    good, problems = gather([tmp_path])
    assert {each.name for each in good} == {"tiny-original", "same_as"}
    assert len(problems) == 2 and "torn.json" in problems[0] and "worse.json" in problems[1]
    assert "it was changed after it was written" in problems[1]
    with pytest.raises(ValueError, match=r"worse\.json is not a record of moe-compress: it was changed"):
        load_records([tmp_path / "worse.json"])


def test_records_older_than_the_digest_are_read(tmp_path):
    path = ORIGINAL.save(tmp_path)
    values = json.loads(path.read_text())
    del values["digest"]
    path.write_text(json.dumps(values))
    assert "changed after it was written" in read_records([path])[1][0]
    values["version"] = 1
    path.write_text(json.dumps(values))
    assert read_records([path])[0][0].digest is None
    del values["protocol"]["id"]
    path.write_text(json.dumps(values))
    assert "protocol.id: Field required" in read_records([path])[1][0]


def test_a_record_read_and_saved_again_keeps_its_digest(tmp_path):
    first = ORIGINAL.save(tmp_path).read_bytes()
    (again,) = load_records([tmp_path / "tiny-original.json"])
    assert again.save(tmp_path).read_bytes() == first


CALIBRATED = {"calibration_seconds": 1.0, "surgery_seconds": 1.0, "peak_bytes": 1}
MALFORMED = [
    (lambda r: r["protocol"]["text"].pop("tokens"), "protocol.text.tokens: Field required"),
    (lambda r: r["protocol"].update(text="zoo"), "protocol.text: Input should be"),
    (lambda r: r["recipe"][0].pop("given"), "recipe.0.given: Field required"),
    (lambda r: r["recipe"][0].pop("parameters"), "recipe.0.parameters: Field required"),
    (lambda r: r.update(cost={"peak_bytes": 1}), "cost.calibration_seconds: Field required"),
    (lambda r: r.update(report=[{"calibration": "none"}]), "report.0.calibration: Input should be"),
    (lambda r: r["metrics"]["perplexity"].update(value=float("nan")), "metrics.perplexity: .*is no number"),
    (lambda r: r["metrics"]["perplexity"].update(interval=[15, 12]), "ends before it begins"),
    (lambda r: r["sizes"].update(bytes=float("inf")), "sizes.bytes: Input should be a finite number"),
]


@pytest.mark.parametrize(("harm", "said"), MALFORMED)
def test_a_malformed_record_among_good_ones_is_named_and_left_out(harm, said, tmp_path):
    """Even where its digest fits, as another program may have written it."""
    ORIGINAL.save(tmp_path / "records")
    path = WORSE.model_copy(update={"cost": CALIBRATED}).save(tmp_path / "records")
    values = json.loads(path.read_text())
    harm(values)
    path.write_text(json.dumps({**values, "digest": digest_of(values)}))
    assert re.search(said, read_records([path])[1][0])
    made = html_report.make_report([tmp_path / "records"], tmp_path / "out")
    assert len(made.skipped) == 1 and "worse.json" in made.skipped[0]
    assert len(api.table([tmp_path / "records"])[0].rows) == 1


def test_a_wrecked_model_has_a_row_and_no_point(tmp_path):
    perplexity = Metric(value=math.inf, unit="perplexity", interval=(1e300, math.inf))
    wrecked = WORSE.model_copy(update={"metrics": {"perplexity": perplexity}})
    for each in (ORIGINAL, SAME_AS, wrecked):
        each.save(tmp_path / "records")
    made = html_report.make_report([tmp_path / "records"], tmp_path / "out")
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
    good, wrong = companions.read_json([path], companions.timed, "speed")
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


# --- fronts -------------------------------------------------------------------------------------------------------


def dominated(cost: np.ndarray, value: np.ndarray) -> list[bool]:
    pairs = list(zip(cost.tolist(), value.tolist(), strict=True))
    return [any(a <= c and b <= v and (a, b) != (c, v) for a, b in pairs) for c, v in pairs]


def test_membership_is_what_the_definition_says():
    rng = np.random.default_rng(0)
    # Few distinct numbers, so that there are ties in one, and in both.
    costs, values = rng.integers(0, 5, (2, 300, 8)).astype(float)
    found = pareto.on_front(costs, values)
    for at in range(300):
        assert found[at].tolist() == [not each for each in dominated(costs[at], values[at])]
    assert np.array_equal(pareto.on_front(costs[0], values)[7], pareto.on_front(costs[0], values[7]))


def measured(folder: Path, made: Record, nll: np.ndarray, tokens: np.ndarray | None = None) -> Record:
    """The record with sums per document beside it, and the perplexity that they have."""
    tokens = np.full(DOCUMENTS, TOKENS) if tokens is None else tokens
    folder.mkdir(exist_ok=True)
    save_file({"nll": nll, "tokens": tokens}, folder / f"{made.name}.safetensors")
    value = math.exp(nll.sum() / tokens.sum())
    perplexity = Metric(value=value, unit="perplexity", interval=(0.9 * value, value / 0.9))
    return made.model_copy(update={"metrics": {**made.metrics, "perplexity": perplexity}})


def test_shares_are_known_for_known_cases(tmp_path):
    """One document set for all: worse everywhere is never on the front, cheaper is always, equals share it."""
    rng = np.random.default_rng(1)
    text = rng.normal(200, 60, DOCUMENTS)  # much larger than what tells the models apart
    noise = rng.normal(0, 1, DOCUMENTS // 2)
    noise = np.concatenate([noise, -noise])
    cases = {
        "original": (4, text),
        "worse": (4, text + 1),  # dominated in every draw
        "cheap": (1, text + 50),  # nothing is as cheap
        "one": (3, text + 0.5 + noise),  # these two are equal in the mean, and cost the same
        "two": (3, text + 0.5 - noise),
    }
    rows = []
    for name, (mib, nll) in cases.items():
        stages = [] if name == "original" else [("prune", {"a": name})]
        rows.append([measured(tmp_path, record(name, 2.0, stages, **sized(mib)), nll)])
    front = pareto.make_fronts(list(cases), rows, [tmp_path])[0]
    assert front.key == "bytes" and not any("no sums" in note for note in front.notes)
    found = {point.name: point for point in front.points}
    assert found["worse"].share == 0.0 and not found["worse"].front
    assert found["cheap"].share == 1.0 and found["original"].share > 0.9
    assert found["one"].share == pytest.approx(0.5, abs=0.02) and found["one"].share + found["two"].share >= 1.0
    # Paired: only what tells a model from the original is in its interval.
    low, high = found["worse"].interval
    ratio = math.exp(1 / TOKENS) * found["original"].perplexity
    assert low == pytest.approx(ratio, rel=1e-9) and high == pytest.approx(ratio, rel=1e-9)
    assert found["original"].interval == pytest.approx((found["original"].perplexity,) * 2)


def test_identical_models_do_not_dominate_each_other(tmp_path):
    nll = np.linspace(100, 300, DOCUMENTS)
    rows = [[measured(tmp_path, record(name, 2.0, [("prune", {"a": name})]), nll)] for name in ("a", "b")]
    assert [point.share for point in pareto.make_fronts(["a", "b"], rows, [tmp_path])[0].points] == [1.0, 1.0]


def test_the_interval_of_drawn_perplexities_covers(tmp_path):
    """Of many texts drawn from one source, about 95 % have the source's perplexity in their interval."""
    rng, inside = np.random.default_rng(2), 0
    for number in range(200):
        row = [measured(tmp_path, record(f"text{number}", 2.0), rng.normal(200, 30, DOCUMENTS))]
        values_B = pareto.draw([row], [tmp_path], draws=1000).values_BR[:, 0]
        low, high = np.percentile(values_B, pareto.TAILS)
        inside += low <= math.exp(2.0) <= high
    assert 0.89 <= inside / 200 <= 0.99


@pytest.mark.parametrize("what", ["missing", "torn", "of another run", "of another text"])
def test_without_sums_per_document_the_interval_is_drawn_from(what, tmp_path):
    first = measured(tmp_path, ORIGINAL, np.full(DOCUMENTS, 200.0))
    other = record("worse", 2.1, [("prune", {})], **sized(3))
    path = tmp_path / "worse.safetensors"
    if what == "torn":
        path.write_bytes(b"no tensors")
    if what == "of another run":
        measured(tmp_path, other, np.full(DOCUMENTS, 250.0))
    if what == "of another text":
        other = measured(tmp_path, other, np.full(30, 210.0), np.full(30, TOKENS))
    front = pareto.make_fronts(["original", "worse"], [[first], [other]], [tmp_path / "none", tmp_path])[0]
    assert any(note.startswith("1 of these rows have no sums per document") for note in front.notes)
    (point,) = [point for point in front.points if point.name == "worse"]
    low, high = other.metrics["perplexity"].interval
    assert point.interval == pytest.approx((low, high), rel=0.01)


def test_several_seeds_are_one_point_and_are_drawn_too(tmp_path):
    seeds = [measured(tmp_path, record(f"s{n}", 2.0), np.full(DOCUMENTS, 200.0 + n)) for n in range(2)]
    drawn = pareto.draw([seeds], [tmp_path])
    one, other = math.exp(2.0), math.exp(2.01)
    assert drawn.perplexity_R == pytest.approx([(one + other) / 2])
    found, counts = np.unique(drawn.values_BR.round(9), return_counts=True)
    assert found == pytest.approx([one, (one + other) / 2, other], abs=1e-8)
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def speed_file(model: str, speedup: float, batch: int = 1, busy: bool = False, processor: str = "abacus") -> dict:
    decode = {"speedup": speedup, "speedup_interval": [speedup - 0.1, speedup + 0.1]}
    setting = {"dtype": "float32", "device": "cpu", "threads": 1, "tokens": 16}
    points = [{"batch": batch, "prompt": 128, "prefill": decode, "decode": decode}]
    found = {"setting": setting, "machine": {"busy": busy}, "points": points, "original": {"gpu": None, "threads": 1}}
    where = {"processor": processor}
    return {"model": model, "original": "tiny", "fingerprint": f"of {model}", "environment": where, "found": found}


def test_latency_is_relative_to_the_original_and_of_one_setting():
    rows = [[ORIGINAL], [WORSE], [SAME_AS]]
    files = [speed_file("worse", 2.0, busy=True), speed_file("same_as", 1.25), speed_file("same_as", 9.0, batch=8)]
    files.append(speed_file("same_as", 5.0, processor="another"))
    timed = companions.speedups([each for file in files for each in companions.timed(file)], [ORIGINAL, WORSE, SAME_AS])
    values = {name: found[companions.LATENCY].value for name, found in timed.by_record.items()}
    assert values == {"worse": 0.5, "same_as": 0.8}
    for words in ("float32 on cpu (abacus), 1 thread(s)", "BUSY for 1", "in other settings: 2", "2 of too few starts"):
        assert words in timed.how
    front = pareto.make_fronts(["original", "worse", "same_as"], rows, (), timed)[-1]
    assert front.key == companions.LATENCY and [point.name for point in front.points] == [
        "worse",
        "same_as",
        "original",
    ]
    assert front.points[0].cost_interval == pytest.approx((1 / 2.1, 1 / 1.9))
    assert [front.key for front in pareto.make_fronts(["a", "b", "c"], rows)] == ["bytes", "flops_per_token"]
    (timing, *_) = companions.timed(speed_file("worse", 2.0))
    renamed = {"name": "mine", "fingerprint": "of worse"}
    for changes, same in (({"name": "worse-0a1b2c"}, True), ({"name": "worse-and-more"}, False), (renamed, True)):
        assert companions.made(timing, WORSE.model_copy(update=changes)) == same
    assert not companions.made(timing, WORSE.model_copy(update={"fingerprint": "of another"}))


def tasks_file(model: str, right: float) -> dict:
    tasks = {"quiz": {"before": {"value": 0.9, "interval": None, "unit": "fraction"}}}
    tasks["quiz"]["after"] = {"value": right, "interval": (right - 0.1, right + 0.1), "unit": "fraction"}
    common = {"original": "tiny", "fingerprint": f"of {model}", "average": None, "settings": {"limit": 5}}
    return {"model": model, "tasks": tasks, **common}


def test_answers_to_the_same_tasks_are_joined():
    files = [
        tasks_file("worse", 0.5),
        tasks_file("same_as", 0.8),
        {**tasks_file("worse", 0.1), "settings": {"limit": 9}},
    ]
    found = companions.accuracies([each for file in files for each in companions.asked(file)], [WORSE, SAME_AS])
    assert {name: values["quiz right"].value for name, values in found.by_record.items()} == {
        "worse": 0.5,
        "same_as": 0.8,
    }
    assert found.how == "quiz, limit=5; not shown, as measured in other settings: 1" and companions.accuracies(
        [], [WORSE]
    ) == companions.JoinedColumns({}, "")


def test_the_originals_answers_are_those_that_its_variants_were_beside():
    file = {**tasks_file("worse", 0.5), "original_fingerprint": "of original"}
    original = ORIGINAL.model_copy(update={"fingerprint": "of original"})
    for base, known in ((original, True), (original.model_copy(update={"fingerprint": "another"}), False)):
        found = companions.accuracies(companions.asked(file), [base, WORSE]).by_record
        assert ("tiny-original" in found) == known and found["worse"]["quiz right"].value == 0.5
    assert (
        companions.accuracies(companions.asked(file), [original]).by_record["tiny-original"]["quiz right"].value == 0.9
    )


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_of_what_is_by_layer_and_the_rest_as_text():
    entry = {
        "method": "prune",
        "tokens": {"0": [1, 2, None], "1": [3, 4]},
        "sparsity_by_layer": {"0": 0.5, "1": 0.25},
        "allocated": {"0": {"up": [2, 3], "down": [4, 4]}, "1": {"up": [2, 2]}},
        "bits": {"experts": 4.0},
        "unseen": {"0": [3]},
        "skipped": [],
    }
    found, rest = charts.of_report(entry)
    assert [(picture["kind"], picture["title"]) for picture in found] == [
        ("heat", "calibration tokens"),
        ("bars", "share of zeros"),
        ("heat", "what each expert was given: up"),
        ("heat", "what each expert was given: down"),
    ]
    assert rest == {"method": "prune", "bits": {"experts": 4.0}, "unseen": {"0": [3]}}
    assert [bar["height"] for bar in found[1]["bars"]] == [svg.BAR_HEIGHT, svg.BAR_HEIGHT / 2]


def test_axes_are_monotone_and_ticks_lie_on_them():
    for axis in (svg.axis([3, 5.5, 9], 0, 100), svg.Axis(12.3, 27, 300, 10, root=True)):
        pixels = [axis(value) for value in np.linspace(axis.low, axis.high, 9)]
        assert pixels == sorted(pixels, reverse=axis.end < axis.start)
        assert (pixels[0], pixels[-1]) == (axis.start, axis.end)
        assert len(axis.ticks()) > 3 and all(axis(float(label)) == at for at, label in axis.ticks())
    assert svg.axis([2.0, 2.0], 0, 100)(2.0) == 50 and svg.axis([], 0, 1).ticks()


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with everything that a page shows, some of it hostile, some of it broken."""
    folder, rng = tmp_path / "results", np.random.default_rng(0)
    folder.mkdir()
    report = [{"method": "prune", "sparsity_by_layer": {"0": 0.5}, "tokens": {"0": [1, 2]}, "note": HOSTILE}]
    text = rng.normal(200, 30, DOCUMENTS)
    rows = [
        (ORIGINAL, 0),
        (WORSE, 50),
        (SAME_AS, 0.1),
        (record("hostile", 2.2, [("prune", {"x": HOSTILE})], report=report, **sized(1)), 20),
    ]
    for made, worse in rows:
        measured(folder / "documents", made, text + worse).save(folder / "records")
    reason = f"out of memory {HOSTILE}"
    common = {"recipe": "prune sparsity=0.9", "written": "2026-01-02T00:00:00+00:00", "reason": reason}
    Failure(name="gone", model="tiny", **common).save(folder / "failures")
    Failure(name="homeless", model="huge", **common).save(folder / "failures")
    Failure(name="worse", model="tiny", **{**common, "written": "2025"}).save(folder / "failures")
    (folder / "speed").mkdir()
    (folder / "speed" / "worse.json").write_text(json.dumps(speed_file("worse", 2.0)))
    (folder / "speed" / "broken.json").write_text("{}")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "worse.json").write_text(json.dumps(tasks_file("worse", 0.5)))
    layers = {"0": {name: {"value": 0.5, "interval": [0.4, 0.6]} for name in ("overlap", "flips", "kl")}}
    routing = {"model": "worse", "original": "tiny", **{way: {"layers": layers} for way in charts.WAYS}}
    (folder / "routing").mkdir()
    (folder / "routing" / "worse.json").write_text(json.dumps(routing))
    (folder / "records" / "broken.json").write_text("{")
    return folder


def test_the_page_says_everything_and_runs_nothing_of_what_it_says(results, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "moe_compress")
    logging.getLogger("moe_compress").propagate = True
    made = html_report.make_report([results / "records"], tmp_path / "out")
    assert len(made.skipped) == 2 and all("broken.json" in sentence for sentence in made.skipped)
    assert "broken.json" in caplog.text
    names = {path.name for path in made.files}
    plots = {f"tiny-012345-{key}.{kind}" for key in ("bytes", "flops_per_token", "latency") for kind in ("png", "svg")}
    assert names == {"report.html"} | plots
    text = made.files[0].read_text()
    assert "&lt;script&gt;document.title" in text and "<script>document.title" not in text and "<img" not in text
    assert text.count("<script>") == 1 and 'src="' not in text and 'href="http' not in text and "@import" not in text
    assert text.count('class="failed"') == 2 and "out of memory" in text and "Models without a table" in text
    assert "&#34;unsaid&#34;: 1" in text and "Routing of worse beside tiny" in text and "on front: latency" in text
    assert "quiz right" in text and "0.500 [0.400, 0.600]" in text and "prefill x" in text
    assert SAME in text and "share of zeros" in text and "prefers-color-scheme: dark" in text
    again = html_report.report([results / "records"], tmp_path / "again")
    for first, second in zip(made.files[1:], again[1:], strict=True):
        assert first.suffix == ".png" or first.read_bytes() == second.read_bytes()


def test_a_table_names_only_the_settings_of_its_own_rows(tmp_path):
    for made in (ORIGINAL, WORSE, *(each.model_copy(update={"model": "other"}) for each in (ORIGINAL, SAME_AS))):
        renamed = made.model_copy(update={"name": f"{made.model}-{made.name}", "digest": None})
        renamed.save(tmp_path / "records")
    (tmp_path / "speed").mkdir()
    timing = {**speed_file("tiny-worse", 2.0), "fingerprint": "of worse"}
    (tmp_path / "speed" / "worse.json").write_text(json.dumps(timing))
    text = html_report.report([tmp_path / "records"], tmp_path / "out")[0].read_text()
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
    assert list(table.turned.index[-2:]) == ["change of NLL, b.txt", "change of NLL, c.txt"]
    assert list(table.turned.loc["change of NLL, b.txt"]) == ["", "+0.2500 [+0.2000, +0.3000]"]
    assert list(table.turned.loc["change of NLL, c.txt"]) == ["", f"-0.0500 [-0.2000, +0.3000] {SAME}"]
    assert "b.txt" in table.markdown(turned=True) and "b.txt" not in table.markdown()


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no record or folder of records"):
        html_report.report([tmp_path / "none"], tmp_path)
    with pytest.raises(ValueError, match="there are no records"):
        html_report.report([tmp_path], tmp_path)
    (tmp_path / "only.json").write_text("[]")
    with pytest.raises(ValueError, match=r"only\.json is not a record"):
        html_report.report([tmp_path], tmp_path)
    ORIGINAL.save(tmp_path / "records")
    with pytest.raises(ValueError, match=r"out=.*: nothing can be written"):
        html_report.report([tmp_path / "records"], tmp_path / "only.json" / "below")


# What a person would do, and what came of it, written into the page for --dump-dom.
EARLY = "<script>window.wrong = []; addEventListener('error', (event) => wrong.push(event.message), true);</script>"
CLICKS = """<script>
const table = document.querySelector("table.sortable");
const heads = [...table.querySelectorAll("thead button")];
const column = (title) => heads.findIndex((head) => head.textContent === title);
const text = (body, title) => body.className || body.rows[0].cells[column(title)].textContent.trim();
const cells = (title) => [...table.tBodies].map((body) => text(body, title));
const click = (title) => { heads[column(title)].click(); return cells(title); };
const first = table.tBodies[0];
const opened = () => [first.rows[1].hidden, first.querySelector(".open").getAttribute("aria-expanded")];
const found = { up: click("MiB"), down: click("MiB"), words: click("recipe"), change: click("change of NLL") };
found.before = opened();
first.querySelector(".open").click();
found.after = opened();
location.hash = "#" + table.tBodies[1].id;
addEventListener("hashchange", () => {
  found.followed = !table.tBodies[1].rows[1].hidden;
  found.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.title = document.title;
  found.wrong = wrong;
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = encodeURIComponent(JSON.stringify(found));
  document.body.append(probe);
});
</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_the_page_in_a_browser(results, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, so the page's script is not run")
    (page, *_) = html_report.report([results / "records"], tmp_path / "out")
    text = page.read_text().replace("<head>", f"<head>{EARLY}").replace("</body>", f"{CLICKS}</body>")
    page.write_text(text)
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    probe = re.search(r'<pre id="probe">([^<]*)</pre>', done.stdout)
    assert probe is not None, done.stderr[-2000:]
    found = json.loads(unquote(probe[1]))
    assert found["up"] == ["1.00", "2.00", "3.00", "4.00", "failed"]
    assert found["down"] == ["4.00", "3.00", "2.00", "1.00", "failed"]
    assert [word.split(" ")[0] for word in found["words"][:4]] == ["expert_drop", "original", "prune", "quantize"]
    assert found["change"][0].startswith("+0.0010") and found["change"][3] == ""  # empty ones last
    assert found["before"] == [True, "false"] and found["after"] == [False, "true"] and found["followed"]
    assert found["fetched"] == [] and found["wrong"] == [] and found["title"].startswith("moe-compress")
    assert "CONSOLE" not in done.stderr


# --- model cards --------------------------------------------------------------------------------------------------

MANIFEST = {
    "identity": "1d",
    "base": {"model": "/home/me/secret/Base-8x7B", "commit": None, "fingerprint": "f0"},
    "form": "plain",
    "stages": [{"method": "expert_drop", "given": {"keep": 6}, "parameters": {}}],
    "report": [{"method": "expert_drop", "calibration": {"hash": "ca11"}}, {"method": "x", "calibration": {}}],
}
ON_HUB = {**MANIFEST, "base": {"model": "org/Base-8x7B", "commit": "c0", "fingerprint": "f0"}, "form": "edited"}
QUANTIZED = {**ON_HUB, "stages": [{"method": "quantize", "given": {}, "parameters": {}}]}


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_of_a_plain_checkpoint():
    card = model_card(MANIFEST, SAME_AS, ORIGINAL, name="mine")
    assert head_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe-compress", "expert_drop"],
    }
    assert "secret" not in card and "`Base-8x7B`" in card and "    expert_drop keep=6" in card
    assert 'AutoModelForCausalLM.from_pretrained("mine")' in card.replace("'", '"') and "trust_remote_code" not in card
    assert f"+0.0010 [-0.0090, +0.0110], {SAME}" in card and "| bytes of weights | 2,097,152 | 4,194,304 |" in card
    for known in ("`1d`", "`f0`", "`ca11`"):
        assert known in card
    assert "does not say here what it is" in card
    change = Metric(value=0.01, unit="nats/token", interval=(-0.01, 0.03))
    several = SAME_AS.model_copy(update={"metrics": {**SAME_AS.metrics, "delta_nll_b.txt": change}})
    card = model_card(MANIFEST, several, ORIGINAL, name="mine")
    assert f"| delta_nll_b.txt | +0.0100 [-0.0100, +0.0300], {SAME} |" in card


def test_a_card_of_an_edited_and_packed_one():
    base_card = "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\ntags: [a]\n---\n# Base\n"
    card = model_card(QUANTIZED, name="org/mine", packed=True, base_card=base_card)
    head = head_of(card)
    assert head["base_model"] == "org/Base-8x7B" and head["base_model_relation"] == "quantized"
    assert head["license_name"] == "llama" and "custom_code" in head["tags"]
    assert "trust_remote_code=True" in card and "moe_compress.load" in card and "packed" in card
    assert "What it cost" not in card and "commit of the original: `c0`" in card and "`org/Base-8x7B`: llama" in card
    assert "base_model_relation" not in head_of(model_card(ON_HUB, name="x"))


@pytest.mark.parametrize(
    ("card", "text", "known"),
    [
        ("", "", {}),
        ("---\nlicense: mit\n---\n", "Apache License", {"license": "mit"}),
        ("# no head\n", "\n   Apache License\n  Version 2.0", {"license": "apache-2.0"}),
        ("---\n: [\n---\n", "something else", {"license": "other"}),
        ("---\n- a list\n---\n", "", {}),
    ],
)
def test_the_licence_is_that_of_the_base(card, text, known):
    assert licence_of(card, text) == known
