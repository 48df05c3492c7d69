"""Options of a run: what belongs to it and to no single stage, typed, with defaults."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from moe_compress import zoo
from moe_compress.data.sources import windows_named
from moe_compress.utils.choices import Means, coerce, one_of, unknown_key
from moe_compress.utils.declarations import Declaration, Parameter

DTYPE_NAMES = ("bfloat16", "float16", "float32")
COUNTS = ("samples", "length", "eval_samples", "eval_length")
LIMITS = {**dict.fromkeys((*COUNTS, "seed"), (0, 2**31 - 1)), "threads": (1, 1024)}
# An option that came later: left out of a written recipe while it is unset, so that recipes keep their names.
Later = Field(exclude_if=operator.not_)
MAX_NAME = 200  # bytes; file systems allow 255, and endings such as `.stage1.partial` come behind


class Options(BaseModel):
    """What belongs to the run and to no single stage. 0 and empty mean: the default for this model.

    model: zoo name, local folder or hub id; revision: hub branch, tag or commit; data, samples, length, pack, mix
    and data_*: the calibration text; eval_*: the evaluation text (eval=false: none); fields, template, system,
    assistant_only: rows and conversations of texts; allow_overlap: of the two texts; seed: of the text's order and
    of every method that draws; dtype, device, attn: the arithmetic; out: the checkpoint's folder; name: the record's;
    trust_remote_code: run code that the model holds, such as a tokenizer's (never said by a recipe file).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = "tiny-mixtral"
    revision: Annotated[str | None, Means("none: the default branch")] = None
    data: Annotated[str, Means("empty: the zoo's for shipped models, else c4")] = ""
    data_config: Annotated[str | None, Means("none: its default")] = None
    data_split: Annotated[str | None, Means("none: train")] = None
    data_field: str = "text"
    samples: Annotated[int, Means("0: as many as the sources name, else 64 for shipped models, 128 for others")] = 0
    length: Annotated[int, Means("0: 256 for shipped models, else 2048")] = 0
    pack: bool = True
    mix: Annotated[str, Means("empty: domains as they come")] = ""
    fields: Annotated[str, Later, Means("empty: the names that are common")] = ""
    template: Annotated[str, Later, Means("empty: the tokenizer's own")] = ""
    system: Annotated[str, Later, Means("empty: none")] = ""
    assistant_only: Annotated[bool, Later] = False
    allow_overlap: Annotated[bool, Later] = False
    eval: bool = True
    eval_data: Annotated[str, Means("empty: the zoo's for shipped models, else wikitext2")] = ""
    eval_config: Annotated[str | None, Means("none: its default")] = None
    eval_split: Annotated[str | None, Means("none: validation, of wikitext2 test")] = None
    eval_field: str = "text"
    eval_samples: Annotated[
        int, Means("0: as many as the sources name, else 216 for shipped models, 128 for others")
    ] = 0
    eval_length: Annotated[int, Means("0: 256 for shipped models, else 2048")] = 0
    resident: bool = False
    seed: int = 0
    dtype: Annotated[str, Means("auto: float32 on a CPU, bfloat16 on a GPU")] = "auto"
    device: Annotated[str, Means("auto: the first GPU, else the CPU")] = "auto"
    attn: Annotated[str | None, Means("none: the model's own choice")] = None
    threads: Annotated[int | None, Means("none: as many as torch takes")] = None
    out: Annotated[str, Means("empty: a folder in results= that is named after model and recipe")] = ""
    name: Annotated[str, Means("empty: that of the checkpoint's folder, and an identity")] = ""
    results: str = "runs"
    trust_remote_code: bool = False

    def resolved(self) -> Options:
        """Every default written out. Zoo models use the zoo's own text in short windows, others C4 and WikiText-2."""
        small = zoo.descends_from(self.model)
        named, eval_named = windows_named(self.data), windows_named(self.eval_data)
        filled: dict[str, Any] = {
            "data": self.data or ("zoo" if small else "c4"),
            "samples": self.samples or named or (64 if small else 128),
            "length": self.length or (256 if small else 2048),
            "eval_data": self.eval_data or ("zoo" if small else "wikitext2"),
            "eval_samples": self.eval_samples or eval_named or (216 if small else 128),
            "eval_length": self.eval_length or (256 if small else 2048),
        }
        return self.model_copy(update=filled)


def option_parameters() -> dict[str, Parameter]:
    """Options as parameters, with what their defaults stand for."""
    found = {}
    for key, each in Options.model_fields.items():
        means = [said for said in each.metadata if isinstance(said, Means)]
        hint = cast(Any, Annotated)[each.annotation, *means] if means else each.annotation
        found[key] = Parameter(hint, each.default)
    return found


def make_options(given: Mapping[str, Any]) -> Options:
    """Typed options from words or Python values; ValueError says what would have worked."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in Options.model_fields:
            raise ValueError(unknown_key(key, Options.model_fields))
        values[key] = coerce(Options.model_fields[key].annotation, value, key)
    options = Options(**values)
    for key, (least, most) in LIMITS.items():
        if (value := getattr(options, key)) is not None and not least <= value <= most:
            raise ValueError(f"{key}={value}: a number from {least} to {most} is needed.")
    for key in ("name", "out", "results"):
        name = Path(getattr(options, key)).name
        if "\0" in name or len(name.encode(errors="surrogateescape")) > MAX_NAME:
            raise ValueError(f"{key}={name[:40]!r}...: a name of at most {MAX_NAME} bytes, none of them 0, is needed.")
    require_arithmetic(options.device, options.dtype)
    if "/" in options.name:
        raise ValueError(f"name={options.name}: a record's name has no `/`; the checkpoint's folder is out=.")
    return options


def require_arithmetic(device: str, dtype: str) -> None:
    """Raise ValueError for names that are no devices or dtypes; whether the machine has them is another matter."""
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", device):
        known = re.fullmatch(r"(mps|xpu|hpu|meta|xla|mtia)(:\d+)?", device)
        raise ValueError(f"device={device} is not {'supported' if known else 'a device'}: use auto, cpu or cuda[:N].")
    if dtype != "auto":
        one_of(dtype, DTYPE_NAMES, "dtype")


def typed_words(command: str, declaration: Declaration, words: Mapping[str, Any]) -> dict[str, Any]:
    """A command's own words in the types of their annotations, and options of a run, where it takes them, as they are.

    Raises ValueError, with what would have worked, for words that it does not know or that are of another type.
    """
    own = declaration.parameters
    others = {key: value for key, value in words.items() if key not in own}
    if declaration.takes_others:
        make_options({key: value for key, value in others.items() if key != "model"})
    elif others:
        known = sorted(own, key=lambda key: key in ("original", "results"))
        raise ValueError(f"{command} has no option {next(iter(others))!r}; it takes: {', '.join(known)}.")
    typed = {key: coerce(own[key].hint, value, key) for key, value in words.items() if key in own}
    if "device" in own:
        require_arithmetic(typed.get("device", "auto"), typed.get("dtype", "auto"))
    return {**others, **typed}
