"""Who may import whom, and how large files and functions may grow: read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "moe_compress"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60

# Module or package -> all that it may import of ours; the longest matching entry counts. Top-level modules that
# have no entry are the ones that put the parts together, and may import anything but __main__.
ALLOWED = {
    "registry": (),
    "runtime": (),
    "zoo": ("zoo",),
    "report": ("report",),
    "model": ("model", "runtime"),
    "checkpoint": ("checkpoint", "model", "runtime", "zoo"),
    "stream": ("stream", "checkpoint", "model", "runtime"),
    "stream.documents": ("runtime", "zoo"),
    "stream.data": ("stream.documents", "model", "runtime", "zoo"),
    "stream.observers": ("model", "runtime"),
    "stream.probe": ("stream.observers", "model"),
    "stream.turns": ("stream.observers",),
    "stream.observed": ("stream.probe", "model"),
    "stream.inputs": ("stream.observers", "model"),
    "methods": ("methods", "registry", "model", "stream.observed", "stream.probe", "stream.inputs"),
    "plans": ("model", "runtime"),
    "harness": ("harness", "stream", "checkpoint", "model", "runtime", "zoo"),
}
# Libraries that a part must do without, whoever else uses them.
WITHOUT = {
    "registry": ("torch", "transformers", "numpy"),
    "report": ("torch", "transformers", "numpy"),
    "report.pareto": ("torch", "transformers"),
    "methods": ("transformers", "safetensors", "pathlib", "os", "shutil"),
}
# The seam to transformers: the only places that may reach into its modules.
SEAM = ("model.hf", "model.edited", "model.expert_forward")
# Files that are shipped inside edited checkpoints: what they may import at all, and of each other, relatively.
SHIPPED = {
    "model.edited": ("model.edited_layers",),
    "model.edited_layers": (
        "model.expert_forward",
        "model.packed",
        "model.rerouting",
        "model.rounding",
        "model.separate",
    ),
    "model.expert_forward": ("model.rounding", "model.separate"),
    "model.codes": (),
    "model.kernels": ("model.codes", "model.rounding"),
    "model.packed": ("model.codes", "model.kernels", "model.rounding"),
    "model.rerouting": ("model.separate",),
    "model.rounding": (),
    "model.separate": ("model.rounding",),
}
SHIPPED_WITH = (
    "math",
    "warnings",
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "typing",
    "torch",
    "transformers",
)


def module_name(file: Path) -> str:
    """`model/hf/names.py` -> `model.hf.names`; a package is called like its folder, ours ``."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imported(name: str) -> Iterator[tuple[str, bool]]:
    """Full dotted names that a module imports anywhere, and whether it does so when it is itself imported."""
    top = set(map(id, TREES[name].body))
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level == 1 and name in SHIPPED), f"{name} imports relatively"
            base = f"{PACKAGE}.{name.rpartition('.')[0]}." if node.level else ""
            for alias in node.names:
                inner = f"{base}{node.module}.{alias.name}"
                known = inner.removeprefix(PACKAGE + ".") in MODULES
                yield (inner if known else base + (node.module or "")), id(node) in top


def ours(name: str, at_import: bool = False) -> set[str]:
    """Modules of ours that a module imports."""
    found = (target for target, at_top in imported(name) if at_top or not at_import)
    return {target.removeprefix(PACKAGE).removeprefix(".") for target in found if target.split(".")[0] == PACKAGE}


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def rule_for(name: str, rules: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    fitting = [place for place in rules if within(name, (place,))]
    return rules[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_it_may(name):
    assert "__main__" not in ours(name)
    allowed = rule_for(name, ALLOWED)
    if allowed is not None:
        assert [target for target in ours(name) if not within(target, allowed)] == []
    unwanted = rule_for(name, WITHOUT) or ()
    assert [target for target, _ in imported(name) if within(target, unwanted)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, SEAM)])
def test_reaches_into_transformers_only_at_the_seam(name):
    assert [target for target, _ in imported(name) if target.startswith("transformers.")] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_need_torch_and_transformers_alone(name):
    relative = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]
    assert {f"model.{node.module}" for node in relative} == set(SHIPPED[name]) == ours(name)
    others = {target.split(".")[0] for target, _ in imported(name)} - {PACKAGE}
    assert others <= set(SHIPPED_WITH)
    assert name in ("model.edited", "model.expert_forward") or "transformers" not in others


def test_what_is_shipped_is_what_is_checked():
    from moe_compress.model.hf.architectures import SHIPPED as shipped

    assert {f"model.{name}": module.__name__ for name, module in shipped.items()} == {
        name: f"{PACKAGE}.{name}" for name in SHIPPED
    }


def test_every_rule_is_about_something():
    for rules in (ALLOWED, WITHOUT, SHIPPED):
        assert [place for place in rules if place not in MODULES] == []


def test_the_engine_names_no_family():
    from moe_compress.model.families import FAMILIES

    for name in ("stream.fold", "stream.surgery", "checkpoint.writer"):
        words = {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}
        assert not words & set(FAMILIES)


def test_no_family_is_asked_for_by_class():
    for name, tree in TREES.items():
        asked = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert [call for call in asked if call.startswith("isinstance(model,")] == [], name


def test_packages_form_no_cycle():
    def package(module: str) -> str:
        return module.split(".")[0]

    edges: dict[str, set[str]] = {}
    for name in MODULES:
        if name:  # the package's own __init__ only offers what api has
            edges.setdefault(package(name), set()).update({package(target) for target in ours(name)} - {package(name)})
    done: set[str] = set()
    while free := [name for name, targets in edges.items() if name not in done and targets <= done]:
        done.update(free)
    assert edges.keys() == done, {name: targets - done for name, targets in edges.items() if name not in done}


def test_modules_form_no_cycle_when_imported():
    edges = {name: ours(name, at_import=True) - {name} for name in MODULES if name}
    # A package's __init__ is run before its modules, so it is not an import of theirs.
    edges = {name: {t for t in targets if t and not name.startswith(t + ".")} for name, targets in edges.items()}
    done: set[str] = set()
    while free := [name for name, targets in edges.items() if name not in done and targets <= done]:
        done.update(free)
    assert edges.keys() == done, {name: targets - done for name, targets in edges.items() if name not in done}


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert ast.get_docstring(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
