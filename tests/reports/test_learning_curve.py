"""Curves of a training: what is on them, in which order, and that they are on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moe_compress.reports import html_report, learning_curve
from moe_compress.reports.learning_curve import LOSS, curves_of
from moe_compress.reports.record import digest_of
from support.records import HOSTILE, ORIGINAL, WORSE, record

SVG = "{http://www.w3.org/2000/svg}"


def evaluation(step: int | None, error: str = "", name: str = "run", **values: float) -> dict[str, Any]:
    """As JSON holds it; the loss halves with the steps."""
    metrics = {
        key: {"value": value, "unit": "", "interval": [value - 0.1, value + 0.1]} for key, value in values.items()
    }
    losses = {"logits": 1.0 / (1 + step)} if step else {}
    return {
        "model": name, "run": "abc", "protocol": "0123456789", "step": step, "losses": losses, "metrics": metrics,
        "error": error, "version": 2,
    }  # fmt: skip


GOOD = [
    evaluation(20, kl=0.2, perplexity=3.0, accuracy_quiz=0.6, accuracy_cloze=0.8, accuracy=0.7),
    evaluation(None, perplexity=2.5, accuracy_quiz=0.9, accuracy_cloze=0.9, accuracy=0.9),
    evaluation(0, kl=0.9, perplexity=5.0, accuracy_quiz=0.2, accuracy_cloze=0.4, accuracy=0.3),
    evaluation(10, error="it burned"),
]


def test_panels_hold_steps_in_their_order_and_the_originals_level():
    curves = curves_of(GOOD)
    assert list(curves) == [LOSS, "KL to the original, nats", "perplexity", "share of right answers"]
    (kl,) = curves["KL to the original, nats"]
    assert [(step, value) for step, value, _ in kl.points] == [(0, 0.9), (20, 0.2)] and kl.original is None
    (perplexity,) = curves["perplexity"]
    assert perplexity.original == 2.5
    assert [line.name for line in curves["share of right answers"]] == ["quiz", "cloze", "average"]
    (loss,) = curves[LOSS]
    assert [step for step, *_ in loss.points] == [20]
    one = curves_of([evaluation(0, accuracy_quiz=0.5, accuracy=0.5), evaluation(2, accuracy=0.5, task_accuracy=0.5)])
    assert [line.name for line in one["share of right answers"]] == ["quiz"]
    none = curves_of([evaluation(2, accuracy=0.5, task_accuracy=0.5)])
    assert [line.name for line in none["share of right answers"]] == ["accuracy"]
    assert curves_of([evaluation(None, perplexity=2.0)]) == {} == curves_of([])


def test_the_picture_is_xml_with_a_dot_a_value(tmp_path):
    files = learning_curve.write(tmp_path / "curve", f"run {HOSTILE} \x07", curves_of(GOOD))
    assert [path.name for path in files] == ["curve.svg"]
    root = ElementTree.parse(files[0]).getroot()
    titles = [node[0].text for node in root.iter(f"{SVG}circle")]
    assert titles[:3] == ["logits, step 20: 0.04762", "kl, step 0: 0.9", "kl, step 20: 0.2"] and len(titles) == 11
    assert max(float(node.get("y", 0)) for node in root.iter(f"{SVG}text")) < float(root.get("height", 0))
    levels = [node for node in root.iter(f"{SVG}path") if node.get("class") == "level"]
    assert len(levels) == 4


def test_a_png_is_drawn_where_it_is_asked_for(tmp_path):
    files = learning_curve.write(tmp_path / "curve", "a $x_1$", curves_of(GOOD), png=True)
    assert [path.name for path in files] == ["curve.svg", "curve.png"] and files[1].read_bytes()[1:4] == b"PNG"


def test_the_page_has_a_section_a_training(tmp_path, monkeypatch):
    for row in (ORIGINAL, WORSE):
        row.save(tmp_path / "records")
    place = tmp_path / "watch" / "run"
    place.mkdir(parents=True)
    for number, each in enumerate([*GOOD, evaluation(0, name=HOSTILE, kl=0.5)]):
        (place / f"{number}.json").write_text(json.dumps({**each, "digest": digest_of(each)}))
    (place / "broken.json").write_text(json.dumps({**GOOD[0], "digest": "0"}))
    made = html_report.make_report(tmp_path / "records", tmp_path / "page", {})
    page = Path(made.files[0]).read_text()
    assert page.count("<h2>Training of") == 2 and "<h2>Training of run</h2>" in page and HOSTILE not in page
    assert "kl, step 20: 0.2" in page and "KL to the original, nats" in page
    assert len(made.skipped) == 1 and "broken.json is no watch file" in made.skipped[0]


def test_a_training_that_nobody_watched_shows_its_losses(tmp_path):
    training = {"curve_steps": [1, 20], "curve": {"logits": [0.5, 0.25]}}
    trained = record("trained", 2.2, [("distill", {})]).model_copy(update={"report": [{"training": training}]})
    for row in (ORIGINAL, trained):
        row.save(tmp_path / "records")
    page = Path(html_report.make_report(tmp_path / "records", tmp_path / "page", {}).files[0]).read_text()
    assert "<h2>Training of trained</h2>" in page and "logits, step 20: 0.25" in page and "loss of a step" in page
