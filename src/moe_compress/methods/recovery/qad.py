"""QAD: quantization-aware distillation: what is in few bits learns to say what the original says, and stays so."""

from __future__ import annotations

from typing import Literal

from moe_compress.methods.recovery.divergences import Kind
from moe_compress.methods.recovery.kept_targets import Cache, towards_teacher
from moe_compress.methods.recovery_method import Distillation, TeacherBits
from moe_compress.methods.registry import recovery_method


@recovery_method(
    group="recovery",
    paper="QAD (arXiv 2601.20088); LSQ (arXiv 1902.08153)",
    lr=1e-4,
    shown_in_names=("learns",),
    goes_with={"beta": "divergence=jsd", "top": "cache!=none", "cache=sampled": "divergence=forward"},
)
def qad(
    *,
    learns: Literal["scales", "codes"] = "scales",
    divergence: Kind = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    cache: Cache = "none",
    top: int = 64,
    teacher_bits: TeacherBits = "0",
) -> Distillation:
    """Train quantized matrices on what the original says of the calibration text; they stay in the same format.

    learns: scales alone, codes as they are; or codes as well, rounded straight through in every step, where those
    that were pruned stay zero; divergence,
    temperature, beta, cache, top, teacher_bits: as for distill.
    """
    trains = frozenset({"scales"} if learns == "scales" else {"scales", "codes"})
    return towards_teacher(
        trains, {"logits": 1.0}, divergence=divergence, temperature=temperature, beta=beta, cache=cache, top=top,
        teacher_bits=teacher_bits,
    )  # fmt: skip
