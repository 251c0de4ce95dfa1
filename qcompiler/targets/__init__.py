"""Targets: what a runtime has kernels for, as data. One YAML file each; `kernels.py` makes the registry dumps.

What a kernel wants of a node is Python (`conditions.py`), as lowering passes ask it, too.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qcompiler.errors import TargetError, closest
from qcompiler.formats.scheme import Scheme
from qcompiler.targets.conditions import conditions
from qcompiler.targets.machines import Cpu, Machine

FOLDER = Path(__file__).parent
GROUP = "qcompiler.targets"
"""Of the entry points of plug-ins."""


class PassLike(Protocol):
    """What a target must know of a pass: its name; its options are attributes."""

    @property
    def name(self) -> str: ...


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Speed(_Data):
    """One measurement: the kernel runs `ratio` times as fast as `against`."""

    ratio: float
    against: str
    """The float kernel that it was measured against, in the same run."""
    case: str
    """Shape and threads."""
    machine: str
    """The kind of machine, by what matters for speed (instruction sets, generation of GPU): a key of `machines`."""
    date: str
    """ISO date of the measurement."""


class SchemeRow(_Data):
    """Schemes of one tensor, by their fields; a field that is left out may be anything."""

    format: tuple[str, ...] = ()
    """As the pass was asked for it: int8, uint8 …"""
    bits: tuple[int, ...] = ()
    granularity: tuple[Literal["tensor", "channel", "token", "group", "block"], ...] = ()
    symmetric: bool | None = None
    dynamic: bool | None = None

    def matches(self, scheme: Scheme | None) -> bool:
        """Whether a tensor is quantized so; one that is float (None) is not."""
        return (
            scheme is not None
            and (not self.format or scheme.format in self.format)
            and (not self.bits or scheme.number_format.bits in self.bits)
            and (not self.granularity or scheme.granularity.kind in self.granularity)
            and (self.symmetric is None or scheme.symmetric == self.symmetric)
            and (self.dynamic is None or scheme.dynamic == self.dynamic)
        )


class SiteRow(_Data):
    """Layers or caches of a report, by the operator that runs them and their schemes."""

    kernel: tuple[str, ...]
    """Any of these; an empty text is the operators of the portable model."""
    weight: SchemeRow | None = None
    activation: SchemeRow | None = None
    cache: SchemeRow | None = None

    def matches(
        self, kernel: str, weight: Scheme | None = None, activation: Scheme | None = None, cache: Scheme | None = None
    ) -> bool:
        """Whether a site that the operator runs, with these schemes, is one of them."""
        rows = ((self.weight, weight), (self.activation, activation), (self.cache, cache))
        return kernel in self.kernel and all(row is None or row.matches(scheme) for row, scheme in rows)


class Kernel(_Data):
    """A way in which the target runs a scheme."""

    scheme: str
    """The family: W8A8 static, W8A8 dynamic, W8, W4 …"""
    operator: str
    types: str
    conditions: str = ""
    note: str = ""
    sites: SiteRow | None = None
    """The layers of a report that run so; None where no report tells.

    A report warns of layers whose kernel was measured slower than float; a layer that was not lowered has no kernel.
    """
    speed: tuple[Speed, ...] = ()
    """Empty where nobody has measured it."""
    source: str
    """How this is known: the registry dump, a run, or reading the source."""


class Refusal(_Data):
    """A pass that the target declines, because its result would run slowly or not at all."""

    pass_name: str = Field(alias="pass")
    when: dict[str, Any] = {}
    """Only with these values of the pass's options; empty means always."""
    scheme: str
    sentence: str
    """Why, and what to take instead."""

    def applies(self, candidate: PassLike) -> bool:
        return candidate.name == self.pass_name and all(
            getattr(candidate, option) == value for option, value in self.when.items()
        )


class _Conditional(_Data):
    requires: str = ""
    """The key of its conditions (see `conditions.py`); empty where it has none."""
    conditions: tuple[str, ...] = ()
    """Those as clauses, for people; filled in when a target is read."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("requires"):
            return {**data, "conditions": tuple(item.text for item in conditions(str(data["requires"])))}
        return data


class Fallback(_Conditional):
    """What is taken instead of a kernel whose conditions do not all hold."""

    kernel: str


class Rule(_Conditional):
    """What a provider does with an operator beyond what its registry says."""

    operator: str
    """With its domain where that is not ONNX's own: com.microsoft::MatMulNBits."""
    when: dict[str, int | str] = {}
    """Only nodes whose attributes have these values."""
    outputs: tuple[str, ...] = ()
    """Only nodes whose first output has one of these types; empty: any."""
    kernel: str
    """The path that is taken where all conditions hold, or what the rule is about."""
    fallback: Fallback | None = None
    """What is tried next where one does not hold."""
    otherwise: str = ""
    """What happens where its conditions do not hold either, or there is none."""
    effect: Literal["slower", "declined", "fails"] = "slower"
    """Of an unmet condition: another path of the same provider, the node is left to the CPU, or the run fails."""
    note: str = ""
    """What the model does not show: numbers of tokens, generations of GPU, libraries."""
    source: str


