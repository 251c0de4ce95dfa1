"""Recipes: an ordered list of passes with options, a target, calibration settings and gates; in YAML or Python.

name: smoothquant
description: …
passes:
  - smooth-quant: {alpha: auto}
  - quantize-weights
  - quantize-activations: {ignore: [lm_head]}
gates: {perplexity_ratio: 1.01}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qcompiler.errors import RecipeError, SchemeError, closest, printable
from qcompiler.graph.places import is_file
from qcompiler.recipes.gates import GATES
from qcompiler.recipes.reading import parse
from qcompiler.recipes.registry import options_of, pass_class
from qcompiler.rewriting.contract import Pass
from qcompiler.targets import Target

FOLDER = Path(__file__).parent
DEFAULT_TARGET = "ort-cpu"
MOST = 2**31 - 1  # samples, or tokens: more than any machine has
MOST_PASSES = 100
SHOWN = 100  # letters of a value in a message
CONVERT = "convert-float"
"""The pass that a recipe gets where a model is asked for in another float type."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Data):
    """One pass of a recipe, with the options that the recipe gives; in YAML ``name`` or ``name: {option: value}``."""

    name: str
    options: dict[str, Any] = {}


class Calibration(_Data):
    """How many samples are taken from the data, and how long they are."""

    samples: int = Field(default=32, ge=1, le=MOST)
    sequence_length: int = Field(default=256, ge=1, le=MOST)
    """Tokens a sample, where the data is text."""
    held_out: int = Field(default=4, ge=0, le=MOST)
    """Samples that are kept out of calibration; float and compiled model are compared on them."""


