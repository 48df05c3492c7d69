"""The model card of a checkpoint, README.md, made of what its files say. This module knows nothing of ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_compress.checkpoints.folder import CARD, read_manifest
from moe_compress.checkpoints.formats.registry import Loaders, format_in
from moe_compress.checkpoints.quantization_config import packed_edits, says_packed, scale_bytes
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.apply import apply_edits
from moe_compress.models import hf
from moe_compress.models.sizes import sizes
from moe_compress.reports.record import Metric, Record
from moe_compress.reports.table import SAME, sentence_of
from moe_compress.utils.files import atomic_write
from moe_compress.utils.yaml_text import parse_yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# How the licences that name themselves in their first lines are called on the hub.
LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit", "GNU AFFERO": "agpl-3.0", "GNU GENERAL": "gpl-3.0"}
LICENCE_KEYS = ("license", "license_name", "license_link")
FIRST_LINES = 400
# Of a card or a licence, so many letters are read.
MOST_CARD = 1 << 20
SIZES = {
    "parameters": "stored parameters",
    "bytes": "bytes of weights",
    "touched": "parameters touched per token",
    "flops_per_token": "FLOPs per token",
}
PLAIN = """```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
```"""
EDITED = """Its layers differ from what the ordinary architecture can say, so that it has a `model_type` of its own.
With moe-compress installed:

```python
import moe_compress

model = moe_compress.load({name!r})
```

