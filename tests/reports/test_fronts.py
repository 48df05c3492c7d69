"""Fronts as files: what a picture says, that it is XML whatever a model is called, and PNG where it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe_compress.reports import svg
from moe_compress.reports.fronts import write_front
from moe_compress.reports.pareto import Front, Point
from support.records import HOSTILE

SVG = "{http://www.w3.org/2000/svg}"
LONG = "quantize method=awq bits=4 group_size=32 + expert_drop score=gate_mass ratio=0.25 budget=global"


def front(names: list[str], how: str = "") -> Front:
    """Dearer is better, so that all but the last are on the front."""
    values = [(20.0 / (at + 1), at < len(names) - 1) for at in range(len(names))]
    values[-1] = (30.0, False)
    points = [
        Point(name, at + 1.0, value, (0.9 * value, 1.1 * value), (at + 0.5, at + 1.5), on_it, 0.25)
        for at, (name, (value, on_it)) in enumerate(zip(names, values, strict=True))
    ]
    return Front("latency", "time & more", points, [], how)


def read(path: Path) -> tuple[ElementTree.Element, list[str]]:
    """The root, and every text that is seen or read out."""
    root = ElementTree.parse(path).getroot()
    texts = [" ".join((node.text or "").split()) for node in root.iter() if node.tag in (f"{SVG}text", f"{SVG}title")]
    return root, texts


def test_a_picture_says_what_it_shows_in_valid_xml(tmp_path):
    names = ["original", HOSTILE, "bell\x07\x00 & $x_1$ \ufffe", LONG, "w" * 200, "worse"]
    (path,) = write_front(tmp_path / "plots" / "made", "a <b> & c", front(names, "decoding " + "so " * 100))
    assert path.name == "made.svg"
    root, texts = read(path)
    assert root.tag == f"{SVG}svg" and {node.tag.removeprefix(SVG) for node in root.iter()} == {
        "svg", "title", "style", "rect", "text", "g", "path", "a", "circle",
    }  # fmt: skip
    assert {"a <b> & c", "time & more", "perplexity, root of log scale", *svg.LEGEND} <= set(texts)
    assert "a <b> & c: perplexity and time & more" in texts
    for number, shown in enumerate(("original", HOSTILE[:20], "bell & $x_1$ ", LONG[:60], "w" * 70, "worse"), 1):
        assert [text for text in texts if text.startswith(f"{number} {shown}") and text.endswith(": 25%")], shown
    assert sum(text.startswith("decoding so so") for text in texts) == 1 and texts.count("so so so") == 0
    dots = list(root.iter(f"{SVG}circle"))
    assert [" ".join((dot[0].text or "").split()).partition(": ")[0] for dot in dots][:2] == ["worse", "original"]
    assert [group.get("class") for group in root.iter(f"{SVG}a")] == ["other", *["best"] * 5]
    assert all(node.get("href") is None for node in root.iter())
    assert max(float(node.get("y", 0)) for node in root.iter(f"{SVG}text")) < float(root.get("height", 0))


def test_many_points_are_named_where_they_are_often_on_the_front_and_near_ones_share_a_place(tmp_path):
    many = front([f"row {at}" for at in range(svg.FEW + 1)])
    points = [
        Point(p.name, min(p.cost, 14.3), max(p.perplexity, 1.4), p.interval, None, p.front, 0.0) for p in many.points
    ]
    many = Front(many.key, many.label, points, [])
    assert [point.name for point in svg.named(many)] == [f"row {at}" for at in range(svg.FEW)]
    places = svg.numbers(many)
    assert sorted(int(number) for text in places.values() for number in text.split(", ")) == [*range(1, svg.FEW + 1)]
    assert places[points[0]] == "1" and places[points[13]] == "14, 15, 16" and len(places) == svg.FEW - 2
    _, texts = read(write_front(tmp_path / "made", "m", many)[0])
    assert {*places.values()} <= {*texts} and not any(text.startswith(f"{svg.FEW + 1} ") for text in texts)


def test_a_png_is_drawn_where_it_is_asked_for(tmp_path):
    shown = front(["a $b", HOSTILE, LONG], "how")
    plain, drawn = (write_front(tmp_path / name, "m", shown, png=name == "both") for name in ("svg", "both"))
    assert [path.name for path in plain] == ["svg.svg"] and [path.name for path in drawn] == ["both.svg", "both.png"]
    assert drawn[0].read_bytes() == plain[0].read_bytes() and drawn[1].read_bytes().startswith(b"\x89PNG")
    write_front(tmp_path / "both", "m", shown)
    assert not drawn[1].exists()  # it would be of another front than the SVG


@pytest.mark.parametrize("name", ["", "   ", "\x00"])
def test_a_name_without_a_letter_has_its_number(name, tmp_path):
    _, texts = read(write_front(tmp_path / "made", "m", front([name, "other"]))[0])
    assert any(re.fullmatch(r"1 ?: 25%", text) for text in texts)