class Recipe(_Data):
    """What is done to a model. Frozen; `with_options` and `resolved` give changed copies."""

    name: str
    description: str = ""
    target: str = DEFAULT_TARGET
    passes: tuple[Step, ...] = Field(min_length=1, max_length=MOST_PASSES)
    lowering: tuple[Step, ...] | None = None
    """The passes that run after the portable model is made; open (None) means those that the target lists."""
    calibration: Calibration = Calibration()
    exclude: tuple[str, ...] = ()
    """Patterns of sites that no pass touches; the report lists them as excluded."""
    gates: dict[str, float] = {}
    """Limits that decide the exit code, by measure; see `qcompiler.recipes.gates.GATES`."""
    source: str = Field(default="", exclude=True, repr=False)
    """Where the recipe was read from, for messages."""

    def __repr__(self) -> str:
        steps = ", ".join(step.name for step in self.passes)
        return f"Recipe({self.name} for {self.target}: {steps})"

    __str__ = __repr__

    @field_validator("passes", "lowering", mode="before")
    @classmethod
    def _steps(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return tuple(_step(item) for item in value)

    @field_validator("gates")
    @classmethod
    def _known_gates(cls, gates: dict[str, float]) -> dict[str, float]:
        for name in gates:
            if name not in GATES:
                raise ValueError(f"there is no gate {name!r}{closest(name, GATES)}")
            if not math.isfinite(gates[name]):
                raise ValueError(f"the gate {name} is {gates[name]}; it must be a number that can be reached")
        return gates

    @staticmethod
    def load(name_or_path: str | Path) -> Recipe:
        """Read a built-in recipe by its name, or a YAML file by its path. Raises RecipeError."""
        if isinstance(name_or_path, str) and name_or_path in recipe_names():
            return _read(FOLDER / f"{name_or_path}.yaml", f"recipe {name_or_path}")
        path = Path(name_or_path)
        if is_file(path):
            return _read(path, f"recipe {path}")
        if path.suffix in (".yaml", ".yml"):
            raise RecipeError(f"there is no recipe file {path}")
        raise RecipeError(f"there is no recipe {str(name_or_path)!r}{closest(str(name_or_path), recipe_names())}")

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "") -> Recipe:
        """Make a recipe from what its YAML would hold. Raises RecipeError with `source` in front."""
        where = source or f"recipe {data.get('name', '')}".strip()
        for key in data:
            if key not in Recipe.model_fields or key == "source":
                known = [name for name in Recipe.model_fields if name != "source"]
                raise RecipeError(f"{where}: there is no entry {key!r}{closest(str(key), known)}")
        try:
            return Recipe.model_validate({**data, "source": where})
        except ValidationError as error:
            raise RecipeError(f"{where}: {sentence(error)}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the form of the YAML; what is left open is left out."""
        data = self.model_dump(mode="json", exclude_none=True)
        for key in ("passes", "lowering"):
            if key in data:
                data[key] = [{step["name"]: step["options"]} if step["options"] else step["name"] for step in data[key]]
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def with_dtype(self, dtype: str | None, measured: bool) -> Recipe:
        """The recipe that ends with what it leaves in float32 converted to `dtype` (fp16, bf16); None leaves it so.

        Where there is data (`measured`), what is too large for the type is looked for, unless the recipe says not to.
        """
        if dtype is None and all(step.name != CONVERT for step in self.passes):
            return self
        said = {"dtype": dtype} if dtype is not None else {}
        given = next((step.options for step in self.passes if step.name == CONVERT), {})
        last = Step(name=CONVERT, options={"check_range": measured, **given, **said})
        others = tuple(step for step in self.passes if step.name != CONVERT)
        return self.model_copy(update={"passes": (*others, last)})

    def with_options(self, settings: Sequence[str]) -> Recipe:
        """Apply settings ``PASS.OPTION=VALUE``, values in YAML.

        A pass that occurs several times gets them wherever they make sense: ``quantize-weights.group_size=32`` leaves
        a second step alone that has one scale for each channel. Raises where they make sense nowhere.
        """
        recipe = self
        for setting in settings:
            recipe = recipe._with_option(setting)
        update: dict[str, object] = {}
        for key in ("passes", "lowering") if settings else ():  # only all settings together need to make sense
            before, after = getattr(self, key) or (), getattr(recipe, key) or ()
            update[key] = tuple(recipe._sensible(*pair, after) for pair in zip(before, after, strict=True))
        if recipe.lowering is None:
            update.pop("lowering", None)
        return recipe.model_copy(update=update)

    def _sensible(self, before: Step, after: Step, group: Sequence[Step]) -> Step:
        """The step with its settings; as it was where they only make sense for others of its name."""
        try:
            self._build(after)
        except SchemeError:
            if not any(self._builds(step) for step in group if step.name == after.name and step is not after):
                raise
            self._build(before)
            return before
        return after

    def _builds(self, step: Step) -> bool:
        try:
            self._build(step)
        except SchemeError:
            return False
        return True

    def for_target(self, target: str | None = None) -> Recipe:
        """The recipe for another target (or its own, where None), with the lowering that the target lists.

        Another target than the recipe's own brings its own lowering; options that the recipe states are kept.
        """
        chosen = Target.load(target or self.target)
        if self.lowering is not None and chosen.name == self.target:
            return self
        lowering = tuple(Step(name=name) for name in chosen.lowering)
        return self.model_copy(update={"target": chosen.name, "lowering": lowering})

    def resolved(self, target: str | None = None) -> Recipe:
        """`for_target`, with nothing left open: the target's preferences and the defaults of every pass written out."""
        aimed = self.for_target(target)
        chosen = Target.load(aimed.target)
        return aimed.model_copy(
            update={
                "passes": tuple(aimed._resolve(step, chosen) for step in aimed.passes),
                "lowering": tuple(aimed._resolve(step, chosen) for step in aimed.lowering or ()),
            }
        )

    def build(self) -> list[Pass]:
        """The recipe's passes, ready to run. Raises RecipeError where an option is misspelt or has a wrong value."""
        return [self._build(step) for step in self.passes]

    def build_lowering(self) -> list[Pass]:
        """The passes that follow for the target; those that the target lists, where the recipe leaves them open."""
        recipe = self.for_target()
        return [recipe._build(step) for step in recipe.lowering or ()]

    def _with_option(self, setting: str) -> Recipe:
        path, equals, text = setting.partition("=")
        name, dot, option = path.strip().partition(".")
        if not (equals and dot and name and option):
            raise RecipeError(f"the setting {setting!r} is not of the form PASS.OPTION=VALUE")
        steps = {"passes": self.passes, "lowering": self.lowering or ()}
        names = [step.name for group in steps.values() for step in group]
        if name not in names:
            raise RecipeError(f"setting {setting!r}: the recipe has no pass {name!r}{closest(name, names)}")
        value = parse(text, f"setting {_cut(setting)!r}: the value")
        update: dict[str, object] = {}
        for key, group in steps.items():
            if any(step.name == name for step in group):
                update[key] = tuple(
                    Step(name=name, options={**step.options, option: value}) if step.name == name else step
                    for step in group
                )
        return self.model_copy(update=update)

    def _resolve(self, step: Step, target: Target) -> Step:
        preferred = target.preferred(step.name, [other.name for other in self.passes])
        try:
            built = self._build(Step(name=step.name, options={**preferred, **step.options})).for_target(target)
        except SchemeError:
            target.check([self._build(step)])  # what the target refuses anyway need not go with what it prefers
            raise
        # An empty table of exceptions is not worth a line.
        settled = {key: value for key, value in dataclasses.asdict(built).items() if value != {}}
        return Step(name=step.name, options={key: _plain(value) for key, value in settled.items()})

    def _build(self, step: Step) -> Pass:
        where = f"{self.source or 'recipe ' + self.name}: pass {step.name}"
        try:
            cls = pass_class(step.name)
        except RecipeError as error:
            raise RecipeError(f"{self.source or 'recipe ' + self.name}: {error}") from error
        known = [option.name for option in options_of(cls)]
        for name in step.options:
            if name not in known:
                raise RecipeError(f"{where} has no option {name!r}{closest(name, known)}")
        try:
            return cls(**step.options)
        except ValidationError as error:
            raise RecipeError(f"{where}: {sentence(error)}") from error
        except SchemeError as error:
            raise SchemeError(f"{where}: {error}") from error


def recipe_names() -> list[str]:
    """The built-in recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def sentence(error: ValidationError) -> str:
    """What pydantic found, as one clause: the first wrong entry, and what it may be."""
    details = error.errors()
    first = details[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    # All members of a union fail at one place, each with its own tail of the location.
    same = [detail for detail in details if detail["loc"][:1] == first["loc"][:1]]
    where = ".".join(str(part) for part in (first["loc"] if len(same) == 1 else first["loc"][:1]))
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "too_short":
        return f"{where} should have at least one entry"
    if first["type"] == "too_long":
        return f"{where} has {first['ctx']['actual_length']} entries, and may have {first['ctx']['max_length']}"
    if first["type"] == "extra_forbidden":
        return f"there is no entry {where}"
    wanted = dict.fromkeys(_wanted(detail["msg"]) for detail in same)
    return f"{where} should be {' or '.join(wanted)}, but is {_cut(repr(first['input']))}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _wanted(message: str) -> str:
    for start in ("Input should be a valid ", "Input should be an instance of ", "Input should be "):
        if message.startswith(start):
            rest = message.removeprefix(start)
            return ("a " if start.endswith("valid ") else "") + rest.split(", ")[0]
    return message[0].lower() + message[1:]


def _step(item: object) -> object:
    """A step as YAML writes it: a name, or a mapping of one name to its options."""
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, options),) = item.items()
        return {"name": name, "options": {} if options is None else options}
    if isinstance(item, Mapping):
        raise ValueError(
            f"a pass is a name, or one name with its options, not a mapping of {', '.join(map(str, item)) or 'nothing'}"
        )
    return item


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path, where: str) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} cannot be read: {error}") from error
    data = parse(text, where)
    if data is None:
        raise RecipeError(f"{where} is empty; it needs passes (start from `qcompiler recipes smoothquant`)")
    if not isinstance(data, dict):
        raise RecipeError(f"{where} should be a mapping with name and passes, but is {type(data).__name__}")
    return Recipe.from_dict({"name": printable(path.stem), **data}, where)
