"""Which options of a run a command uses: what it would take without a word, and do nothing with, is refused.

`compress` and `plan` take them all. In Python one set of options may go to every function.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moe_compress.run.options import Options

ROWS = ("fields", "template", "system")
CALIBRATION = (
    "data", "data_config", "data_split", "data_field", "samples", "length", "pack", "seed", *ROWS, "assistant_only",
)  # fmt: skip
EVALUATION = ("eval_data", "eval_config", "eval_split", "eval_field", "eval_samples", "eval_length", *ROWS)
ARITHMETIC = ("dtype", "device", "attn", "threads")
MODEL = ("revision", "trust_remote_code")
# How records are made, and what they are called.
RECORD = (*EVALUATION, *ARITHMETIC, *MODEL, "resident", "seed", "name", "results")
USED: dict[str, tuple[str, ...]] = {
    "evaluate": RECORD,
    "apply": (*RECORD, "model", "eval", "out"),
    "watch": (*EVALUATION, *ARITHMETIC, "trust_remote_code", "resident", "seed", "results"),
    "analyze": (*CALIBRATION, *ARITHMETIC, *MODEL, "mix", "results"),
    "show_data": (*CALIBRATION, *MODEL),
    "compare": (*EVALUATION, *ARITHMETIC, "trust_remote_code", "results"),
    "export_imatrix": (*CALIBRATION, *ARITHMETIC, *MODEL, "results"),
}


def require_used(command: str, own: Collection[str], used: Collection[str], words: Mapping[str, object]) -> None:
    """Raise ValueError for an option of a run that a command does not use; none are named: it may use any."""
    idle = next((key for key in words if key in Options.model_fields and key not in {*own, *used, "model"}), None)
    if used and idle is not None:
        known = [*dict.fromkeys([*own, *used])]
        raise ValueError(f"{command} would do nothing with {idle}=; what it uses: {', '.join(known)}.")