Without it, run the files of this folder (read them first):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)
```"""
PACKED = """Its weights are packed. `moe_compress.load({name!r})` keeps them so in memory; {stock}."""
FULL = "Its experts were held in factors, whose products are stored here as full matrices: no memory is saved."
NO_STOCK = "the files of this folder do so as well"


def model_card(
    manifest: Mapping[str, Any],
    record: Record | None = None,
    original: Record | None = None,
    *,
    name: str,
    packed: bool = False,
    stock: str = Loaders().card,
    base_card: str = "",
    licence_text: str = "",
    licence_files: Sequence[str] = (),
    sizes: Sequence[Mapping[str, float]] = (),
) -> str:
    """The card as Markdown with a YAML head.

    manifest: what moe_compress.json holds, and as `loader` an auto class that is not the usual one; record, original:
    of the evaluation, if there was one; name: the checkpoint's; packed: whether its weights are of few bits; stock:
    what stock transformers then makes of them; base_card, licence_text: README.md and LICENSE of the original, '' where
    it has none; licence_files: those that come with this folder; sizes: this one's and the original's, where there is
    no record.
    """
    licence = licence_of(base_card, licence_text)
    base = _base_name(manifest)
    edited = manifest.get("form") == "edited"
    methods = [str(stage["method"]) for stage in manifest["stages"]]
    parts = [
        _head(manifest, licence, methods, edited),
        f"# {_line(name)}",
        f"`{base}`, compressed by moe-compress with the recipe\n\n"
        f"    {_line(sentence_of(manifest['stages'])) or 'of a plan'}",
        *([FULL] if manifest.get("full_matrices_from") else []),
        f"{_after(manifest)} Everything that the card of the original says of its limits holds here too.",
        "## How to load it\n\n" + _loading(name, edited, packed, stock, manifest.get("loader", "AutoModelForCausalLM")),
        *([_measured(record)] if record is not None else []),
        _sizes([each.sizes for each in (record, original) if each is not None] or sizes),
        _hashes(manifest, record),
        f"## Licence\n\n{_licence_words(licence, base, licence_files)}",
    ]
    text = "\n\n".join(parts) + "\n\n"
    return f"{text}<!-- moe-compress {_mark(text)} -->\n"


def _after(manifest: Mapping[str, Any]) -> str:
    """Whether a stage that recovers has changed weights since; such a stage reports its teacher."""
    if any("teacher" in stage for stage in manifest.get("report", ())):
        return "It was trained afterwards, on calibration text alone, to give what its teacher gives."
    return "It was not trained afterwards."


def untouched(card: str) -> bool:
    """Whether a card is as it was written: it ends in a mark that says what stands before it."""
    text, _, mark = card.rpartition("<!-- moe-compress ")
    return mark == f"{_mark(text)} -->\n"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def licence_of(base_card: str, licence_text: str = "") -> dict[str, str]:
    """The licence entries of a card's head; else what the licence's first lines say it is; empty where neither does."""
    head = re.match(r"---\s*\n(.*?)\n---", base_card, re.DOTALL)
    try:
        values = parse_yaml(head[1], CARD) if head else None
    except ValueError:
        values = None
    found = {key: str(values[key]) for key in LICENCE_KEYS if values.get(key)} if isinstance(values, dict) else {}
    if found or not licence_text:
        return found
    first = licence_text[:FIRST_LINES].lower()
    return {"license": next((name for words, name in LICENCES.items() if words.lower() in first), "other")}


def _line(text: str) -> str:
    return " ".join(text.split())


def _base_name(manifest: Mapping[str, Any]) -> str:
    """A hub id as it is; of a folder only its name, for the path to it is nobody else's business."""
    model = str(manifest["base"]["model"])
    return model if _on_hub(manifest) else re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def _on_hub(manifest: Mapping[str, Any]) -> bool:
    base = manifest["base"]
    return bool(base.get("commit")) and bool(HUB_ID.fullmatch(str(base["model"])))


def _head(manifest: Mapping[str, Any], licence: Mapping[str, str], methods: Sequence[str], edited: bool) -> str:
    values: dict[str, Any] = {}
    if _on_hub(manifest):
        values["base_model"] = manifest["base"]["model"]
        if set(methods) == {"quantize"}:
            values["base_model_relation"] = "quantized"
    values |= licence
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    code = ["custom_code"] if edited else []
    experts = ["mixture-of-experts"] if "densify" not in methods else []
    values["tags"] = list(dict.fromkeys([*experts, "moe-compress", *methods, *code]))
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _loading(name: str, edited: bool, packed: bool, stock: str, loader: str) -> str:
    words = (EDITED if edited else PLAIN).format(name=name, loader=loader)
    return words + ("\n\n" + PACKED.format(name=name, stock=NO_STOCK if edited else stock) if packed else "")


def _measured(record: Record) -> str:
    text = record.protocol["text"]
    how = (
        f"{text['tokens']:,} held-out tokens of {text['source']}, {record.protocol['dtype']} on "
        f"{record.protocol['device']}, protocol `{record.protocol['id']}`. Change of NLL: of the mean negative log "
        "likelihood per token, paired by document with the original's."
    )
    rows = [f"| {name} | {_value(name, metric)} | {metric.unit} |" for name, metric in record.metrics.items()]
    return "\n".join(["## What it cost", "", how, "", "| | value [95 % interval] | unit |", "|---|---|---|", *rows])


def _value(name: str, metric: Metric) -> str:
    form = "+.4f" if name.startswith("delta_") else ".4f"
    if metric.interval is None:
        return f"{metric.value:{form}}"
    low, high = metric.interval
    same = f", {SAME}" if name.startswith("delta_") and low <= 0 <= high else ""
    return f"{metric.value:{form}} [{low:{form}}, {high:{form}}]{same}"


def _sizes(sizes: Sequence[Mapping[str, float]]) -> str:
    """This one's, and the original's behind it."""
    rows = ["## Sizes", "", "| | this | original |", "|---|---|---|"]
    for key, name in SIZES.items():
        cells = [f"{each[key]:,.0f}" if key in each else "" for each in sizes]
        if any(cells):
            rows.append(f"| {name} | {' | '.join([*cells, '', ''][:2])} |")
    return "\n".join(rows)


def _hashes(manifest: Mapping[str, Any], record: Record | None) -> str:
    base = manifest["base"]
    found = {
        "identity of the recipe on this model and text": manifest["identity"],
        "fingerprint of the original": base["fingerprint"],
        "commit of the original": base.get("commit"),
        "digest of the record": record.digest if record is not None else None,
    }
    lines = [f"- {name}: `{value}`" for name, value in found.items() if value]
    texts = dict.fromkeys(entry["calibration"]["hash"] for entry in manifest["report"] if _has_text(entry))
    lines += [f"- calibration text: `{text}`" for text in texts]
    return "\n".join(["## Hashes", "", *lines, "", "`plan.json` and `moe_compress.json` of this folder say it all."])


def _has_text(entry: Mapping[str, Any]) -> bool:
    return bool((entry.get("calibration") or {}).get("hash"))


def _licence_words(licence: Mapping[str, str], base: str, files: Sequence[str]) -> str:
    if not licence:
        return f"That of the original, `{base}`, which does not say here what it is: look there before using it."
    name = licence.get("license_name") or licence["license"] if "license" in licence else licence["license_name"]
    where = f" Its text: {', '.join(f'`{name}`' for name in files)}." if files else ""
    return f"That of the original, `{base}`: {_line(name)}.{where}"


LICENCE_FILES = ("LICENSE*", "LICENCE*")


def card_of(
    name: str,
    base: Checkpoint,
    manifest: Mapping[str, Any],
    values: Mapping[str, Any],
    record: Record | None = None,
    original: Record | None = None,
) -> str:
    """The card of a checkpoint made from `base`; values: its config.json."""
    counted = () if record else [_sizes_from_config(base, each) for each in (values, base.values)]
    licences = [path for pattern in LICENCE_FILES for path in sorted(base.folder.glob(pattern))]
    return model_card(
        {**manifest, "loader": base.auto_class.__name__}, record, original,
        name=name, packed=says_packed(values), stock=format_in(values).loaders.card,
        base_card=_text(base.folder / CARD), licence_text=_text(licences[0]) if licences else "",
        licence_files=[path.name for path in licences], sizes=counted,
    )  # fmt: skip


def _sizes_from_config(base: Checkpoint, values: Mapping[str, Any]) -> dict[str, float]:
    """What a config alone says of a checkpoint that was not evaluated; FLOPs depend on a text and are left out."""
    model = hf.skeleton(hf.config_from(dict(values)), base.stored_dtype)
    apply_edits(model, packed_edits(model, values))
    found = sizes(model, 1, base.stored_dtype, scale_bytes(values)).to_json()
    return {key: value for key, value in found.items() if key != "flops_per_token"}


def update_card(checkpoint: Checkpoint, base: Checkpoint, record: Record, original: Record) -> None:
    """Put an evaluation into the card that was written with a checkpoint of ours; nothing for any other folder."""
    manifest, path = read_manifest(checkpoint.folder), checkpoint.folder / CARD
    if manifest is None or manifest["base"]["fingerprint"] != base.fingerprint:
        return
    # A card that was changed since it was written is its owner's.
    if untouched(_text(path)):
        card = card_of(checkpoint.folder.name, base, manifest, checkpoint.values, record, original)
        atomic_write(path, card.encode())


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MOST_CARD)
