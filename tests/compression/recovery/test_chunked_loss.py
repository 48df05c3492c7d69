"""Losses of next tokens a chunk at a time: the plain way's numbers in a fraction of its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.recovery.whole_model import WholeModel, chunked_loss
from moe_compress.methods.recovery.divergences import divergence_of
from moe_compress.models import hf
from moe_compress.models.hf import layer_calls
from support import chunked_logits, readers, tiny
from support.pruned import run_of
from support.quantized import random

HIDDEN, TEACHER = random(9, tiny.HIDDEN, seed=1), 3 * random(9, readers.VOCAB, seed=2)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_value_and_gradients_are_the_plain_ways(kind, lab, monkeypatch):
    """Those of the head and the final norm, too."""
    monkeypatch.setattr(layer_calls, "LOGITS_PER_CHUNK", 4 * readers.VOCAB)
    whole = WholeModel(open_checkpoint(Path(str(lab("mixtral")["model"]))), run_of(lab("mixtral")), torch.float32)
    head = [whole.model.lm_head.weight.requires_grad_(), whole.model.model.norm.weight.requires_grad_()]
    of = divergence_of(kind, 2.0, 0.3)
    total, gradient = chunked_loss(whole, HIDDEN, lambda logits, part: of(logits, TEACHER[part]), 0.25)
    found = [gradient, *(each.grad for each in head)]
    leaf = HIDDEN.clone().requires_grad_()
    loss = of(hf.logits(whole.model, leaf), TEACHER).sum()
    expected = torch.autograd.grad(0.25 * loss, [leaf, *head])
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for ours, plain in zip(found, expected, strict=True):
        assert float((ours - plain).norm()) <= 1e-5 * float(plain.norm()) and float(plain.norm()) > 0


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_take_a_fifth_of_the_memory_at_most():
    """2,048 tokens and 150,000 entries, each way in a process of its own: the highest memory above what was there."""
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    peaks = {}
    for way in ("chunked", "plain"):
        command = [sys.executable, str(Path(chunked_logits.__file__)), way, "2048", "150000"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        peaks[way] = int(done.stdout)
    assert peaks["chunked"] <= 0.2 * peaks["plain"], peaks
