"""Decorated functions of a package, read from its source without importing it.

What a recipe or a command may say stands in signatures; reading them here spares a mistyped word the seconds that torch
takes to import. Annotations, defaults and the decorators' arguments are evaluated where they are constants, literals or
names of such; what they cannot say (functions, mostly) is known once the module is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.utils.choices import choice

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """A keyword argument: its annotation, and its default (REQUIRED for none)."""

    hint: Any
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """A decorated function: where it is, what it says of itself, and what its decorator was given.

    positional, keywords: the decorator's arguments that the source alone tells; parameters: of the function, those that
    are keyword-only or have a default; takes_others: whether it has `**others` as well.
    """

    decorator: str
    name: str
    module: str
    doc: str
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    takes_others: bool = False

    @property
    def summary(self) -> str:
        """The first line of what it says."""
        return self.doc.partition("\n")[0]

    @property
    def about(self) -> str:
        """What follows the first line."""
        return self.doc.partition("\n")[2].strip()

    def load(self) -> Any:
        """The function itself, which imports its module."""
        return getattr(importlib.import_module(self.module), self.name)


_REGISTERED: dict[tuple[str, str], list[str]] = {}


@dataclass(frozen=True)
class Registered:
    """The choices of a parameter: the names of all functions of a package with this decorator.

    Annotated[str, Registered("moe_compress.methods", "score")]. first: words before them; unless: a keyword of the
    decorator that leaves a name out where it is False; last_by: one whose numbers put names behind the others.
    """

    package: str
    decorator: str
    first: tuple[str, ...] = ()
    unless: str = ""
    last_by: str = ""

    def names(self) -> tuple[str, ...]:
        """In the order of files and of lines; then those that were registered from elsewhere."""
        found = [each for each in declarations(self.package, self.decorator) if each.keywords.get(self.unless, True)]
        found.sort(key=lambda each: each.keywords.get(self.last_by, 0))
        declared = (each.positional[0] for each in found)
        return tuple(dict.fromkeys([*self.first, *declared, *_REGISTERED.get((self.package, self.decorator), ())]))

    def implied(self, name: str) -> Mapping[str, Any]:
        """What the decorator of one of them says that other parameters then have by default (`implies=`)."""
        found = declarations(self.package, self.decorator)
        return next((each.keywords.get("implies", {}) for each in found if each.positional[0] == name), {})

    def add(self, name: str) -> None:
        """Take in the name of a function that is being defined, here or elsewhere."""
        _REGISTERED.setdefault((self.package, self.decorator), []).append(name)

    def read(self, text: str, where: str) -> str:
        """The word, if it is one of them."""
        return choice(self.names(), text, where)

    def shown(self) -> str:
        """All of them."""
        return ", ".join(self.names())


def of_function(function: Callable[..., Any], decorator: str, *positional: Any, **keywords: Any) -> Declaration:
    """The same of a function that is there."""
    hints = typing.get_type_hints(function, include_extras=True)
    arguments = inspect.signature(function).parameters
    return Declaration(
        decorator=decorator,
        name=function.__name__,
        module=function.__module__,
        doc=inspect.getdoc(function) or "",
        positional=positional,
        keywords=keywords,
        parameters={
            name: Parameter(hints.get(name, Any), each.default)
            for name, each in arguments.items()
            if each.kind is each.KEYWORD_ONLY or each.default is not each.empty
        },
        takes_others=any(each.kind is each.VAR_KEYWORD for each in arguments.values()),
    )


@functools.cache
def declarations(package: str, decorator: str) -> tuple[Declaration, ...]:
    """Every function of a package's modules that is decorated by a call of that name, by path and line."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    files = ((root, path) for root in map(Path, spec.submodule_search_locations) for path in sorted(root.rglob("*.py")))
    places = [(root, path) for root, path in files if f"\n@{decorator}(" in path.read_text(encoding="utf-8")]
    names = (".".join([package, *path.relative_to(root).with_suffix("").parts]) for root, path in places)
    return tuple(each for name in names for each in _module(name).declared(decorator))


@functools.cache
def function_of(module: str, name: str) -> Declaration:
    """One function of a module, decorated or not."""
    return _module(module).function(name)


