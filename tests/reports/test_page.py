"""The page: complete, safe, and in a browser."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_compress import api
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.reports import charts, html_report
from moe_compress.reports.record import Failure
from moe_compress.reports.table import SAME
from support.records import (
    DOCUMENTS,
    HOSTILE,
    ORIGINAL,
    SAME_AS,
    WORSE,
    measured,
    record,
    sized,
    speed_file,
    tasks_file,
)


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
    made = html_report.make_report([results / "records"], tmp_path / "out", report_columns())
    assert len(made.skipped) == 2 and all("broken.json" in sentence for sentence in made.skipped)
    assert "broken.json" in caplog.text
    names = {path.name for path in made.files}
    assert names == {"report.html"} | {f"tiny-012345-{key}.svg" for key in ("bytes", "flops_per_token", "latency")}
    text = made.files[0].read_text()
    assert "&lt;script&gt;document.title" in text and "<script>document.title" not in text and "<img" not in text
    assert text.count("<script>") == 1 and 'src="' not in text and 'href="http' not in text and "@import" not in text
    assert text.count('class="failed"') == 2 and "out of memory" in text and "Models without a table" in text
    assert "&#34;unsaid&#34;: 1" in text and "Routing of worse beside tiny" in text and "on front: latency" in text
    assert "quiz right" in text and "0.500 [0.400, 0.600]" in text and "prefill x" in text
    assert SAME in text and "share of zeros" in text and "prefers-color-scheme: dark" in text
    again = api.report([results / "records"], tmp_path / "again")
    for first, second in zip(made.files[1:], again[1:], strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_front_is_drawn_alike_on_the_page_and_in_its_file_and_as_png_on_request(results, tmp_path):
    page, *files = api.report([results / "records"], tmp_path / "out")
    drawn = (svg.partition('role="img"')[2] for svg in page.read_text().split("<svg")[1:])
    shown = [re.findall(r"<(?:path|circle|text|title).*", svg) for svg in drawn if "perplexity, root" in svg][:3]
    for path, of_page in zip(files, shown, strict=True):
        root = ElementTree.parse(path).getroot()
        named = {found.partition(": ")[0] for title in root.iter() if (found := title.text or "").endswith("of draws")}
        assert {"original", "expert_drop keep=6"} <= {*named} and any(HOSTILE in name for name in named) == (
            "latency" not in path.name
        )
        of_file = path.read_text().partition("<g transform")[2].partition("</g>")[0]
        assert re.findall(r"<(?:path|circle|text|title).*", of_file) == of_page
    drawn_as_png = api.report([results / "records"], tmp_path / "png", png=True)
    kinds = [path.suffix for path in drawn_as_png]
    assert kinds == [".html", *[".svg", ".png"] * 3]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn_as_png if path.suffix == ".png")
    with pytest.raises(ValueError, match="png=perhaps: allowed: true, false"):
        api.report([results / "records"], tmp_path / "png", png="perhaps")


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no record or folder of records"):
        api.report([tmp_path / "none"], tmp_path)
    with pytest.raises(ValueError, match="there are no records"):
        api.report([tmp_path], tmp_path)
    (tmp_path / "only.json").write_text("[]")
    with pytest.raises(ValueError, match=r"only\.json is not a record"):
        api.report([tmp_path], tmp_path)
    ORIGINAL.save(tmp_path / "records")
    with pytest.raises(ValueError, match=r"out=.*: nothing can be written"):
        api.report([tmp_path / "records"], tmp_path / "only.json" / "below")


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
    (page, *_) = api.report([results / "records"], tmp_path / "out")
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
