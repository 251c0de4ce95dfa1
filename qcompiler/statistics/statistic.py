"""The base of all statistics, and what they share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Range:
    """The range lo … hi that a tensor's scale is to cover; lo may be above 0 (a scale's range is widened to hold 0)."""

    lo: float
    hi: float


class Statistic(ABC):
    """Base of all statistics: the package's docstring shows one of your own."""

    @abstractmethod
    def update(self, batch: Array) -> None:
        """Measure a batch. Raises `DataError` for NaN, infinity, and a shape that does not go with earlier ones."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what `other`, of the same options, measured on later data."""

    @abstractmethod
    def result(self) -> Any:
        """What was measured. Raises `DataError` where nothing was."""

    @property
    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        """Name and options, `Percentile(percent=99.99, bins=8192)`: equal exactly where the same is measured."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{class_name(type(self))}({options})"

    def fresh(self) -> Self:
        """An empty statistic of the same options."""
        return type(self)(**self.options)

    def rescaled(self, divisor: Array) -> Self | None:
        """The statistic of values / divisor along the last axis; None where it cannot be told from this one."""
        del divisor
        return None

    def state(self) -> dict[str, Array]:
        """What was measured, by field."""
        fields = [f.name for f in dataclasses.fields(self) if not f.init]  # type: ignore[arg-type]
        return {name: np.asarray(getattr(self, name)) for name in fields if getattr(self, name) is not None}

    def load_state(self, state: dict[str, Array]) -> None:
        """Take over what `state` returned."""
        known = {f.name for f in dataclasses.fields(self) if not f.init}  # type: ignore[arg-type]
        if not state.keys() <= known:
            raise DataError(f"{self.key} has no measured field {', '.join(sorted(state.keys() - known))}.")
        for name, value in state.items():
            setattr(self, name, value.item() if value.ndim == 0 else value)

    def no_data(self) -> DataError:
        """The error of a `result` without data."""
        return DataError(f"{self.key} has seen no data: give calibration samples that reach this value.")


def class_name(statistic: type[Statistic]) -> str:
    """`MinMax` for qcompiler's own, `module:Class` for any other."""
    own = statistic.__module__.startswith("qcompiler.statistics.")
    return statistic.__name__ if own else f"{statistic.__module__}:{statistic.__qualname__}"


def finite(batch: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The batch in float32; raises `DataError` where it holds NaN, infinity or what float32 cannot hold."""
    values = np.asarray(batch)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    good = np.isfinite(values)
    if not good.all():
        first = tuple(int(i) for i in np.argwhere(~good)[0])
        raise DataError(
            f"contains NaN or infinity ({int((~good).sum())} of {values.size} values, the first at index {first}): "
            "remove the sample, or exclude the layer that makes them."
        )
    return values
