"""Distillation: parts of the compressed model, or all of it, learn to say what the original says."""

from __future__ import annotations

from moe_compress.methods.recovery.divergences import Kind, divergence_of
from moe_compress.methods.recovery_method import Distillation, trained_parts, weighted_terms
from moe_compress.methods.registry import recovery_method


@recovery_method(
    group="recovery",
    paper="Distilling the Knowledge in a Neural Network (arXiv 1503.02531); GKD (arXiv 2306.13649)",
    shown_in_names=("train",),
    goes_with={"beta": "divergence=jsd"},
)
def distill(
    *,
    train: str = "experts,routers",
    loss: str = "logits",
    divergence: Kind = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Distillation:
    """Train the compressed model on what the original says of the calibration text.

    train: what of it, a comma-separated list of all, routers, experts, shared, attention, dense, norms and new
    (factors, and constants in place of experts); loss: a comma-separated list, each with its weight behind a colon, of
    logits (next-token divergence), hidden (squared error of what leaves each layer), router (KL of the routing) and
    labels (cross-entropy of the text itself); divergence, temperature, beta: forward KL, reverse KL, or generalised
    Jensen-Shannon with the original's share beta, of logits divided by the temperature.
    """
    terms = weighted_terms(loss)
    if "logits" not in terms and (divergence != "forward" or temperature != 1.0):
        said = f"divergence={divergence} temperature={temperature:g}"
        raise ValueError(f"{said} would do nothing: loss={loss} has no logits.")
    return Distillation(
        trains=trained_parts(train), terms=terms, divergence=divergence_of(divergence, temperature, beta)
    )
