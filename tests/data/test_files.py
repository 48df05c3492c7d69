"""Files of every kind, plain and compressed, give the same documents; what is no file is refused at once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_compress.data import files, paragraphs
from moe_compress.data.documents import DataSpec, read_documents
from moe_compress.data.files import local_file, opened

TEXTS = ["Rivers carry sand.", 'Two "copies", of\nthe plan', "für jedes Wort: 漢字 🙂", " ", "x = 1"]
ROWS = [{"text": text, "domain": "ab"[number % 2]} for number, text in enumerate(TEXTS)]


def spec(path, **changes):
    return DataSpec(**{"source": str(path), "use": "calibration", "samples": 4, "length": 8, **changes})


def written(path: Path, kind: str) -> None:
    """The rows as a file of a kind."""
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "domain"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        content = {
            "jsonl": "\n".join(map(json.dumps, ROWS)),
            "json": json.dumps(ROWS),
            "pretty.json": "\ufeff" + json.dumps(ROWS, indent=1),
            "lines.json": "\n".join(map(json.dumps, ROWS)),
        }[kind]
        path.write_text(content, encoding="utf-8")


def compressed(path: Path, ending: str) -> Path:
    """The file, compressed, beside it."""
    target = path.with_name(path.name + ending)
    if ending.lower() == ".gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.CompressedOutputStream(str(target), "zstd") as out:
            out.write(path.read_bytes())
    return target


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "pretty.json", "lines.json", "csv", "parquet"])
def test_rows_are_the_same_in_every_kind_of_file(kind, ending, tmp_path):
    path = tmp_path / f"rows.{kind if not ending else kind.upper()}"
    written(path, kind)
    if ending:
        path = compressed(path, ending)
    found = read_documents(spec(path))
    assert sorted((d.text, d.domain) for d in found) == sorted((row["text"], row["domain"]) for row in ROWS)
    assert {d.text for d in found.of("b")} == {TEXTS[1], TEXTS[3]}
    assert [d.text for d in found] == [d.text for d in read_documents(spec(path))]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.txt.gz", "a.md.zst"])
def test_texts_between_blank_lines(name, tmp_path):
    path = tmp_path / name.partition(".gz")[0].partition(".zst")[0]
    path.write_bytes("first line\nsecond\n \t\r\nsecond document\n\n\n\u3000\n".encode())
    if path.name != name:
        path = compressed(path, Path(name).suffix)
    assert {d.text for d in read_documents(spec(path))} == {"first line\nsecond", "second document"}


def split_whole(content: bytes) -> list[str]:
    """Documents of a text that is in memory."""
    lines = [line if line.strip() else "" for line in content.decode().splitlines()]
    return [part for part in "\n".join(lines).split("\n\n") if part.strip()]


def test_documents_are_found_as_if_the_whole_file_were_in_memory(monkeypatch):
    drawn = random.Random(0)
    atoms = [*"a \t\n\n\r\v\f\x1c\x1f\x85\xa0\u2028\u2003\u3000é漢", "\r\n", "\n\n", "b c"]
    for _ in range(3000):
        monkeypatch.setattr(paragraphs, "BLOCK", drawn.choice([1, 2, 3, 5, 8, 64]))
        monkeypatch.setattr(paragraphs, "PIECE", drawn.choice([1, 2, 3, 7, 64]))
        content = "".join(drawn.choices(atoms, k=drawn.randrange(14))).encode()
        file = io.BytesIO(content)
        spans = paragraphs.paragraphs(Path("x"), file)
        found = ["".join(paragraphs.pieces(file, *span)) for span in zip(spans.starts, spans.ends, strict=True)]
        assert found == split_whole(content), content


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "notes.docx").write_text("a")
    for name, said in {
        "pipe.txt": "a pipe, a device or a socket",
        "endless.jsonl": "a pipe, a device or a socket",
        "folder.csv": "is a folder: a regular file is needed",
        "notes.docx": r"no kind that is read by its name: .txt, .md, .json, .jsonl, .csv and .parquet",
        "missing": "there is no file",
    }.items():
        with pytest.raises(ValueError, match=said):
            local_file(str(tmp_path / name))
    with pytest.raises(ValueError, match="a pipe, a device or a socket"):
        local_file("/dev/zero")
    assert local_file("org/data-set") is None and local_file(str(tmp_path)) is None


def test_compressed_files_that_are_broken_or_grow_without_end(tmp_path, monkeypatch):
    whole = gzip.compress(random.Random(0).randbytes(1000))
    zstd = tmp_path / "a.txt"
    zstd.write_bytes(random.Random(0).randbytes(1000))
    zstd = compressed(zstd, ".zst")
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-20])
    (tmp_path / "other.txt.gz").write_bytes(b"no gzip at all")
    (tmp_path / "cut.txt.zst").write_bytes(zstd.read_bytes()[:-20])
    for name, kind in (("cut.txt.gz", "gzip"), ("other.txt.gz", "gzip"), ("cut.txt.zst", "zstd")):
        with pytest.raises(ValueError, match=f"{name} cannot be read as {kind}"):
            opened(tmp_path / name)
    monkeypatch.setattr(files, "IN_MEMORY", 1 << 12)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(ValueError, match="more than 500 times its size"):
        opened(tmp_path / "bomb.txt.gz")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a\n\n\xff", r"a.txt is not UTF-8 text: byte 4 is 0xff"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b\xe9"}',
            r"row 2 of .*a.jsonl holds a byte .* \(0xe9\) in `text`, behind 1",
        ),
        ("a.jsonl", b'{"text": "\\ud83d"}', "row 1 of .*a.jsonl holds half a character in `text`"),
        ("a.json", b'[{"text": "a"}, {"text": "\xe9"}]', r"row 2 of .*a.json holds a byte that is not UTF-8 \(0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n\n[1', "row 2 is not valid"),
        ("a.jsonl", b"[" * 100_000, "row 1 is not valid"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', "a.json cannot be read as json: row 2 is not valid"),
        ("a.json", b'[{"text": "a"}] x', "row 2 is not valid .something follows the array"),
        ("a.csv", b"text,text\na,b\n", "two columns are called 'text'"),
        ("a.json", b'[{"text": "a"},', "row 2 is not valid .the file ends within it"),
        ("a.json", b'{\n"text": "a"\n}', "row 1 is not valid"),
        ("a.csv", b'text\n"a"b\n', "a.csv cannot be read as csv: row 1 is not valid"),
        ("a.csv", b"text\na\nb,c\n", "row 2 is not valid .it has more values"),
        ("a.csv", b"text\na\nb\xff\n", r"row 2 of .*a.csv holds a byte that is not UTF-8 \(0xff\) in `text`"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet"),
    ],
)
def test_broken_files_name_the_row(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_documents(spec(tmp_path / name))


def test_bytes_of_a_table_that_are_no_text(tmp_path):
    wrong = pyarrow.array([b"good", b"bad \xe9"])
    text = pyarrow.StringArray.from_buffers(2, *wrong.buffers()[1:])
    for column in (wrong, text):
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "other": ["a", "b"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"row 2 of .*a.parquet holds a byte that is not UTF-8 \(0xe9\) in `text`"):
            read_documents(spec(tmp_path / "a.parquet"))
        assert [d.text for d in read_documents(spec(tmp_path / "a.parquet", field="other"))]


def test_a_row_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_compress.data.tables.MAX_ROW", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * (3 << 20) + '"}')
    with pytest.raises(ValueError, match=r"row 2 of .*a.jsonl has more than 1 MiB"):
        read_documents(spec(tmp_path / "a.jsonl"))


def test_columns_of_times_are_passed_over_and_two_of_one_name_refused(tmp_path):
    text, far = pyarrow.array(["a"]), pyarrow.array([2**62]).cast(pyarrow.duration("s"))
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "when": far}), tmp_path / "a.parquet")
    assert [d.text for d in read_documents(spec(tmp_path / "a.parquet"))] == ["a"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([text, text], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet: two columns are called 'text'"):
        read_documents(spec(tmp_path / "a.parquet"))


def test_files_of_the_system_are_no_text(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/status")
    with pytest.raises(ValueError, match=r"a.txt is a file of the system's own, which may never end"):
        read_documents(spec(tmp_path / "a.txt"))
