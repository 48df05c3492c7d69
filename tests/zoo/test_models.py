"""The shipped models: they load anywhere, know their text, and rank methods as they should on both training seeds."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress import zoo
from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.data.documents import DataSpec
from moe_compress.data.windows import make_windows
from support.slow import slow_after

SMALL = {"eval_samples": 30, "samples": 20}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_ships_as_an_ordinary_checkpoint(name):
    folder = zoo.path(name)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20
    card = (folder / "README.md").read_text()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights in card and re.search(r"seed [01]", card)
    config = model.config
    sizes = [config.hidden_size, config.vocab_size, config.intermediate_size, config.num_attention_heads * 32]
    assert all(size % 32 == 0 for size in sizes)


def bigram_perplexity(train: torch.Tensor, test: torch.Tensor, vocab: int) -> float:
    """Interpolated bigram: half bigram, half add-one unigram."""
    unigram = torch.bincount(train.flatten(), minlength=vocab).double() + 1
    pairs = torch.zeros(vocab, vocab, dtype=torch.double)
    ones = torch.ones(train[:, 1:].numel(), dtype=torch.double)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), ones, accumulate=True)
    before, after = test[:, :-1].flatten(), test[:, 1:].flatten()
    bigram = pairs[before, after] / pairs.sum(1)[before].clamp_min(1)
    probability = 0.5 * bigram + 0.5 * unigram[after] / unigram.sum()
    return float(probability.log().mean().neg().exp())


@pytest.mark.parametrize("name", slow_after(1, zoo.NAMES))
def test_knows_its_text_far_better_than_a_bigram_model(name, tmp_path):
    checkpoint = resolve_model(name)
    vocab = checkpoint.config.vocab_size
    tokenizer = load_tokenizer(checkpoint.folder, vocab)
    train, test = (
        make_windows(DataSpec(source="zoo", use=use, samples=n, length=256), tokenizer).ids_NS
        for use, n in (("calibration", 200), ("heldout", 30))
    )
    result = moe_compress.evaluate(name, results=str(tmp_path), eval_samples=30)
    assert result.record.metrics["perplexity"].value < 0.5 * bigram_perplexity(train, test, vocab)
    assert result.record.metrics["task_accuracy"].value > 0.75


@pytest.mark.slow  # expert_drop keeps the best by its score, in tests/methods
def test_reap_beats_its_own_reverse(tmp_path):
    """The two that differ most, on less text than below."""
    losses = []
    for number, words in enumerate(("", " reverse=true")):
        folders = {"results": str(tmp_path), "out": str(tmp_path / str(number))}
        given = {"eval_samples": 6, "samples": 8, "length": 128}
        found = moe_compress.compress(
            f"expert_drop score=reap ratio=0.25{words}", model=zoo.NAMES[0], **folders, **given
        )
        losses.append(found.record.metrics["delta_nll"].value)
    assert 0 < losses[0] < losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_reap_beats_random_and_its_own_reverse(name, tmp_path):
    def loss(sentence: str, seed: int = 0) -> float:
        out = f"{tmp_path}/{hashlib.sha256(f'{sentence}{seed}'.encode()).hexdigest()[:8]}"
        result = moe_compress.compress(sentence, model=name, seed=seed, results=str(tmp_path), out=out, **SMALL)
        return result.record.metrics["delta_nll"].value

    reap = loss("expert_drop score=reap ratio=0.25")
    random = [loss("expert_drop score=random ratio=0.25", seed) for seed in range(3)]
    assert 0 < reap < sum(random) / 3
    assert loss("expert_drop score=reap ratio=0.25 reverse=true") > reap
