"""The examples of docs/extending, put where their pages say."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moe_compress.evaluation import harnesses
from moe_compress.methods import registry, score_registry
from moe_compress.utils import declarations
from support.pages import DOCS, blocks, examples


def forget(module: str) -> None:
    """Take a module, and whatever it registered, out again."""
    for table, module_of in (
        (registry.METHODS, lambda each: each.declaration.module),
        (registry.IMPLEMENTATIONS, lambda each: each.run.__module__),
        (harnesses.HARNESSES, lambda each: each.declaration.module),
        (score_registry._SCORES, lambda each: each.function.__module__),
    ):
        for name in [name for name, each in table.items() if module_of(each) == module]:
            del table[name]
            for names in declarations._REGISTERED.values():
                names[:] = [each for each in names if each != name]
    sys.modules.pop(module, None)
    declarations.declarations.cache_clear()


def examples_of(page: str) -> list[tuple[Path, str]]:
    """Where a page under docs/extending says that files lie, and what is in them."""
    text = (DOCS / "extending" / f"{page}.md").read_text(encoding="utf-8")
    return [(Path(path), code) for path, code in zip(examples(text), blocks(text, "python"), strict=True)]


@pytest.fixture
def in_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """page -> the name of its (first) example as a module of the package, which is there but not imported."""
    with contextlib.ExitStack() as stack:

        def put(page: str) -> str:
            found = examples_of(page)
            folder, package = tmp_path_factory.mktemp("source"), "moe_compress"
            for part in found[0][0].parent.parts[2:]:
                folder, package = folder / part, f"{package}.{part}"
                folder.mkdir()
                importlib.import_module(package).__path__.append(str(folder))
                stack.callback(importlib.import_module(package).__path__.remove, str(folder))
            for path, code in found:
                (folder / path.name).write_text(code, encoding="utf-8")
                stack.callback(forget, f"{package}.{path.stem}")
            importlib.invalidate_caches()
            declarations.declarations.cache_clear()
            return f"{package}.{found[0][0].stem}"

        yield put


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """(page, name) -> its (first) example, imported as a module of that name that belongs to no package."""
    with contextlib.ExitStack() as stack:

        def put(page: str, name: str) -> ModuleType:
            (tmp_path / f"{name}.py").write_text(examples_of(page)[0][1], encoding="utf-8")
            monkeypatch.syspath_prepend(str(tmp_path))
            stack.callback(forget, name)
            return importlib.import_module(name)

        yield put
