"""What there is to choose from, as Markdown: methods and their parameters, families, shipped models."""

from __future__ import annotations

import inspect

from moe_compress import methods, registry, zoo
from moe_compress.checkpoint.reader import open_checkpoint
from moe_compress.model.families import ALIASES, FAMILIES, REFUSED
from moe_compress.runtime import gigabytes


def methods_markdown() -> str:
    """Every method: what it does, its parameters with types and defaults, its presets, its paper."""
    methods.register_all()
    parts = []
    for name, method in sorted(registry.METHODS.items()):
        lines = [f"### {name} ({method.group})", "", f"{method.summary} Paper: {method.paper}.", ""]
        lines += [f"- `{key}`: {_parameter(method, key)}" for key in method.parameters]
        if method.presets:
            lines.append(f"- presets: {', '.join(f'`preset={preset}`' for preset in method.presets)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n\n" + _families()


def _parameter(method: registry.Method, key: str) -> str:
    hint, default = method.hints[key], method.parameters[key].default
    name = inspect.formatannotation(hint).replace("typing.", "")
    return f"{name}" + ("" if default is inspect.Parameter.empty else f" = {default}")


def _families() -> str:
    lines = [
        "### Families",
        "",
        "Any Mixture-of-Experts causal language model of transformers that keeps its experts fused",
    ]
    lines[-1] += " and its router beside them. With entries of their own:"
    lines += ["", f"- {', '.join(sorted(FAMILIES))}"]
    lines += [f"- {name}: read as {target}" for name, target in ALIASES.items()]
    lines += [f"- {f.model_type}: experts stay, {f.no_expert_edits}" for f in FAMILIES.values() if f.no_expert_edits]
    lines += [f"- {name}: refused, {reason}" for name, reason in REFUSED.items()]
    return "\n".join(lines)


def zoo_markdown() -> str:
    """The shipped models with their sizes, and the hub ids whose shapes are known offline."""
    lines = ["### Shipped models", ""]
    for name in zoo.NAMES:
        checkpoint = open_checkpoint(zoo.path(name), name)
        lines.append(f"- `{name}`: {gigabytes(checkpoint.bytes)}, {checkpoint.num_layers} layers, {zoo.path(name)}")
    lines += ["", "### Shapes known offline (for `plan`)", ""]
    lines += [f"- `{hub_id}`" for hub_id in zoo.known_configs()]
    return "\n".join(lines)
