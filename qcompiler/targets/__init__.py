"""Targets: what a runtime has kernels for, as data. One YAML file each; `kernels.py` makes the registry dumps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qcompiler.errors import TargetError
from qcompiler.registry import closest

if TYPE_CHECKING:
    from qcompiler.rewrite import Pass

FOLDER = Path(__file__).parent


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

    def applies(self, candidate: Pass) -> bool:
        return candidate.name == self.pass_name and all(
            getattr(candidate, option) == value for option, value in self.when.items()
        )


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

    @staticmethod
    def load(name: str) -> Target:
        """Read a target by name. Raises TargetError where there is none."""
        if name not in target_names():
            raise TargetError(f"there is no target {name!r}{closest(name, target_names())}")
        data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        return Target.model_validate(data)

    def check(self, passes: Iterable[Pass]) -> None:
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
