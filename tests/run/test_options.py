"""Options take paths and refuse strangers."""

from __future__ import annotations

import pytest

from moe_compress.run.options import make_options


def test_options_take_paths_and_refuse_strangers(tmp_path):
    assert make_options({"out": tmp_path}).out == str(tmp_path)
    with pytest.raises(ValueError, match="unknown key 'modle': did you mean 'model'"):
        make_options({"modle": "x"})
