"""Gram matrices made of others when they are asked for: none of these holds more than what it is given.

E experts, I inputs. Each is a `Grams`; they can be put around one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_compress.methods.factorisation.structures import Grams


@dataclass(frozen=True, slots=True)
class ShrunkGrams:
    """Sums of second moments that rare experts lean on: (1 - s) of their own, s of all tokens', s = n / (n + count).

    grams: sums over each expert's tokens; pooled_II: over all experts'; counts: the tokens of each; prior: n, the count
    at which own and common weigh the same. An expert without tokens has what one token of all would be on average.
    """

    grams: Grams
    pooled_II: Tensor
    counts: Sequence[float]
    prior: float

    def __len__(self) -> int:
        return len(self.grams)

    def __getitem__(self, e: int) -> Tensor:
        own_II, count = self.grams[e], self.counts[e]
        share = self.prior / (self.prior + count) if self.prior + count else 0.0
        common = max(count, 1) / max(sum(self.counts), 1)
        return (1 - share) * own_II + share * common * self.pooled_II.to(own_II)


@dataclass(frozen=True, slots=True)
class RescaledGrams:
    """S_e H S_e: the correlations of all tokens' inputs with each expert's own energies, where Grams are too large.

    pooled_II: H; diagonal_EI: each expert's sums of squares, which become the diagonals. Inputs that no token of all
    has used have none.
    """

    pooled_II: Tensor
    diagonal_EI: Tensor

    def __len__(self) -> int:
        return len(self.diagonal_EI)

    def __getitem__(self, e: int) -> Tensor:
        pooled_I = self.pooled_II.diagonal()
        own_I = self.diagonal_EI[e].to(self.pooled_II)
        scale_I = (own_I / pooled_I.where(pooled_I > 0, 1.0)).where(pooled_I > 0, 0.0).sqrt()
        return self.pooled_II * scale_I * scale_I[:, None]


@dataclass(frozen=True, slots=True)
class OrderedGrams:
    """The Grams of inputs in another order: place i is what was input order_EI[e, i] (of `alignment.align`)."""

    grams: Grams
    order_EI: Tensor

    def __len__(self) -> int:
        return len(self.grams)

    def __getitem__(self, e: int) -> Tensor:
        gram_II = self.grams[e]
        order_I = self.order_EI[e].to(gram_II.device)
        return gram_II[order_I][:, order_I]
