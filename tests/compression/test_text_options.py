"""What a recipe may say of its text: padding, domains, lengths."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import moe_compress
from support.checkpoints import kept, scores


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_compress")


def test_padded_documents(reader_folder, options, caplog):
    short = moe_compress.compress(
        "expert_drop", model=reader_folder("mixtral"), **{**options, "pack": False, "length": 40, "eval": False}
    )
    report = json.loads((short.folder / "moe_compress.json").read_text())["report"][0]["calibration"]
    assert report["packed"] is False and report["windows"] == 8
    assert 0 < report["tokens"] < 8 * 40
    longer = {**options, "pack": False, "length": 60, "eval": False, "out": short.folder.with_name("longer")}
    again = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **longer)
    assert kept(again.folder) == kept(short.folder)  # padding counts for nothing


def test_domains_are_mixed_afterwards(reader_folder, options, texts, forwards):
    options = {**options, "data": str(texts / "domains.jsonl"), "eval": False, "model": reader_folder("mixtral")}
    made = moe_compress.compress("expert_drop score=frequency keep=2", **options)
    domains = json.loads((made.folder / "moe_compress.json").read_text())["report"][0]["calibration"]["domains"]
    assert domains == {"code": 4, "prose": 4}
    forwards.clear()

    def frequencies(mix: str) -> list[list[float]]:
        folder = moe_compress.compress("expert_drop score=frequency keep=2", mix=mix, **options).folder
        return list(scores(folder).values())

    prose, code, both = frequencies("prose:1"), frequencies("code:1"), frequencies("prose:2,code:1")
    expected, got = 2 * torch.tensor(prose) + torch.tensor(code), torch.tensor(both)
    torch.testing.assert_close(got / got.sum(), expected / expected.sum())
    assert not forwards


def test_windows_longer_than_the_model_was_made_for(reader_folder, options, caplog):
    moe_compress.evaluate(reader_folder("mixtral"), **{**options, "eval_length": 80})
    assert "windows of 80 tokens" in caplog.text and "was made for 64" in caplog.text
