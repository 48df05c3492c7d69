"""The default text: docstrings and sources of two exactly pinned packages, and our own tasks.

A benchmark needs text that everybody has, byte for byte, without a download and without
shipping what others wrote. sympy 1.14.0 and networkx 3.6.1 are pure Python, installed by the
package manager anyway, and the same files for everybody; `fingerprint` proves it and goes
into every record.

    prose   the docstrings of a file, joined
    code    the source of a file without its docstrings
    tasks   lines from `moe_compress.zoo.tasks`

Whole files go to one split each, by their SHA-256, and documents come in the order of it, so
that any first part of a split is a fair sample. Only the split that is asked for is parsed.
The packages are located and read, never imported.
"""

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_compress.zoo import tasks

VERSION = 1  # part of the fingerprint: raise it when the documents change for equal files
PACKAGES = {"sympy": "1.14.0", "networkx": "3.6.1"}
SHIPPED_FINGERPRINT = "0f7b0ce0aa2a91f5"  # the text of the shipped models and tables
SPLITS = tasks.SPLITS
DOMAINS = ("prose", "code", "tasks")
BUCKETS = 12  # bucket 0 is calibration, bucket 1 is held out, the others are for training
SKIPPED_FOLDERS = frozenset({"tests", "benchmarks", "_antlr"})  # repetitive or generated
NEAR_COPIES = frozenset(  # held-out files of which more than half stands in a training file too
    {
        "networkx/algorithms/flow/boykovkolmogorov.py",
        "networkx/algorithms/flow/capacityscaling.py",
        "networkx/algorithms/flow/mincost.py",
        "sympy/functions/elementary/hyperbolic.py",
        "sympy/physics/quantum/piab.py",
    }
)
MIN_CHARS = 400  # shorter documents are import lists and one-line docstrings
MAX_LINE = 160  # longer lines are tables of constants
MAX_DIGITS = 0.15  # a file with a larger share of digits is data
ITEMS_PER_DOCUMENT = 12
TASK_DOCUMENTS = {"train": 6000, "calibration": 1000, "heldout": 1000}


@dataclass(frozen=True)
class Document:
    """One text of a `domain`, and where it comes from."""

    text: str
    domain: str
    source: str


@dataclass(frozen=True)
class SourceFile:
    """An installed file: its path, its name below the packages, its SHA-256 in hex."""

    path: Path
    name: str
    sha256: str


def documents(split: str) -> tuple[Document, ...]:
    """Return the documents of a split, domain by domain, always in the same order."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    prose, code = [], []
    for file in _source_files():
        if _split_of(file.sha256) != split:
            continue
        docstrings, source = _parse(file.path.read_text(encoding="utf-8"))
        if len(docstrings) >= MIN_CHARS:
            prose.append(Document(docstrings, "prose", file.name))
        if len(source) >= MIN_CHARS and _digit_share(source) <= MAX_DIGITS:
            code.append(Document(source, "code", file.name))
    return (*prose, *code, *_task_documents(split))


def fingerprint() -> str:
    """Return 16 hex digits that change when any text of any split can have changed."""
    digest = hashlib.sha256(f"text {VERSION} tasks {tasks.VERSION}\n".encode())
    for name, version in PACKAGES.items():
        digest.update(f"{name} {version}\n".encode())
    for file in _source_files():
        digest.update(f"{file.name} {file.sha256}\n".encode())
    return digest.hexdigest()[:16]


def _source_files() -> list[SourceFile]:
    """List the files of all packages in the order of their hashes, each content once."""
    by_hash: dict[str, SourceFile] = {}
    for package in PACKAGES:
        folder = _package_folder(package)
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder.parent)
            name = relative.as_posix()
            if SKIPPED_FOLDERS.isdisjoint(relative.parts) and name not in NEAR_COPIES:
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                by_hash.setdefault(sha256, SourceFile(path, name, sha256))
    return [by_hash[sha256] for sha256 in sorted(by_hash)]


def _package_folder(package: str) -> Path:
    wanted = PACKAGES[package]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    spec = importlib.util.find_spec(package)
    if found != wanted or spec is None or spec.origin is None:
        raise ValueError(
            f"the default text is read from {package} {wanted} but {found} is installed: "
            f"run `pip install {package}=={wanted}`"
        )
    return Path(spec.origin).parent


def _split_of(sha256: str) -> str:
    # The last digits, because the first ones decide the order of the documents.
    return {0: "calibration", 1: "heldout"}.get(int(sha256[-8:], 16) % BUCKETS, "train")


def _parse(source: str) -> tuple[str, str]:
    """Return a file's docstrings, joined, and its source without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own invalid escapes
        tree = ast.parse(source)
    strings = sorted(_docstring_nodes(tree), key=lambda node: node.lineno)
    docstrings = "\n\n".join(_clean(str(node.value)) for node in strings)
    inside = {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    kept = (
        line.rstrip()
        for number, line in enumerate(source.split("\n"), start=1)
        if number not in inside and len(line) <= MAX_LINE
    )
    return docstrings, "\n".join(kept).strip()


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as string), *_]:
                    yield string


def _clean(docstring: str) -> str:
    """Take the common indent off a docstring; `inspect.cleandoc` differs between Pythons."""
    first, *rest = docstring.expandtabs().split("\n")
    indent = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    lines = [first.strip(), *(line[indent:].rstrip() for line in rest)]
    return "\n".join(line for line in lines if len(line) <= MAX_LINE).strip()


def _digit_share(text: str) -> float:
    return sum(character.isdigit() for character in text) / len(text)


def _task_documents(split: str) -> Iterator[Document]:
    count = TASK_DOCUMENTS[split]
    items = tasks.items(split, count * ITEMS_PER_DOCUMENT)
    for start in range(0, len(items), ITEMS_PER_DOCUMENT):
        part = items[start : start + ITEMS_PER_DOCUMENT]
        text = "".join(f"{item.prompt}{item.answer}\n" for item in part)
        yield Document(text, "tasks", f"tasks/{split}/{start}")
