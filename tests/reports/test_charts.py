"""Charts of what is by layer, and their axes."""

from __future__ import annotations

import numpy as np

from moe_compress.reports import charts, svg


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
