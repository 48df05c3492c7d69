"""Records as they are read: changed, malformed and older ones among good ones."""

from __future__ import annotations

import json
import re

import pytest

import moe_compress
from moe_compress import api
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.reports import html_report
from moe_compress.reports.reading import gather, load_records, read_records
from moe_compress.reports.record import digest_of
from support.records import ORIGINAL, SAME_AS, WORSE


def test_files_that_are_no_records(tmp_path):
    path = tmp_path / "record.json"
    for text in ("{", "[]", "{}", '{"version": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record\.json is not a record of moe-compress"):
            moe_compress.table([tmp_path])
    path.unlink()
    with pytest.raises(ValueError, match="there are no records"):
        moe_compress.table([tmp_path])
    with pytest.raises(ValueError, match="there is no record or folder of records"):
        moe_compress.table([tmp_path / "none"])


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
    made = html_report.make_report([tmp_path / "records"], tmp_path / "out", report_columns())
    assert len(made.skipped) == 1 and "worse.json" in made.skipped[0]
    assert len(api.table([tmp_path / "records"])[0].rows) == 1
