"""What is a matter of words is answered without torch, transformers, numpy, pandas or matplotlib; a page almost so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from support.slow import slow_after

HEAVY = ("torch", "transformers", "numpy", "pandas", "matplotlib", "scipy", "datasets")
CODE = """
import sys
_, heavy, *words = sys.argv
HEAVY = heavy.split()
sys.argv = ["moe-compress", *words]
from moe_compress.cli.commands import main
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
else:
    code = 0
heavy = [name for name in HEAVY if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""
ANSWERED = [
    (["--help"], 0), (["compress", "--help"], 0), (["speed", "--help"], 0), (["table", "--help"], 0), (["list"], 0),
    (["list", "quantize"], 0), (["zoo"], 0), (["list", "quantise"], 2), (["compress", "expert_drp"], 2),
    (["compress", "expert_drop kep=6"], 2), (["compress", "expert_drop score=reep"], 2),
    (["compress", "expert_drop", "samples=x"], 2), (["compress", "expert_drop", "device=gpu"], 2),
    (["compress", "expert_drop", "dtype=fp8"], 2), (["compress", "expert_drop", "model=tiny-mixtrl"], 2),
    (["plan", "expert_drop keep=6 +"], 2), (["evaluate", "tiny-mixtral", "nope=1"], 2),
    (["routing", "tiny-mixtral", "seed=x"], 2), (["speed", "tiny-mixtral", "quick=perhaps"], 2),
    (["speed", "tiny-mixtral", "prompts=1,x"], 2), (["tasks", "tiny-mixtral", "limit=0"], 2),
    (["flops", "tiny-mixtral", "tokens=0"], 2), (["verify", "tiny-mixtral", "nope=1"], 2),
    (["analyze", "tiny-mixtral", "threshold=x"], 2), (["push", "tiny-mixtral"], 2), (["table"], 2), (["report"], 2),
    (["table", "RECORDS", "out=."], 0),
]  # fmt: skip


def run(words: Sequence[str], heavy: Iterable[str], place: Path) -> subprocess.CompletedProcess[str]:
    """The command line, which fails if it imports something heavy."""
    return subprocess.run(
        [sys.executable, "-c", CODE, " ".join(heavy), *words], capture_output=True, text=True, check=False, cwd=place
    )


@pytest.mark.parametrize(
    ("words", "code"), slow_after(12, ANSWERED), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_words_are_answered_without_heavy_imports(words, code, tmp_path):
    records = Path(__file__).parents[2] / "results" / "records" / "tiny-mixtral-original.json"
    given = [str(next(records.parent.glob("tiny-mixtral-top_k*"))) if word == "RECORDS" else word for word in words]
    done = run(given, HEAVY, tmp_path)
    assert done.returncode == code, done.stderr
    assert not code or (done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1)


def test_a_page_with_fronts_is_made_without_heavy_imports_but_numpy(tmp_path):
    records = map(str, (Path(__file__).parents[2] / "results" / "records").glob("tiny-mixtral-[ot]*-*.json"))
    done = run(["report", *records, "out=."], set(HEAVY) - {"numpy"}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file() and {path.suffix for path in tmp_path.glob("plots/*")} == {".svg"}
