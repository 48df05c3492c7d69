"""Experts and second moments as factorisation meets them: related or not, with spectra that fall by a power law."""

from __future__ import annotations

import torch
from torch import Tensor


class LazyGrams:
    """Gram matrices that are handed out one at a time, as from a disk; counts how often they were read."""

    def __init__(self, gram_EII: Tensor) -> None:
        self.gram_EII, self.reads = gram_EII, 0

    def __len__(self) -> int:
        return len(self.gram_EII)

    def __getitem__(self, e: int) -> Tensor:
        self.reads += 1
        return self.gram_EII[e].clone()


def spectral(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """A random matrix of mean square 1 with singular values n^-0.5, [O, I] in float64."""
    small = min(outputs, inputs)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64))[0] for n in (outputs, inputs)
    )
    matrix = left * torch.arange(1, small + 1) ** -0.5 @ right.T
    return matrix / matrix.square().mean().sqrt()


def experts(count: int, outputs: int, inputs: int, common: float = 0.0, seed: int = 0) -> Tensor:
    """Experts [E, O, I] in float64 that share `common` of their squares."""
    generator = torch.Generator().manual_seed(seed)
    base = spectral(outputs, inputs, generator)
    own = [spectral(outputs, inputs, generator) for _ in range(count)]
    return torch.stack([common**0.5 * base + (1 - common) ** 0.5 * one for one in own])


def grams(count: int, inputs: int, mixed: float = 0.5, seed: int = 1, power: float = 1.0) -> Tensor:
    """Second moments [E, I, I] in float64: eigenvalues n^-power, half in common directions, half in each one's own."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.arange(1, inputs + 1, dtype=torch.float64) ** -power
    value = value / value.mean()

    def turned() -> Tensor:
        turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))[0]
        return turn * value @ turn.T

    common = turned()
    return torch.stack([(1 - mixed) * common + mixed * turned() for _ in range(count)])


def loss(weight_EOI: Tensor, found_EOI: Tensor, gram_EII: Tensor) -> float:
    """sum tr(D H D')."""
    error_EOI = weight_EOI.double() - found_EOI.double()
    return float(torch.einsum("eoi,eij,eoj->", error_EOI, gram_EII.double(), error_EOI))


def planted(count: int, outputs: int, inputs: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(experts that are a core and a low rank each, the core)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    core = normal(outputs, inputs)
    return core + normal(count, outputs, rank) @ normal(count, rank, inputs), core
