"""Export pads where a bias allows it."""

from __future__ import annotations

import shutil

import pytest

from moe_compress import api
from moe_compress.checkpoints.folder import read_manifest
from support import editing, tiny


def test_export_pads_where_a_bias_allows_it(tmp_path):
    options = {"results": tmp_path / "runs", "eval": False}
    for family in ("minimax_m2", "mixtral"):
        model = tiny.save(editing.make(family), tmp_path / family)
        made = api.compress("expert_drop score=random budget=global seed=1", model=model, **options).folder
        if family == "mixtral":
            with pytest.raises(ValueError, match="has no selection bias"):
                api.export(made, tmp_path / "plain", pad=True)
        else:
            plain = api.export(made, tmp_path / "plain")
            assert (plain / "config.json").is_file()
            manifest = read_manifest(plain)  # which every harness reads
            assert manifest is not None and manifest["base"]["model"] == str(model) and manifest["form"] == "plain"
            shutil.rmtree(tmp_path / "plain")
