"""Router KD: only routers learn, to make the compressed model say what the original says. The cheapest recovery."""

from __future__ import annotations

from typing import Literal

from moe_compress.methods.recovery.kept_targets import Cache, towards_teacher
from moe_compress.methods.recovery_method import Distillation, RouterFit, TeacherBits
from moe_compress.methods.registry import recovery_method

TRAINING = "solver=adam"
TRAINED_BY = (
    "steps", "batch", "lr", "warmup", "decay", "clip", "recompute", "keep", "holdout", "checkpoint_every",
    "log",
)  # fmt: skip


@recovery_method(
    group="recovery",
    paper="Router Knowledge Distillation (arXiv 2603.02217)",
    lr=1e-2,
    shown_in_names=("solver",),
    goes_with={
        "ridge": "solver=ridge",
        **dict.fromkeys(("temperature", "cache", "teacher_bits", *TRAINED_BY), TRAINING),
        "top": f"{TRAINING} and cache!=none",
        "keep_checkpoints": f"{TRAINING} and checkpoint_every!=0",
    },
)
def router_kd(
    *,
    solver: Literal["adam", "ridge"] = "adam",
    temperature: float = 1.0,
    ridge: float = 0.01,
    cache: Cache = "none",
    top: int = 64,
    teacher_bits: TeacherBits = "0",
) -> Distillation | RouterFit:
    """Train routers alone, on the next-token KL to the original; or fit them in closed form to its routing.

    solver: adam, by gradients of the whole model's next-token KL on unlabelled text; ridge, layer by layer, by a ridge
    regression of the original's routing on the hidden states that now arrive, without a gradient; temperature: of the
    KL; ridge: how much the router that is there counts, as a share of the mean square of what it multiplies; cache,
    top: run the original once on the text, and keep so many tokens of each distribution; teacher_bits: hold its weights
    in so few bits meanwhile (0: as they are); all three as for distill.
    """
    if solver == "ridge":
        if not 0.0 < ridge < float("inf"):
            raise ValueError(f"ridge={ridge:g}: a number above 0 is needed.")
        return RouterFit(ridge=ridge)
    return towards_teacher(
        frozenset({"routers"}), {"logits": 1.0}, temperature=temperature, cache=cache, top=top,
        teacher_bits=teacher_bits,
    )  # fmt: skip
