"""Calibrations on disk that are not whole."""

from __future__ import annotations

import pytest

import moe_compress
from support.slow import slow_after


@pytest.mark.parametrize("artefact", slow_after(1, ["calibrations", "originals"]))
def test_artefacts_that_are_not_whole(artefact, reader_folder, options, tmp_path):
    model = reader_folder("mixtral")
    moe_compress.compress("expert_drop keep=6", model=model, **options)
    path = min((tmp_path / "results" / artefact).glob("*.safetensors"), key=lambda path: len(path.name))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"remove (it|them), and it is measured anew"):
        moe_compress.compress("expert_drop keep=4", model=model, **options)
