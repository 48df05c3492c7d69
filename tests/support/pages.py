"""The pages of the documentation: their links, blocks of code and commands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from moe_compress.cli.arguments import FLAGS, normalised, only, option_pairs
from moe_compress.cli.commands import EXPORTS
from moe_compress.cli.help import TABLES
from moe_compress.evaluation.harnesses import HARNESSES
from moe_compress.recipes.parser import parse, split_words
from moe_compress.run.options import typed_words
from moe_compress.utils.declarations import function_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "results" / "README.md"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", *([RESULTS] if RESULTS.is_file() else [])]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# How many words a command takes that are no `key=value`.
PLACES = {"compare": 2, "push": 2, "table": 0, "report": 0, "list": 1, "zoo": 0}


def shown(page: Path) -> str:
    """How a test names a page."""
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for kind, code in FENCE.findall(text) if kind == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def examples(text: str) -> list[str]:
    """The files that a page of docs/extending adds, in order: `As src/... this is all`."""
    return re.findall(r"\bAs\s+`(\S+)`", text)


def commands(text: str) -> list[list[str]]:
    """Every command of a page, in order, without comments and variables."""
    found = []
    for code in [*blocks(text, "bash"), *blocks(text, "")]:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.search(r"(^| )(bash |moe-compress )", line) else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] in ("bash", "moe-compress"):
                found.append(words)
    return found


def repository_with_a_python_that_only_prints(place: Path) -> Path:
    """A copy of the scripts whose Python prints what it is given, with a zero byte behind each word."""
    shutil.copytree(ROOT / "scripts", place / "scripts")
    (place / ".venv" / "bin").mkdir(parents=True)
    for target in ("requirements.txt", ".venv/requirements.installed"):
        shutil.copy(ROOT / "requirements.txt", place / target)
    python = place / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    return place


def table_words(text: str, title: str) -> list[str]:
    """The words in the first cells of a page's table, by the title of its first column."""
    rows = text.partition(f"\n| {title} |")[2].partition("\n\n")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def require_words(words: list[str], printing: Path) -> None:
    """Raise ValueError if a command of a page would be refused for its words; printing: see above."""
    if words[0] == "moe-compress":
        require_command(words[1:])
        return
    if not (ROOT / words[1]).is_file():
        raise ValueError(f"there is no {words[1]}.")
    if Path(words[1]).parts[1] in ("run.sh", "compress", "evaluate"):
        given = subprocess.run(words, cwd=printing, capture_output=True, text=True, check=True).stdout
        require_command(given.split("\0")[3:-1])  # behind -P -m moe_compress


def require_command(words: list[str]) -> None:
    """The same of a command's name and its words."""
    command, *given = normalised(words)
    given = [word for word in given if word.removeprefix("--") not in FLAGS or not word.startswith("--")]
    if command in ("compress", "plan"):
        parse(*split_words(given))
        return
    count = PLACES.get(command, 1)
    if command == "export" and given[0] in EXPORTS:
        command, positional, _ = EXPORTS[given.pop(0)]
        count = len(positional)
    if command == "data":
        command, given = "show_data", given[1:]
    if command in TABLES:
        count = sum("=" not in word for word in given)
    places, pairs = given[:count], option_pairs(given[count:])
    if any("=" in word for word in places) or (len(places) < count and command != "list"):
        raise ValueError(f"{command} takes {count} words that are no key=value.")
    if command in HARNESSES:
        HARNESSES[command].typed(pairs)
    elif command in (*TABLES, "list", "zoo"):
        only(pairs, TABLES.get(command, ()), command)
    else:
        typed_words(command, function_of("moe_compress.api", command), pairs)
