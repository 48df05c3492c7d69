"""Plans as files: every stage's edits, the scores behind them, and the tensors they bring along.

`plan.json` can be read, changed and applied again; edits are carried out in order, each naming layers and experts
as they are numbered when its turn comes. `plan.safetensors` holds alignments and constants, where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_compress.edits.edits import Edit, Plan, from_json, to_json
from moe_compress.utils.files import read_json

PLAN, ARRAYS = "plan.json", "plan.safetensors"
VERSION = 2
_SCORES, _REPORT = TypeAdapter(dict[int, list[float | None]]), TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class StagePlan:
    """What one stage of a recipe decided, and which parameters it was given."""

    method: str
    plan: Plan
    given: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the tensors."""
        return {
            "method": self.method,
            "given": dict(self.given),
            "edits": [to_json(edit) for edit in self.plan.edits],
            "scores": {str(layer): values for layer, values in self.plan.scores.items()},
            "report": self.plan.report,
        }


def plan_values(stages: Sequence[StagePlan], base: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of all stages for the first one's model, as JSON."""
    return {"version": VERSION, "base": dict(base), "stages": [stage.to_json() for stage in stages]}


def applied(stages: Sequence[StagePlan], identity: str) -> dict[str, Any]:
    """What a record says of a plan that was applied: the stages that made it, and which edits these were in the end."""
    written = [" ".join([s.method, *(f"{key}={value}" for key, value in s.given.items())]) for s in stages]
    words = {"plan": " + ".join(written), "edits": identity[:6]}
    return {"method": "apply", "given": words, "parameters": words}


def plan_arrays(stages: Sequence[StagePlan]) -> dict[str, Tensor]:
    """The tensors of all edits, by `stage.kind of edit.layer.name`, so that edits may be removed or change places."""
    return {
        f"{s}.{edit.edit}.{edit.layer}.{name}": tensor.contiguous()
        for s, stage in enumerate(stages)
        for edit in stage.plan.edits
        for name, tensor in edit.arrays.items()
    }


def read_plan(path: Path) -> tuple[list[StagePlan], dict[str, Any]]:
    """(stages, the model they were made for) of a plan file; ValueError says what is wrong with it."""
    values = read_json(path)
    if not isinstance(values, dict) or "base" not in values:
        raise ValueError(f"{path} is not a plan of moe-compress: it needs `base` and a list of `stages`.")
    if values.get("version") != VERSION:
        raise ValueError(f"{path} is a plan of version {values.get('version')}; this version reads {VERSION}.")
    if not isinstance(values["base"], dict) or not isinstance(values["base"].get("model"), str):
        raise ValueError(f"{path} does not say which model it is for: it needs `base` with a `model`.")
    stages = values.get("stages")
    listed = isinstance(stages, list) and all(isinstance(s, dict) and isinstance(s.get("edits"), list) for s in stages)
    if stages == []:
        raise ValueError(f"{path} has no stages: there is nothing to apply.")
    if not isinstance(stages, list) or not listed:
        raise ValueError(f"{path} is not a plan of moe-compress: every one of its `stages` needs a list of `edits`.")
    arrays = _read_arrays(path.with_name(ARRAYS))
    return [_stage(path, number, stage, arrays) for number, stage in enumerate(stages)], values["base"]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}): make the plan anew.") from error


def _stage(path: Path, number: int, values: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> StagePlan:
    edits = [_edit(path, number, edit, arrays) for edit in values["edits"]]
    try:
        scores, report = (
            _SCORES.validate_python(values.get("scores", {})),
            _REPORT.validate_python(values.get("report", {})),
        )
    except ValidationError as error:
        found = error.errors()[0]
        where = "".join(f" of {part}" for part in reversed(found["loc"]))
        raise ValueError(
            f"{path}: the `scores` of a stage are a list of numbers for each layer, its `report` an object; "
            f"{found['input']!r:.60}{where} is none."
        ) from error
    given = values.get("given")
    words = {str(key): value for key, value in given.items()} if isinstance(given, dict) else {}
    return StagePlan(str(values.get("method", "plan")), Plan(edits, scores, report), words)


def _edit(path: Path, stage: int, values: Any, arrays: Mapping[str, Tensor]) -> Edit:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: an edit is an object such as {{'edit': 'drop_layer', 'layer': 3}}, not {values!r}.")
    prefix = f"{stage}.{values.get('edit')}.{values.get('layer')}."
    try:
        edit = from_json(values, {k.removeprefix(prefix): t for k, t in arrays.items() if k.startswith(prefix)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if edit.needed_array is not None and edit.needed_array not in edit.arrays:
        raise ValueError(f"{path}: the tensors of its edit on layer {edit.layer} are not in {ARRAYS} beside it.")
    strange = sorted(edit.arrays.keys() - {edit.needed_array})
    if strange:
        raise ValueError(f"{path}: its edit {edit.edit} of layer {edit.layer} takes no tensor {strange[0]!r}.")
    return edit
