"""Files and words that mean nothing, never end or repeat without end are one sentence, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_compress.checkpoints.safetensors_file import read_regions
from moe_compress.hub.card import licence_of
from moe_compress.recipes.parser import parse
from moe_compress.reports.reading import gather
from moe_compress.run.options import make_options
from moe_compress.utils import files
from moe_compress.utils.choices import coerce
from moe_compress.utils.files import read_json, read_text
from moe_compress.utils.yaml_text import parse_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_pattern_is_no_number_to_base_60(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: [{prune: {pattern: 2:4}}]\nsamples: 32\n", encoding="utf-8")
    recipe = parse(str(tmp_path / "recipe.yaml"))
    assert recipe.stages[0].parameters["pattern"] == "2:4" and recipe.options.samples == 32


def test_numbers_of_yaml_stay_numbers():
    text = "[0, -3, +4, 0x1f, 1.5, -.5, 1.0e-3, .inf, 1:30, 2:4.5, 1_000, yes, null]"
    assert parse_yaml(text, "it") == [
        0, -3, 4, 31, 1.5, -0.5, 1e-3, float("inf"), "1:30", "2:4.5", "1_000", True, None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [(BOMB, "aliases"), ("[" * 5000, "it nests too deeply"), ("a: [", "expected"), ("x: !!python/none", "constructor")],
)
def test_yaml_that_repeats_or_nests_without_end(text, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"recipe.yaml is not valid YAML: .*{said}"):
        parse(str(tmp_path / "recipe.yaml"))


def test_a_card_s_bomb_says_no_licence():
    assert licence_of(f"---\n{BOMB}license: mit\n---\n") == {}
    assert licence_of("---\nlicense: mit\n---\n") == {"license": "mit"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "\xff"])
def test_json_that_is_none(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.json is not (valid JSON|UTF-8 text)"):
        read_json(path)


def test_files_that_are_none_or_too_large(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="is no file that can be read"):
            read_json(path)
    (tmp_path / "large.json").write_text(json.dumps("x" * 100))
    monkeypatch.setattr(files, "MOST_JSON", 50)
    with pytest.raises(ValueError, match=r"large\.json has 102 B, and at most 50 B are read"):
        read_json(tmp_path / "large.json")
    with pytest.raises(ValueError, match="there is no file"):
        read_text(tmp_path / "none")


@pytest.mark.parametrize("values", [[], 3, {"version": "x"}, {"version": None}, {"metrics": []}, "record"])
def test_a_record_of_odd_types_stops_no_table(values, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.json is not a record"):
        gather([tmp_path])


def tensors(file: Path, header: object, data: int = 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


def entry(start: object, stop: object, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(0, 8), "c": entry(8, 16)},
        {"a": entry(0, 8), "b": entry(4, 12), "c": entry(8, 16)},
        {"a": entry(8, 16)},
        {"a": entry(0, 8, [-2]), "b": entry(8, 16)},
        {"a": entry(0, 8, [2.0]), "b": entry(8, 16)},
        {"a": entry(0, 8, [True, 2]), "b": entry(8, 16)},
        {"a": entry(0, 8, "2"), "b": entry(8, 16)},
        {"a": entry(-8, 0), "b": entry(0, 16, [4])},
        {"a": entry(16, 0, [4])},
        {"a": [0, 16]},
        [1],
        b"[" * 50_000,
    ],
)
def test_headers_that_overlap_have_holes_or_odd_shapes(header, tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors has a broken safetensors header"):
        read_regions(tensors(tmp_path / "model.safetensors", header))


def test_a_header_of_many_gigabytes_is_none(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write((12 << 30).to_bytes(8, "little"))
        out.truncate(13 << 30)  # sparse: it takes no disk
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_regions(file)


@pytest.mark.parametrize(
    ("hint", "text"),
    [(int, "٣"), (int, "1_0"), (int, " 3"), (float, "\uff11.5"), (float, "1_0.5"), (int, "3.0"), (float, "")],
)
def test_numbers_are_written_in_plain_digits(hint, text):
    with pytest.raises(ValueError, match=f"samples={text}: a(?: whole)? number is needed"):
        coerce(hint, text, "samples")
    assert coerce(float, "1e-3", "x") == 1e-3 and coerce(int, "-3", "x") == -3 and coerce(float, "inf", "x") > 1e300


def test_a_processor_has_no_number(tmp_path):
    with pytest.raises(ValueError, match="device=cpu:99 is not a device"):
        make_options({"device": "cpu:99"})
    assert make_options({"device": "cpu:0"}).device == "cpu:0"
