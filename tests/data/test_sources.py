"""How data= is written, and that an existing file is what it is called, whatever stands in its name."""

from __future__ import annotations

import pytest

from moe_compress.data.documents import DataSpec, require_sources
from moe_compress.data.sources import Source, read_sources, shares, windows_named
from moe_compress.run.options import make_options


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("c4", [Source("c4")]),
        (
            "evol.jsonl:512, org/Mixture-of-Thoughts[code]:256, org/trajectories(tool):64,c4[en](train):128, zoo",
            [
                Source("evol.jsonl", windows=512),
                Source("org/Mixture-of-Thoughts", "code", windows=256),
                Source("org/trajectories", split="tool", windows=64),
                Source("c4", "en", "train", 128),
                Source("zoo"),
            ],
        ),
        ("C:\\texts\\a.txt:8", [Source("C:\\texts\\a.txt", windows=8)]),
        ("C:a.txt", [Source("C:a.txt")]),
        ("org/x(train[:10%])", [Source("org/x", split="train[:10%]")]),
    ],
)
def test_sources_as_they_are_written(text, sources):
    assert list(read_sources(text)) == sources


@pytest.mark.parametrize("name", ["a,b.txt", "a:7", "a[b].txt", "a(b).txt", "x, y[1](2):3.txt", "a.txt:12"])
def test_the_name_of_a_file_is_that_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("a")
    assert read_sources(name) == (Source(name),)
    assert read_sources(f"c4:2, {name}:3,zoo") == (Source("c4", windows=2), Source(name, windows=3), Source("zoo"))
    assert read_sources(f"{tmp_path / name}")[0].title == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c4:", "behind the colon stands a number of windows"),
        ("c4:0", "from 1 to"),
        ("c4:١٢", "behind the colon"),
        ("c4:99999999999999", "from 1 to"),
        ("c4:many", "such as c4:128"),
        ("c4,,zoo", "holds '', which is no source"),
        ("org/x[]", "which is no source"),
        ("c4,c4", "sources of different names"),
        (",".join(map(str, range(100))), "at most 64 sources"),
    ],
)
def test_what_is_no_source(text, said):
    with pytest.raises(ValueError, match=said):
        read_sources(text)


def test_one_data_set_may_be_several_sources():
    titles = [source.title for source in read_sources("org/x[code], org/x[math], org/x[math](test)")]
    assert titles == ["org/x[code]", "org/x[math]", "org/x[math](test)"]


def test_windows_that_are_named_add_up():
    assert (windows_named("a:3,b:4"), windows_named("a:3,b"), windows_named("")) == (7, None, None)
    assert shares(read_sources("a:3,b"), 8) == {"a": 3, "b": None}
    for text, total, said in (("a:3,b:4", 8, "name 7 windows, but samples=8"), ("a:3,b", 3, "none is left for b")):
        with pytest.raises(ValueError, match=said):
            shares(read_sources(text), total)
    resolved = make_options({"data": "zoo:5, c4:7", "eval_data": "zoo:9"}).resolved()
    assert (resolved.samples, resolved.eval_samples) == (12, 9)
    assert make_options({"data": "zoo:5, c4"}).resolved().samples == 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"source": "zoo", "field": "body"}, "data_field=body: zoo has no field"),
        ({"source": "c4", "field": "body", "use": "heldout"}, "eval_field=body: c4 has no field"),
        ({"source": "zoo,c4", "config": "en", "field": "body"}, "data_field=body: zoo,c4 has no field"),
        ({"source": "TXT", "split": "train"}, "data_split=train"),
        ({"source": "TXT(train)"}, "is no data set of the hub, and has no split"),
        ({"source": "JSONL[code]"}, "has no config"),
        ({"source": "TXT", "fields": "role:by"}, "fields=role:by: text.txt has no fields"),
        ({"source": "JSONL", "fields": "roll:by"}, "unknown name in fields= 'roll': did you mean 'role'"),
        ({"source": "JSONL", "fields": "role"}, "write name:theirs"),
    ],
)
def test_words_that_no_source_can_use(words, said, tmp_path):
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    source = words["source"].replace("TXT", f"{tmp_path}/text.txt").replace("JSONL", f"{tmp_path}/text.jsonl")
    with pytest.raises(ValueError, match=said):
        require_sources(DataSpec(**{"use": "calibration", "samples": 4, "length": 8, **words, "source": source}))
