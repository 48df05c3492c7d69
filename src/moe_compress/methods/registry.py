"""One table of methods. A method's recipe parameters are its keyword-only arguments.

    @method("model", group="trimming", paper="...", needs="text")
    def expert_drop(model, *, keep: int | None = None, ratio: float | None = 0.25) -> Plan: ...

makes `expert_drop keep=6` a valid recipe: types, defaults and allowed values are read from the signature, so there is
nothing to keep in step. They are read from the source (utils/declarations.py): that a word means nothing is said before
torch is imported, which happens once a method has to run, check or say what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe_compress.methods.conditions import described as as_words
from moe_compress.methods.conditions import meaningless, parameters_of, word
from moe_compress.methods.stage_options import WORDS_OF_ENGINE, with_engine_parameters
from moe_compress.utils.choices import coerce, nearest, one_of
from moe_compress.utils.declarations import REQUIRED, Declaration, Parameter, Registered, declarations, of_function

if TYPE_CHECKING:
    from moe_compress.methods.factor_method import Factoring
    from moe_compress.methods.weight_method import BitAllocation, GridOptions, InputRescaling

# What counts of tensors hold.
DIGITS = 15
Scope = Literal["model", "weight", "recovery", "stages"]
SCOPES: dict[str, Scope] = {"weight_method": "weight", "recovery_method": "recovery", "stage_preset": "stages"}
Need = Literal[
    "text", "outputs", "noise", "weights", "input_squares", "input_grams", "channels", "gradients", "nothing"
]  # fmt: skip
# What cannot be had without running the calibration text.
FROM_TEXT: tuple[Need, ...] = ("text", "outputs", "input_squares", "input_grams", "channels", "gradients")
PACKAGE = __name__.rpartition(".")[0]
Needs = Callable[[Mapping[str, Any]], Need]


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """The functions behind a method: known once its module is imported."""

    run: Callable[..., Any]
    needs: Needs
    check: Callable[..., Any] | None = None
    trial: Callable[..., Any] | None = None
    grid: Callable[[Mapping[str, Any]], GridOptions] | None = None
    rescales_inputs: Callable[[Mapping[str, Any]], InputRescaling | None] = lambda _: None
    allocates_bits: Callable[[Mapping[str, Any]], BitAllocation | None] = lambda _: None
    factoring: Factoring | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A registered method: what it is called, what it is given, which parameters a recipe may set.

    goes_with: by parameter, what others have to say for it to mean anything (`methods/conditions.py`);
    leaves_pattern: the parameter that says which n:m pattern the weights then have; breaks_patterns: puts other weights
    side by side than were counted for one; allocates: the parameter that allocate= shares out; quantizes: leaves codes
    and scales; forecast_note: what sizes do not say of it, in a sentence.
    """

    name: str
    scope: Scope
    group: str
    paper: str
    declaration: Declaration
    parameters: Mapping[str, Parameter]
    presets: Mapping[str, Mapping[str, Any]]
    exclusive: tuple[tuple[str, ...], ...]
    shown_in_names: tuple[str, ...]
    goes_with: Mapping[str, str]
    leaves_pattern: str = ""
    breaks_patterns: bool = False
    allocates: str = ""
    quantizes: bool = False
    forecast_note: str = ""

    @property
    def summary(self) -> str:
        """What it does, in a sentence."""
        return self.declaration.summary

    @property
    def implementation(self) -> Implementation:
        """The functions behind it; imports its module, and torch with it."""
        if self.name not in IMPLEMENTATIONS:
            self.declaration.load()
        return IMPLEMENTATIONS[self.name]

    @property
    def run(self) -> Callable[..., Any]:
        """The function itself."""
        return self.implementation.run

    @property
    def check(self) -> Callable[..., Any] | None:
        """Its check on shapes alone."""
        return self.implementation.check

    def needs(self, parameters: Mapping[str, Any]) -> Need:
        """What it must see with these parameters."""
        return self.implementation.needs(parameters)

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Typed and complete parameters: unknown names and bad values are errors, defaults are filled in."""
        typed = self._typed(given)
        bound = {name: parameter.default for name, parameter in self.parameters.items()}
        preset = self._preset(given.get("preset"))
        bound |= {**self._implied({**bound, **preset, **typed}), **preset}
        for group in self.exclusive:
            named = [name for name in group if typed.get(name) is not None]
            if len(named) > 1:
                raise ValueError(f"{self.name} takes {'= or '.join(group)}=, not both.")
            bound |= dict.fromkeys(group if named else ())
        bound |= typed
        for name, value in bound.items():
            if value is REQUIRED:
                raise ValueError(f"{self.name} needs {name}=.")
        return bound | self._without_meaning(typed, bound)

    def _without_meaning(self, typed: Mapping[str, Any], bound: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults of what a preset sets and other words make meaningless; ValueError for such a word itself."""
        found: dict[str, Any] = {}
        for name, rule in meaningless(self.goes_with, bound):
            default = self.parameters[name].default
            if bound[name] not in (None, default):
                if name in typed:
                    said = f"{self.name}.{name}={word(bound[name])}"
                    raise ValueError(f"{said} would do nothing: it goes with {as_words(rule)}.")
                found[name] = default
        return found

    def _implied(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that the chosen word of a registry brings along: `format=` of one of 8 bits, for one, bits=8."""
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            for registered in getattr(parameter.hint, "__metadata__", ()):
                found |= registered.implied(bound[name]) if isinstance(registered, Registered) else {}
        return found

    def displaced_by(self, given: Mapping[str, Any]) -> set[str]:
        """Parameters that give way to later words: whatever a preset sets, and what excludes all that is set."""
        preset = self._preset(given.get("preset"))
        named = {name for name, value in {**preset, **self._typed(given)}.items() if value is not None}
        excluded = {other for group in self.exclusive if named & set(group) for other in group}
        return (excluded | set(preset)) - set(given)

    def _typed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in self.parameters and name != "preset":
                raise ValueError(self.unknown(name))
        hints = {name: parameter.hint for name, parameter in self.parameters.items()}
        typed = {k: coerce(hints[k], v, f"{self.name}.{k}") for k, v in given.items() if k != "preset"}
        for key, value in typed.items():
            if isinstance(value, int) and abs(value) >= 10**DIGITS:
                raise ValueError(f"{self.name}.{key}={value}: a whole number of at most {DIGITS} digits is needed.")
        return typed

    def _preset(self, name: str | None) -> Mapping[str, Any]:
        if name is None:
            return {}
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise ValueError(f"{self.name} has no preset {name!r}; presets: {known}.")
        return self.presets[name]

    def unknown(self, name: str) -> str:
        """What to say of a parameter that the method does not have."""
        near = nearest(name, self.parameters)
        hint = f" Did you mean {near!r}?" if near else ""
        return f"{self.name} has no parameter {name!r}.{hint} It takes: {', '.join(self.parameters)}."


METHODS: dict[str, Method] = {}
IMPLEMENTATIONS: dict[str, Implementation] = {}


def find(name: str) -> Method:
    """The method of that name, or an error with the nearest known one."""
    return METHODS[one_of(name, METHODS, "method")]


# What decorators take as values: needed, and allowed besides the functions that are handed over.
NEEDED = {
    "method": {"group", "paper"},
    "weight_method": {"group", "paper", "unseen", "selection_after"},
    "recovery_method": {"group", "paper"},
    "stage_preset": {"group", "paper"},
}
ALLOWED = {
    "method": {"presets", "exclusive", "shown_in_names", "goes_with", "breaks_patterns", "forecast_note"},
    "weight_method": {
        "presets", "exclusive", "shown_in_names", "goes_with", "leaves_pattern", "allocates", "quantizes", "min_tokens",
        "forecast_note",
    },
    "recovery_method": {"presets", "exclusive", "shown_in_names", "goes_with", "lr", "trains", "lacks"},
    "stage_preset": {"presets", "exclusive"},
}  # fmt: skip


def _method(declaration: Declaration) -> Method:
    """What a declaration says, with the engine's parameters where it is a weight method's."""
    given = declaration.keywords
    _require_keywords(declaration)
    scope: Scope = SCOPES.get(declaration.decorator) or declaration.positional[0]
    parameters = with_engine_parameters(declaration)
    return Method(
        name=declaration.name,
        scope=scope,
        group=given["group"],
        paper=given["paper"],
        declaration=declaration,
        parameters=parameters,
        presets=given.get("presets") or {},
        exclusive=given.get("exclusive", ()),
        shown_in_names=given.get("shown_in_names", ()),
        goes_with=_rules(declaration, parameters),
        leaves_pattern=given.get("leaves_pattern", ""),
        breaks_patterns=given.get("breaks_patterns", False),
        allocates=given.get("allocates", ""),
        quantizes=given.get("quantizes", False),
        forecast_note=given.get("forecast_note", ""),
    )


def _require_keywords(declaration: Declaration) -> None:
    """Raise ValueError for a decorator that lacks a keyword, or has one that means nothing."""
    kind, given = declaration.decorator, set(declaration.keywords)
    known = NEEDED[kind] | ALLOWED[kind] | set(Implementation.__dataclass_fields__)
    if lacking := sorted(NEEDED[kind] - given):
        raise ValueError(f"@{kind} of {declaration.name} needs {', '.join(f'{key}=' for key in lacking)}.")
    if strange := sorted(given - known):
        raise ValueError(f"@{kind} of {declaration.name} has no keyword {strange[0]!r}; it takes: {sorted(known)}.")


def _rules(declaration: Declaration, parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """When parameters mean anything, the engine's too. Raises ValueError for a rule about one that is not there."""
    rules = {key: rule for key, rule in WORDS_OF_ENGINE.items() if key in parameters}
    rules |= declaration.keywords.get("goes_with", {})
    for key, rule in rules.items():
        strange = sorted({key.partition("=")[0], *parameters_of(rule)} - set(parameters))
        if strange:
            raise ValueError(f"goes_with of {declaration.name} names {strange[0]!r}, which is no parameter of it.")
    return rules


def _require_functions(declared: Method, functions: Implementation) -> None:
    """Raise ValueError for a weight method that says more of itself than it hands over functions for."""
    if declared.quantizes != (functions.grid is not None):
        raise ValueError(f"{declared.name}: quantizes=True and grid= go together.")
    if declared.allocates and functions.trial is None:
        raise ValueError(f"{declared.name}: allocates={declared.allocates!r} needs trial=.")


def _enter(declaration: Declaration, implementation: Implementation) -> None:
    """Enter a function that is being defined; what its source declared earlier stays."""
    name, module = declaration.name, declaration.module
    if name in METHODS and (name in IMPLEMENTATIONS or METHODS[name].declaration.module != module):
        raise ValueError(f"the method {name!r} is registered twice.")
    _require_functions(METHODS.setdefault(name, _method(declaration)), implementation)
    IMPLEMENTATIONS[name] = implementation


def method(
    scope: Literal["model"],
    *,
    needs: Needs | Need = "nothing",
    check: Callable[..., Any] | None = None,
    **said: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that is handed what was observed of the model and returns a plan, under its own name.

    needs: calibration text (its sums, or a sample of outputs), the weights, or nothing (may depend on the parameters);
    check: same parameters, run on shapes alone before any weight is read; said, as values that the source alone tells:
    group and paper; presets: named sets of parameters (`preset=paper`); exclusive: groups of parameters of which a
    recipe sets at most one; shown_in_names: parameters that names and tables show; goes_with, breaks_patterns: see
    `Method`.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        asked: Needs = needs if callable(needs) else lambda _: needs
        _enter(of_function(run, "method", scope, **said), Implementation(run=run, needs=asked, check=check))
        return run

    return register


def weight_method(
    *,
    needs: Needs | Need,
    check: Callable[..., Any] | None = None,
    trial: Callable[..., Any] | None = None,
    grid: Callable[[Mapping[str, Any]], GridOptions] | None = None,
    rescales_inputs: Callable[[Mapping[str, Any]], InputRescaling | None] = lambda _: None,
    allocates_bits: Callable[[Mapping[str, Any]], BitAllocation | None] = lambda _: None,
    factoring: Factoring | None = None,
    **said: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that is handed matrices that share their inputs and returns new ones, under its own name.

    The recipe's parameters are its keyword-only arguments and those of `WeightStageOptions`. needs: the inputs' squares
    or Gram matrices, or nothing; check: same parameters, and the matrices of every layer on a skeleton; trial: same
    parameters, a cheap stand-in for the run that says what a fraction would do; grid: on which grid weights are wanted,
    of those that quantize; rescales_inputs: how inputs are made larger first; allocates_bits: how bits are shared out;
    factoring: of those that are handed a layer's experts and leave factors.
    said, as values that the source alone tells: group, paper, exclusive, shown_in_names, goes_with as for `method`;
    leaves_pattern, quantizes, forecast_note: see `Method`; unseen: choices of unseen=, the first one its default;
    min_tokens: its default; allocates: what allocate= shares out, which with spread= is then a parameter;
    selection_after: the parameter behind which where= and spare= are named.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        asked: Needs = needs if callable(needs) else lambda _: needs
        _enter(
            of_function(run, "weight_method", **said),
            Implementation(
                run=run, needs=asked, check=check, trial=trial, grid=grid,
                rescales_inputs=rescales_inputs, allocates_bits=allocates_bits, factoring=factoring,
            ),
        )  # fmt: skip
        return run

    return register


def recovery_method(**said: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that says what of a compressed model is trained, and towards what, under its own name.

    The recipe's parameters are its keyword-only arguments and those of `TrainingOptions`. What it returns is one of the
    kinds in `methods/recovery_method.py`; asked before a weight is read, it raises ValueError for words that mean
    nothing. said, as values that the source alone tells: group, paper, presets, exclusive, shown_in_names, goes_with as
    for `method`; lr: the default of the learning rate; trains: whether it trains at all: else there is the teacher
    alone; lacks: training options that mean nothing to it.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        _enter(of_function(run, "recovery_method", **said), Implementation(run=run, needs=lambda _: "text"))
        return run

    return register


def stage_preset(**said: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns stages, (method, its words) in order, as one word of recipes under its own name.

    A recipe that names it is the recipe of these stages: nothing behind the parser hears of it. said: group, paper,
    presets and exclusive as for `method`.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        _enter(of_function(run, "stage_preset", **said), Implementation(run=run, needs=lambda _: "nothing"))
        return run

    return register


# Every method of the package, as its source declares it.
METHODS |= {
    declaration.name: _method(declaration) for decorator in NEEDED for declaration in declarations(PACKAGE, decorator)
}
