"""Files that are none, end too early or claim what cannot be are named in one sentence, at once."""

from __future__ import annotations

import os
import struct

import gguf
import pytest

from moe_compress.checkpoints.gguf.metadata import number_entry
from moe_compress.checkpoints.gguf.reader import open_gguf, read_gguf
from support.gguf_files import write_model

HEAD = struct.Struct("<4sIQQ")


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def file_of(entries: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return HEAD.pack(b"GGUF", version, tensor_count, count) + entries + tensors


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
FLOATS = text("a") + struct.pack("<IIQ", 9, 0, 1 << 60)
TEXTS = text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)
NESTED = text("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)
BIG_SHAPE = text("t") + struct.pack("<I2QIQ", 2, 1 << 62, 1 << 62, 0, 0)
AXES = text("t") + struct.pack("<I", 1 << 30)
ODD_ROWS = text("t") + struct.pack("<I1QIQ", 1, 33, 2, 0)
NEW_KIND = text("t") + struct.pack("<I1QIQ", 1, 32, 9999, 0)
ALIGNMENT = text("general.alignment") + struct.pack("<II", 4, 24)
IMATRIX = text("general.type") + struct.pack("<I", 8) + text("imatrix")
BROKEN = {
    "empty": (b"", "is not a GGUF file"),
    "text": (b"{" * 100, "is not a GGUF file"),
    "no end": (HEAD.pack(b"GGUF", 3, 1 << 62, 1 << 62), "has a broken header"),
    "version 1": (file_of(b"", 0, version=1), "is of GGUF version 1"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "is big-endian"),
    "numbers without end": (file_of(FLOATS, 1), "has a broken header"),
    "texts without end": (file_of(TEXTS, 1), "more than any vocabulary has"),
    "arrays of arrays": (file_of(NESTED, 1), "a is of type 9"),
    "no utf-8": (file_of(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 0), 1), "has a broken header"),
    "twice": (file_of(ARCHITECTURE * 2, 2), "has general.architecture twice"),
    "alignment": (file_of(ALIGNMENT, 1), "general.alignment=24 is no power of two"),
    "shape": (file_of(ARCHITECTURE, 1, BIG_SHAPE, 1), "ends within t"),
    "axes": (file_of(ARCHITECTURE, 1, AXES, 1), "t has 1073741824 axes"),
    "rows": (file_of(ARCHITECTURE, 1, ODD_ROWS, 1), "the rows of t, 33 numbers, are no whole blocks of 32"),
    "kind": (file_of(ARCHITECTURE, 1, NEW_KIND, 1), "t is of type 9999, which the installed gguf package"),
    "no model": (file_of(b"", 0), "holds no model"),
    "imatrix": (
        file_of(ARCHITECTURE + text("general.type") + struct.pack("<I", 8) + text("imatrix"), 2),
        "holds no mo",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_said(case, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(BROKEN[case][0])
    with pytest.raises(ValueError, match=str(path)) as error:
        open_gguf(path)
    assert BROKEN[case][1] in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    for path in (tmp_path / "m.gguf", tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(ValueError, match=r"is no file that can be read|there is no file"):
            open_gguf(tmp_path / path)


def test_a_file_that_ends_anywhere_is_named(tmp_path):
    whole = write_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (*range(0, 400, 7), len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            open_gguf(path)


def test_parts_that_do_not_belong_together(tmp_path):
    first = write_model(tmp_path / "m.gguf", shards=2)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="is not part 2 of 2"):
        open_gguf(first)
    other = first.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="has to end as in -00001-of-00003"):
        open_gguf(other)


def test_the_header_is_what_the_library_reads(tmp_path):
    keys = {"floats": [0.5, 1.5], "flags": [True, False], "signed": [-3, 4]}
    path = write_model(tmp_path / "m.gguf", keys=keys, alignment=128)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.alignment == 128 and [*ours.metadata] == [key for key in theirs.fields if key[:5] != "GGUF."]
    for key, entry in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert entry.value == (None if key == "tokenizer.ggml.tokens" else expected), key
    places = [(t.name, t.kind, t.start, t.stop) for t in ours.tensors]
    assert places == [(t.name, t.tensor_type, t.data_offset, t.data_offset + t.n_bytes) for t in theirs.tensors]
    assert [t.shape for t in ours.tensors] == [tuple(int(n) for n in t.shape[::-1]) for t in theirs.tensors]


def test_numbers_keep_their_type_or_are_refused():
    entry = number_entry("a.b", 7)
    assert entry.value == 7 and entry.with_value(8).value == 8 and len(entry.with_value(8).raw) == len(entry.raw)
    with pytest.raises(ValueError, match=r"a\.b is of a type that cannot hold -1"):
        entry.with_value(-1)