class Advice(_Data):
    """What to take for a kind of model on this target."""

    models: Literal["decoder", "convolution", "other"]
    """Language models with a cache, models that are mostly convolutions, the rest."""
    recipe: str
    scheme: str
    """That of the kernel whose measurements speak for it."""
    because: str


class Target(_Data):
    """Where a model is to run: its kernels, its preferences, and the passes that rewrite a portable model for it."""

    name: str
    title: str
    description: str
    runtime: str
    """The distribution and version that the kernel table was taken from; empty where none is meant."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers, the preferred one first."""
    machines: dict[str, Machine] = {}
    """The kinds of machines that speeds were measured on."""
    kernels: tuple[Kernel, ...] = ()
    registry: str = ""
    """The file beside the target's own with the kernel registry of `runtime` (see `kernels.py`)."""
    rules: tuple[Rule, ...] = ()
    """What the registry cannot say."""
    advice: tuple[Advice, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    graph_optimization_level: Literal["disable", "basic", "extended", "all"] = "all"
    session_options: dict[str, str] = {}
    """Entries of the session configuration (`SessionOptions.add_session_config_entry`)."""
    disabled_optimizers: tuple[str, ...] = ()
    block_size: int | None = None
    """Input features that share a scale in the fastest kernel for weights of few bits."""
    lowering: tuple[str, ...] = ()
    """The passes that run after the recipe's own."""
    pass_defaults: dict[str, dict[str, Any]] = {}
    """Options that the target prefers where a recipe leaves them open, by pass."""
    pass_defaults_beside: dict[str, dict[str, dict[str, Any]]] = {}
    """Other ones where the recipe has a pass, by that pass."""

    @staticmethod
    def load(name: str) -> Target:
        """Read a target by name, a built-in one or a plug-in's; each file once a process. Raises TargetError."""
        if name in _built_in():
            return _read(FOLDER / f"{name}.yaml")
        points = _plugins()
        if name in points:
            return _loaded(points[name])
        raise TargetError(f"there is no target {name!r}{closest(name, [*_built_in(), *points])}")

    def is_for(self, speed: Speed, cpu: Cpu) -> bool:
        """Whether a speed was measured on a machine of the processor's kind, as far as kinds are known."""
        machine = self.machines.get(speed.machine)
        return machine is not None and machine.fits(cpu)

    def preferred(self, name: str, passes: Iterable[str]) -> dict[str, Any]:
        """Options of a pass that the target prefers in a recipe of these passes."""
        beside = [self.pass_defaults_beside.get(other, {}).get(name, {}) for other in passes]
        return dict(ChainMap(*beside, self.pass_defaults.get(name, {})))

    def check(self, passes: Iterable[PassLike]) -> None:
        """Raise TargetError where a pass would make something that this target has no good kernel for."""
        for candidate in passes:
            for refusal in self.refuses:
                if refusal.applies(candidate):
                    raise TargetError(
                        f"the target {self.name} refuses {refusal.scheme} ({candidate.name}): {refusal.sentence}"
                    )


def target_names() -> list[str]:
    """Every target, sorted: the built-in ones, then those of plug-ins (entry points, group ``qcompiler.targets``)."""
    return [*_built_in(), *sorted(_plugins())]


def usable_targets() -> tuple[list[Target], dict[str, str]]:
    """Every target that can be read, and of each other one why not: a broken plug-in harms only who asks for it."""
    found, broken = [], {}
    for name in target_names():
        try:
            found.append(Target.load(name))
        except TargetError as error:
            if name in _built_in():
                raise
            broken[name] = str(error)
    return found, broken


@cache
def _built_in() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in _built_in() or point.name in found:
            other = f"that of {_source(found[point.name])}" if point.name in found else "the built-in one"
            raise TargetError(
                f"the target {point.name!r} of {_source(point)} has the same name as {other}; uninstall one"
            )
        found[point.name] = point
    return found


def _loaded(point: EntryPoint) -> Target:
    """What a plug-in gives: a Target, or the path of a YAML file that lies in its package."""
    whose = f"the target {point.name!r} of {_source(point)}"
    try:
        found = point.load()
    except Exception as error:
        raise TargetError(f"{whose} cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(found, str | Path):
        if not Path(found).is_file():
            raise TargetError(f"{whose} is to be in {found}, and there is no such file; give its package the file")
        found = _read(Path(found))
    if not isinstance(found, Target):
        raise TargetError(f"{whose} ({point.value}) is neither a qcompiler.targets.Target nor the path of a YAML file")
    if found.name != point.name:
        raise TargetError(f"{whose} calls itself {found.name!r}; the names must agree")
    return found


@cache
def _read(path: Path) -> Target:
    """A target's file; its kernel table is beside it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        target = Target.model_validate(data)
    except yaml.YAMLError as error:
        raise TargetError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise TargetError(f"{path}: {where}: {first['msg']}") from error
    if path.parent != FOLDER and target.registry:
        target = target.model_copy(update={"registry": str(path.parent / target.registry)})
    return target


def _source(point: EntryPoint) -> str:
    """What a person can uninstall: the distribution of a plug-in."""
    return f"package {point.dist.name!r}" if point.dist else f"plug-in {point.value!r}"
