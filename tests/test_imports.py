"""Who may import whom, and how large files and functions may grow: read from the sources."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "moe_compress"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
TESTS, SCRIPTS = Path(__file__).parent, ROOT.parents[1] / "scripts"
TEST_FILES = {path.stem for path in TESTS.rglob("*.py") if path.name.startswith("test_")} | {"conftest"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Package -> all that it may import of ours besides itself; the longest matching entry counts. `api` and `cli` are on
# top and may import everything below.
LAW: dict[str, tuple[str, ...]] = {
    "utils": (),
    "zoo": (),
    "models": ("utils",),
    "models.modeling": (),
    "edits": ("models", "utils"),
    "data": ("zoo", "utils"),
    "checkpoints": ("edits", "models", "zoo", "utils"),
    "engine": ("checkpoints", "data", "models", "utils"),
    "run": ("engine", "checkpoints", "data", "zoo", "utils", "reports.record"),
    "calibration": ("run", "engine", "checkpoints", "data", "edits", "models", "utils"),
    "methods": ("calibration.model_statistics", "calibration.output_sample", "edits", "models", "utils"),
    "recipes": ("methods", "run", "utils"),
    "reports": ("utils.files", "utils.logging", "utils.text"),
    "hub": ("reports", "checkpoints", "edits", "models", "utils"),
    "evaluation": ("run", "calibration", "engine", "data", "checkpoints", "edits", "models", "reports", "zoo", "utils"),
    "analysis": ("methods", "calibration", "run", "engine", "data", "checkpoints", "edits", "models", "reports",
                 "utils"),
    "compression": ("recipes", "methods", "calibration", "run", "engine", "data", "checkpoints", "edits", "models",
                    "hub", "reports", "utils"),
    "api": ("evaluation", "analysis", "compression", "recipes", "methods", "calibration", "run", "engine", "data",
            "checkpoints", "edits", "models", "hub", "reports", "zoo", "utils"),
}  # fmt: skip
ON_TOP = ("api", "cli", "__main__")
# Libraries that a part must do without, whoever else uses them.
WITHOUT = {
    "methods.registry": ("torch", "transformers", "numpy"),
    "reports": ("torch", "transformers", "numpy"),
    "reports.pareto": ("torch", "transformers"),
    "methods": ("transformers", "safetensors", "pathlib", "os", "shutil"),
}
# The seam to transformers: the only places that may reach into its modules.
SEAM = ("models.hf", "models.modeling.edited_model", "models.modeling.expert_forward")
# Files that are shipped inside edited checkpoints: they import each other relatively, and of all else only these.
MODELING = "models.modeling"
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
    """`models/hf/skeleton.py` -> `models.hf.skeleton`; a package is called like its folder, ours ``."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
SHIPPED = [name for name in MODULES if name.startswith(f"{MODELING}.")]


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(name: str) -> Iterator[tuple[str, bool]]:
    """Full dotted names that a module imports anywhere, and whether it does so when it is itself imported."""
    top = set(map(id, tree(name).body))
    for node in ast.walk(tree(name)):
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


@pytest.mark.parametrize("name", [name for name in MODULES if name and not within(name, ON_TOP[1:])])
def test_imports_only_what_the_law_allows(name):
    allowed = rule_for(name, LAW)
    assert allowed is not None, f"{name} is in no package of the law"
    own = MODELING if within(name, (MODELING,)) else name.split(".")[0]
    assert [target for target in ours(name) if not within(target, (*allowed, own))] == []
    unwanted = rule_for(name, WITHOUT) or ()
    assert [target for target, _ in imported(name) if within(target, unwanted)] == []


def test_the_root_holds_packages_alone():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "api.py"}
    assert [
        path
        for path in ROOT.rglob("*")
        if path.is_dir() and [*path.glob("*.py")] and not (path / "__init__.py").is_file()
    ] == []


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, SEAM)])
def test_reaches_into_transformers_only_at_the_seam(name):
    assert [target for target, _ in imported(name) if target.startswith("transformers.")] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_need_torch_and_transformers_alone(name):
    assert all(within(target, (MODELING,)) for target in ours(name))
    relative = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.level]
    assert {f"{MODELING}.{node.module}" for node in relative} == ours(name)
    others = {target.split(".")[0] for target, _ in imported(name)} - {PACKAGE}
    assert others <= set(SHIPPED_WITH)
    assert within(name, SEAM) or "transformers" not in others


def test_what_is_shipped_is_what_is_checked():
    from moe_compress.models.hf.edited_architectures import SHIPPED as shipped

    assert shipped == [MODULES[name] for name in SHIPPED]


def test_every_rule_is_about_something():
    for rules in (LAW, WITHOUT, ON_TOP):
        assert [place for place in rules if place not in MODULES] == []


def test_the_engine_names_no_family():
    from moe_compress.models.families import FAMILIES

    for name in ("engine.forward", "compression.surgery", "checkpoints.writer"):
        words = {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)}
        assert not words & set(FAMILIES)


def test_no_family_is_asked_for_by_class():
    for name in MODULES:
        asked = [ast.unparse(node) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
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


def test_any_module_may_be_the_first_that_is_imported():
    """`from moe_compress import zoo` asks the package's own __getattr__ before it looks for the folder."""
    subprocess.run([sys.executable, "-c", "from moe_compress.run.options import make_options"], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert ast.get_docstring(tree(name))
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def targets_of(file: Path) -> set[str]:
    """Dotted names that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update({str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def test_no_test_file_imports_another():
    for file in TESTS.rglob("*.py"):
        assert not [target for target in targets_of(file) if TEST_FILES & {*target.split(".")}], file


def test_no_script_imports_from_the_tests():
    helpers = {"tests", "support", *TEST_FILES, *(path.stem for path in (TESTS / "support").glob("*.py"))}
    for file in SCRIPTS.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not [target for target in targets_of(file) if target.split(".")[0] in helpers], file
        assert not ("sys.path" in text and '"tests"' in text), file
