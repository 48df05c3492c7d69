"""Export pads where a bias allows it."""

from __future__ import annotations

import shutil

import pytest

from moe_compress import api
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
            assert (api.export(made, tmp_path / "plain", pad=True) / "config.json").is_file()
            shutil.rmtree(tmp_path / "plain")
