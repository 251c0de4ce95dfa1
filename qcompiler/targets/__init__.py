"""Targets: what a runtime has kernels for, as data. One YAML file each; `kernels.py` makes the registry dumps."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qcompiler.errors import TargetError, closest

FOLDER = Path(__file__).parent


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
    """The kind of machine, by what matters for speed (instruction sets, generation of GPU)."""
    date: str
    """ISO date of the measurement."""


class Kernel(_Data):
    """A way in which the target runs a scheme."""

    scheme: str
    """The family: W8A8 static, W8A8 dynamic, W8, W4 …"""
    operator: str
    types: str
    conditions: str = ""
    note: str = ""
    sites: str = ""
    """A regular expression for `kernel: scheme` of a layer in a report that runs so; empty where no report tells.

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


class Requirement(_Data):
    """One condition on a node: on an attribute, on an input's type, presence or dimension, or on a session option."""

    text: str
    """The condition as a clause: N is a multiple of 64."""
    attribute: str | None = None
    input: int | None = None
    axis: int | None = None
    """Of the input: this dimension, and not the type."""
    session: str | None = None
    """The key of a session option."""
    among: tuple[int | float | str, ...] | None = None
    """Values that the attribute, dimension, type or option may have; what is not given counts as empty text."""
    multiple_of: int | None = None
    at_least: int | None = None
    absent: bool | None = None
    """Whether the input must not be there, or must."""
    symmetric: bool = False
    """The first half of the attribute's list equals the second."""
    source: str = ""
    """Where it differs from the rule's."""


class Rule(_Data):
    """What a provider does with an operator beyond what its registry says."""

    operator: str
    """With its domain where that is not ONNX's own: com.microsoft::MatMulNBits."""
    when: dict[str, int | str] = {}
    """Only nodes whose attributes have these values."""
    outputs: tuple[str, ...] = ()
    """Only nodes whose first output has one of these types; empty: any."""
    kernel: str
    """The path that is taken where all requirements hold, or what the rule is about."""
    requires: tuple[Requirement, ...] = ()
    otherwise: str = ""
    """What happens where one does not hold."""
    effect: Literal["slower", "declined", "fails"] = "slower"
    """Of an unmet requirement: another path of the same provider, the node is left to the CPU, or the run fails."""
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
    kernels: tuple[Kernel, ...] = ()
    registry: str = ""
    """The file beside this one with the kernel registry of `runtime` (see `kernels.py`)."""
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
        """Read a target by name. Raises TargetError where there is none."""
        if name not in target_names():
            raise TargetError(f"there is no target {name!r}{closest(name, target_names())}")
        data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        return Target.model_validate(data)

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
    """Every target, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
