"""Losses towards what is kept of a teacher, against loops over tokens and against the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from moe_compress.methods import registry
from moe_compress.methods.recovery.divergences import divergence_of
from moe_compress.methods.recovery.kept_targets import bucket_divergence, keeping_of, sampled_kl, sampled_targets
from moe_compress.methods.recovery.kept_targets import top_targets as top_of

KINDS = ("forward", "reverse", "jsd")
SEED = torch.Generator().manual_seed(1)
STUDENT, TEACHER = (3 * torch.randn(5, 40, generator=SEED, dtype=torch.float64) for _ in range(2))


def naive(student: list[float], teacher: list[float], top: int, kind: str, temperature: float, beta: float) -> float:
    """The divergence of `top` probabilities and of what is left, in plain numbers."""
    p, q = ([math.exp(each / temperature) for each in row] for row in (teacher, student))
    p, q = ([each / math.fsum(row) for each in row] for row in (p, q))
    ids = sorted(range(len(p)), key=lambda i: -p[i])[:top]
    p, q = ([*(row[i] for i in ids), math.fsum(row[i] for i in range(len(row)) if i not in ids)] for row in (p, q))
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]

    def kl(this: list[float], other: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(this, other, strict=True))

    found = {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
    }
    return temperature**2 * found[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top", "temperature"), [(6, 1.0), (1, 2.5), (39, 0.7)])
def test_the_loss_of_the_likeliest_and_the_rest(kind, top, temperature):
    kept = top_of(TEACHER, top, temperature)
    assert kept["log_p"].dtype == torch.float16 and kept["ids"].dtype == torch.int16
    found = bucket_divergence(STUDENT, kept, kind, temperature, 0.3)
    rows = zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)
    expected = torch.tensor([naive(s, t, top, kind, temperature, 0.3) for s, t in rows], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=5e-3, atol=2e-4)
    whole = divergence_of(kind, temperature, 0.3)(STUDENT, TEACHER)
    if top == 39:  # what is left is one token
        assert torch.allclose(found, whole, rtol=5e-3, atol=2e-4)
    else:
        assert bool((found < whole).all())


def test_what_is_left_is_summed_up_however_little_it_is():
    student, teacher = torch.zeros(1, 200), torch.zeros(1, 200)
    student[0, :3] = torch.tensor([60.0, 59.0, 58.0])
    teacher[0, :3] = torch.tensor([40.0, 41.0, 39.0])
    student.requires_grad_()
    found = bucket_divergence(student, top_of(teacher, 3, 1.0), "forward", 1.0)
    found.sum().backward()
    expected = divergence_of("forward", 1.0, 0.5)(student.detach().double(), teacher.double())
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3)
    assert bool(student.grad.isfinite().all()) and float(student.grad[0, 3:].abs().max()) < 1e-12


@pytest.mark.parametrize(("top", "temperature"), [(8, 1.0), (1, 2.0), (5, 0.5)])
def test_draws_estimate_the_whole_divergence_without_bias(top, temperature):
    seeds = 4000
    student, teacher = (each[:2].repeat_interleave(seeds, 0) for each in (STUDENT, TEACHER))
    kept = sampled_targets(teacher, top, temperature, torch.Generator().manual_seed(0))
    found = sampled_kl(student, kept, temperature).view(2, seeds)
    expected = divergence_of("forward", temperature, 0.5)(STUDENT[:2], TEACHER[:2])
    error = found.std(1) / seeds**0.5
    # Rounding to fp16 is of the same sign for all seeds.
    assert bool(((found.mean(1) - expected).abs() < 4 * error + 2e-3 * expected).all())
    assert bool((error > 0).all()) and float(expected.min()) > 10 * float(error.max())


def test_gradients_of_draws_are_unbiased():
    student = STUDENT[:1].clone().requires_grad_()
    whole = torch.autograd.grad(divergence_of("forward", 1.0, 0.5)(student, TEACHER[:1]).sum(), student)[0]
    kept = sampled_targets(TEACHER[:1].expand(8000, -1), 8, 1.0, torch.Generator().manual_seed(3))
    mean = torch.autograd.grad(sampled_kl(student.expand(8000, -1), kept, 1.0).mean(), student)[0]
    assert float((mean - whole).abs().max()) < 0.03 * float(whole.abs().max())


@pytest.mark.parametrize("cache", ["topk", "sampled"])
def test_a_token_takes_six_bytes_an_id(cache):
    keeping = keeping_of(cache, 64, "forward", 1.0, 0.5)
    for vocabulary, most in ((151_936, 386), (32_768, 258)):
        logits = (4 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0))).bfloat16()
        kept = keeping.keep(logits, torch.Generator().manual_seed(0))
        assert sum(each.nbytes for each in kept.values()) == 2 * most
        # What was kept is what the teacher says, and what another says is not.
        assert float(keeping.disagreement(logits, kept).abs().max()) < 5e-3
        assert float(keeping.disagreement(logits.flip(1), kept).abs().min()) > 0.1


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("distill top=8", "would do nothing: it goes with cache="),
        ("distill cache=sampled divergence=reverse", "it goes with divergence=forward"),
        ("router_kd solver=ridge cache=topk", "it goes with solver=adam"),
        ("router_kd solver=ridge cache=topk top=8", "would do nothing"),
        ("distill cache=half", "allowed: none, topk, sampled"),
    ],
)
def test_words_that_mean_nothing_together(sentence, said):
    name, *words = sentence.split()
    with pytest.raises(ValueError, match=said):
        registry.find(name).bind(dict(word.split("=") for word in words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"loss": "logits,hidden:0.1"}, "loss=logits,hidden:0.1 with cache=topk: a cache holds next-token"),
        ({"loss": "logits,experts"}, "no hidden states, routing or experts"),
        ({"loss": "router"}, "no hidden states, routing or experts"),
        ({"loss": "labels"}, "nothing is asked of the original"),
        ({"top": 0}, "top=0: at least 1 token is needed"),
    ],
)
def test_losses_that_a_cache_cannot_give(words, said):
    with pytest.raises(ValueError, match=said):
        registry.find("distill").run(**{"cache": "topk", **words})
