"""The documentation holds together: links resolve, generated parts are current, nothing is left out or made up."""

from __future__ import annotations

import ast
import glob
import importlib
import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_compress.cli import catalogue
from moe_compress.evaluation.harnesses import HARNESSES
from moe_compress.methods import registry, score_registry
from moe_compress.run.options import option_parameters
from moe_compress.utils.declarations import REQUIRED, Parameter, function_of
from support.pages import DOCS, PAGES, ROOT, SPAN, blocks, examples, prose, shown

SOURCE = ROOT / "src" / "moe_compress"
LINK = re.compile(r"\]\(([^()\s]+)\)")
# Files that checkpoints hold, and those of other programs.
ELSEWHERE = {"modeling_moe_compress.py", "convert_hf_to_gguf.py"}
# The page of each harness, and of what evaluates without being one.
PAGE_OF = {"verify": "verification", "evaluate": "quality"}
# Other commands with a table of their words.
WORDS = {
    "apply": "checkpoints", "export": "checkpoints", "push": "checkpoints", "analyze": "analysis",
    "export_gguf_plan": "gguf", "export_imatrix": "gguf",
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`, as GitHub makes it of headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=shown)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(SPAN.sub("``", prose(page.read_text(encoding="utf-8")))):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not place.startswith(("http://", "https://", "mailto:")) and (
            not target.exists() or (anchor and anchor not in anchors(target))
        ):
            broken.append(link)
    assert not broken


def test_every_page_of_docs_is_linked_from_another():
    linked = set()
    for page in PAGES:
        links = LINK.findall(prose(page.read_text(encoding="utf-8")))
        linked |= {(page.parent / link.partition("#")[0]).resolve() for link in links} - {page}
    assert not {shown(page) for page in DOCS.rglob("*.md") if page not in linked} - {"docs/README.md"}


# --- generated blocks ------------------------------------------------------------------------------------------


def test_generated_blocks_are_current(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_block_is_named_and_written_anew(script, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- generated: parameters skip -->\nold\n<!-- end generated -->\nbehind\n")
    monkeypatch.setattr(script, "DOCS", page.parent)
    assert script.main(["--check"]) == 1 and capsys.readouterr().out == "docs/page.md\n" and "old" in page.read_text()
    assert script.main([]) == 0 and "old" not in page.read_text()
    assert "| `share` | `0.5` | number or none |" in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("behind\n")
    assert script.main(["--check"]) == 0
    page.write_text("<!-- generated: novel -->\n<!-- end generated -->\n")
    with pytest.raises(ValueError, match="kinds are parameters, scores, words, options"):
        script.main(["--check"])


def test_a_blocks_end_is_not_forgotten():
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        begun, ended = (
            len(re.findall(f"^<!-- {word}", text, re.MULTILINE)) for word in ("generated:", "end generated")
        )
        assert begun == ended, shown(page)


# --- nothing is left out ---------------------------------------------------------------------------------------


def require_documented(text: str, parameters: dict[str, Parameter], where: str) -> None:
    """A row with default and values, and a sentence, for each."""
    for name, each in parameters.items():
        default = "needed" if each.default is REQUIRED else f"`{catalogue.word(each.default)}`"
        row = f"| `{name}` | {default} | {catalogue.choices(each.hint)} |"
        assert row in text, f"{where}: {row}"
        assert re.search(rf"^ *- (`\w+`, )*`{name}[`=]", text, re.MULTILINE), f"{where} says nothing of {name}"


def test_every_option_is_documented_with_its_default():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("## Options of a run")[2].partition("\n## ")[0]
    require_documented(section, option_parameters(), "options")
    assert "docs/recipes.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_parameter_and_preset_is_documented_with_its_default(name):
    method = registry.METHODS[name]
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    section = page.partition("## Parameters")[2].partition("\n## ")[0]
    require_documented(section, dict(method.parameters), name)
    assert len(re.findall(r"^\| `\w+` \| `", section, re.MULTILINE)) >= len(method.parameters)
    for preset, values in method.presets.items():
        assert f"| `preset={preset}` | `{catalogue.recipe_words(values)}` |" in section
    for group in method.exclusive:
        assert f"At most one of {', '.join(f'`{key}`' for key in group)} is given." in section
    assert all(f"`{key}`" in section.partition("Only with ")[2] for key in method.goes_with)
    overview = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in overview and f"({name}.md)" in overview


def test_every_score_has_its_formula():
    page = (DOCS / "methods" / "expert_drop.md").read_text(encoding="utf-8")
    formulas = page.partition("| score | formula | in words |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", formulas, re.MULTILINE)) == sorted(score_registry.NAMES.names())


def test_every_method_has_a_page_and_every_page_a_method():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {*registry.METHODS, "README"}


@pytest.mark.parametrize("command", [*HARNESSES, "evaluate"])
def test_every_harness_has_a_page_with_its_words(command):
    page = (DOCS / "evaluation" / f"{PAGE_OF.get(command, command)}.md").read_text(encoding="utf-8")
    harness = HARNESSES.get(command)
    declaration = harness.declaration if harness else function_of("moe_compress.api", command)
    require_documented(page.partition("## Words")[2].partition("\n## ")[0], dict(declaration.parameters), command)
    overview = (DOCS / "evaluation" / "README.md").read_text(encoding="utf-8")
    assert f"({PAGE_OF.get(command, command)}.md)" in overview


def test_every_page_of_evaluation_has_a_harness():
    stems = {PAGE_OF.get(command, command) for command in (*HARNESSES, "evaluate")}
    assert {page.stem for page in (DOCS / "evaluation").glob("*.md")} == {*stems, "README"}


@pytest.mark.parametrize("command", WORDS)
def test_words_of_other_commands_have_their_table(command):
    page = (DOCS / f"{WORDS[command]}.md").read_text(encoding="utf-8")
    assert f"<!-- generated: words {command} -->" in page


# --- nothing is made up ----------------------------------------------------------------------------------------


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return SPAN.findall(prose(page.read_text(encoding="utf-8")))


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` as two paths."""
    found = re.split(r"\{([^{}]*)\}", path)
    options = [part.split(",") if n % 2 else [part] for n, part in enumerate(found)]
    return ["".join(parts) for parts in itertools.product(*options)]


def is_there(path: str, page: Path) -> bool:
    """Whether a path of a page names a file or folder: of the repository, of the package, or beside the page."""
    return any(glob.glob(str(root / path)) for root in (ROOT, SOURCE, page.parent))


PACKAGES = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
FOLDERS = {"src", "scripts", "tests", "docs", "results"}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_no_page_names_a_file_that_is_not_there(page):
    absent, skipped = [], {*ELSEWHERE, *examples(page.read_text(encoding="utf-8"))}
    for span in spans(page):
        if not re.fullmatch(r"[\w./*{},-]+", span) or span in skipped:
            continue
        first, slash, _ = span.partition("/")
        ours = slash and first in PACKAGES | FOLDERS and (span.count("/") > 1 or "." in span)
        bare = re.fullmatch(r"\w+\.py", span)
        for path in expanded(span):
            if ours and not is_there(path, page) and not is_there(f"{path}*", page):
                absent.append(path)
            if bare and not any(SOURCE.rglob(path)) and not any((ROOT / "scripts").rglob(path)):
                absent.append(path)
    assert not absent


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what one holds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for each in parts[count:]:
            if not hasattr(found, each):
                return False
            found = getattr(found, each)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_no_page_names_a_module_that_is_not_there(page):
    absent = []
    for span in spans(page):
        name = re.match(r"((?:moe_compress|\w+)(?:\.\w+)+)(\(.*\))?$", span)
        first = name[1].partition(".")[0] if name else ""
        if name and first == "moe_compress" and not name[1].endswith((".json", ".py")) and not resolves(name[1]):
            absent.append(name[1])
        inside = name and first in PACKAGES and not re.search(r"\.(py|json|md|html|sh|\d+)$", name[1])
        if name and inside and not resolves(f"moe_compress.{name[1]}"):
            absent.append(name[1])
    assert not absent


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_what_the_code_of_a_page_imports_is_there(page):
    absent = []
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moe_compress"):
                absent += [f"{node.module}.{a.name}" for a in node.names if not resolves(f"{node.module}.{a.name}")]
            if isinstance(node, ast.Import):
                absent += [a.name for a in node.names if a.name.startswith("moe_compress") and not resolves(a.name)]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moe_compress":
                absent += [] if resolves(f"moe_compress.{node.attr}") else [f"moe_compress.{node.attr}"]
    assert not absent