@functools.cache
def _module(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return _Module(name, Path(spec.origin).read_text(encoding="utf-8"))


class _NotStatic(Exception):
    """The source alone does not say it."""


# Where a statement of a module begins, and the name that one gives to a value.
STATEMENT = re.compile(r"\n(?=[^\s)\]}#])")
ASSIGNED = re.compile(r"(\w+(?:, *\w+)*) *(?::[^=\n]+)?=(?!=)")


class _Module(dict[str, Any]):
    """The names of a module, evaluated when they are asked for: a namespace for eval.

    Only the statements that are needed are parsed, for parsing whole files would take longer than all the rest.
    """

    def __init__(self, name: str, source: str) -> None:
        super().__init__(__name__=name)
        self.name = name
        self.assigned: dict[str, str] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}
        self.functions: list[str] = []
        decorators = ""
        for statement in STATEMENT.split(source):
            if statement.startswith("@"):
                decorators += statement + "\n"
            elif statement.startswith("def "):
                self.functions.append(decorators + statement)
                decorators = ""
            elif statement.startswith(("from ", "import ")):
                self._import(ast.parse(statement).body[0])
            else:
                decorators = ""
                found = ASSIGNED.match(statement)
                self.assigned |= dict.fromkeys(found[1].replace(" ", "").split(","), statement) if found else {}

    def _import(self, node: ast.stmt) -> None:
        match node:
            case ast.ImportFrom(module=str(module), names=aliases):
                self.imported |= {alias.asname or alias.name: (module, alias.name) for alias in aliases}
            case ast.Import(names=aliases):
                self.imported |= {alias.asname or alias.name: (alias.name, None) for alias in aliases if alias.asname}
                self.imported |= {alias.name: (alias.name, None) for alias in aliases if "." not in alias.name}

    def __missing__(self, name: str) -> Any:
        if name in self.assigned:
            self._assign(ast.parse(self.assigned[name]).body[0])
        elif name in self.imported:
            self[name] = _imported(*self.imported[name])
        else:
            raise KeyError(name)  # a builtin, or a function of the module
        return self[name]

    def _assign(self, node: ast.stmt) -> None:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                self[name] = self.value(value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=value):
                values = zip(names, self.value(value), strict=True)
                self.update({each.id: given for each, given in values if isinstance(each, ast.Name)})

    def value(self, node: ast.expr) -> Any:
        """What an expression is worth. Raises _NotStatic where the source alone does not say it."""
        try:
            return eval(compile(ast.Expression(node), self.name, "eval"), {}, self)
        except Exception as error:  # whatever an expression may raise
            raise _NotStatic(self.name) from error

    def declared(self, decorator: str) -> Iterator[Declaration]:
        """The functions that are decorated by a call of that name."""
        for source in self.functions:
            if source.startswith(f"@{decorator}(") or f"\n@{decorator}(" in source:
                node = ast.parse(source).body[0]
                assert isinstance(node, ast.FunctionDef)
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                        yield self.declaration(node, decorator, call)

    def function(self, name: str) -> Declaration:
        """One of its functions."""
        source = next(each for each in self.functions if re.search(rf"^def {name}\(", each, re.MULTILINE))
        node = ast.parse(source).body[0]
        assert isinstance(node, ast.FunctionDef)
        return self.declaration(node, "")

    def declaration(self, node: ast.FunctionDef, decorator: str, call: ast.Call | None = None) -> Declaration:
        """What the source says of a function. Raises ValueError for parameters that it does not tell."""
        keywords = {}
        for each in call.keywords if call else ():
            try:
                keywords[str(each.arg)] = self.value(each.value)
            except _NotStatic:
                continue  # a function: it is known once the module is imported
        try:
            return Declaration(
                decorator=decorator,
                name=node.name,
                module=self.name,
                doc=inspect.cleandoc(ast.get_docstring(node) or ""),
                positional=tuple(map(self.value, call.args)) if call else (),
                keywords=keywords,
                parameters=dict(self._parameters(node.args)),
                takes_others=node.args.kwarg is not None,
            )
        except _NotStatic as error:
            cause = error.__cause__
            raise ValueError(f"the signature of {self.name}.{node.name} is no constant: {cause!r}.") from error

    def _parameters(self, arguments: ast.arguments) -> Iterator[tuple[str, Parameter]]:
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True)
        for each, default in [*defaults, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]:
            yield each.arg, Parameter(self._hint(each.annotation), REQUIRED if default is None else self.value(default))

    def _hint(self, annotation: ast.expr | None) -> Any:
        """An annotation; Any where it names a class, which no word stands for."""
        try:
            return Any if annotation is None else self.value(annotation)
        except _NotStatic:
            return Any


def _imported(module: str, name: str | None) -> Any:
    """A name of another module: of one that is there or costs nothing the thing itself, else read from its source."""
    if module in sys.modules or module.partition(".")[0] in sys.stdlib_module_names:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)
    if name is None or module.partition(".")[0] != __name__.partition(".")[0]:
        raise _NotStatic(module)
    return _module(module)[name]
