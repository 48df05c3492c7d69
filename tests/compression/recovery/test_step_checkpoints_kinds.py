"""Students of every form have checkpoints of their own while they are trained: edited, packed in codes, in factors."""

from __future__ import annotations

import shutil

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.checkpoints.steps import finished_steps

KINDS = {
    "edited": "expert_merge keep=2 router=sum + distill train=all steps=3",
    "factors": "factorise + distill train=new steps=3 lr=0.05",
    "packed": "quantize bits=4 group_size=16 + router_kd steps=3",
    "codes": "quantize bits=4 group_size=16 + qad learns=codes steps=3 lr=0.05",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_form_of_the_outcome(kind, wide_lab, tmp_path):
    out = moe_compress.compress(
        KINDS[kind], "checkpoint_every=2", **{**wide_lab("mixtral"), "out": str(tmp_path / "run")}
    ).folder
    manifest, opened = read_manifest(out) or {}, open_checkpoint(out)
    for step in finished_steps(out):
        said, there = read_manifest(step.folder) or {}, open_checkpoint(step.folder)
        assert said["form"] == manifest["form"] and there.values == opened.values
        assert there.tensors.keys() == opened.tensors.keys()
        # Nothing of it lies elsewhere.
        alone = shutil.copytree(step.folder, tmp_path / f"alone-{step.step}")
        model = moe_compress.load(alone)
        with torch.no_grad():
            assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
    assert len({open_checkpoint(each.folder).fingerprint for each in finished_steps(out)} | {opened.fingerprint}) == 3
