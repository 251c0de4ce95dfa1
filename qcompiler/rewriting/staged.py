"""A pass whose work is long: it computes unit by unit, without touching the model, and writes what it has computed.

The pipeline stands between the two. It asks its checkpoint before it has anything computed, so that a run that was
killed goes on where it was, and it measures in stages where the statistics of all units together would not fit.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.formats.arithmetic import Quantized
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changes, Pass, Tap
from qcompiler.statistics import StatisticsStore

Measured = Literal["at once", "in stages", "in turn"]


@dataclass(frozen=True)
class Computed:
    """What was computed for a unit, as a checkpoint can hold it."""

    arrays: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain data, as JSON has it."""

    @staticmethod
    def of(quantized: Mapping[str, Quantized], **facts: Any) -> Computed:
        """Quantized constants by name."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        shapes = {}
        for name, found in quantized.items():
            given = {"codes": found.codes, "scale": found.scale, "zero_point": found.zero_point}
            arrays |= {f"{name}.{kind}": array for kind, array in given.items() if array is not None}
            shapes[name] = {"axis": found.axis, "block_size": found.block_size, "format": found.format}
        return Computed(arrays, {"quantized": shapes, **facts})

    def quantized(self, name: str) -> Quantized:
        shape = self.facts["quantized"][name]
        return Quantized(
            self.arrays[f"{name}.codes"], self.arrays[f"{name}.scale"], self.arrays.get(f"{name}.zero_point"),
            shape["axis"], shape["block_size"], shape["format"],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Unit:
    """What is computed as one; found in the model before the pass changes anything."""

    name: str
    """Unique in a run of the pass, and the same in a run that goes on with it."""
    stage: int
    """Units of one stage are measured together; stages count from 0, in graph order."""
    taps: tuple[Tap, ...]
    work: Any
    """What the pass found there: constants, a group of layers …"""


@options(frozen=True, config=OPTIONS)
class StagedPass(Pass):
    """Base of the passes that compute first and write then."""

    @property
    def measured(self) -> Measured:
        """How its taps are measured.

        "at once", with those of other passes; "in stages", each dropped once it is computed from, on the model that the
        pass begins with; or "in turn", each stage on the model as those before have rewritten it.
        """
        return "at once"

    @abc.abstractmethod
    def units(self, model: ir.Model, changes: Changes) -> Sequence[Unit]:
        """What there is to compute, in graph order; what cannot be done goes to `changes`."""

    @abc.abstractmethod
    def compute(self, unit: Unit, statistics: StatisticsStore) -> Computed:
        """Leaves the model as it is."""

    @abc.abstractmethod
    def write(self, unit: Unit, computed: Computed, rw: Rewriter, changes: Changes) -> None:
        """Rewrite the model with what was computed, now or in a run before, and say what was done."""

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        return [tap for unit in self.units(model, Changes()) for tap in unit.taps]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        for unit in self.units(model, changes):
            self.write(unit, self.compute(unit, statistics), rw, changes)
        return changes


def stages(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units of each stage, in the order of the stages."""
    found: dict[int, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.stage, []).append(unit)
    return [found[number] for number in sorted(found)]
