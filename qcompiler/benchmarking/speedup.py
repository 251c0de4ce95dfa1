"""How fast a compiled model is beside its float model, in a moment's measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.benchmarking.runner import Runner
from qcompiler.benchmarking.timing import LEAST_ROUNDS, Limits, Spread, in_turns, ratios
from qcompiler.progress import Progress
from qcompiler.targets.machines import this_cpu

if TYPE_CHECKING:
    import onnxruntime

LIMITS = Limits(rounds=40, seconds=2.0, precision=0.02)
"""A tiny model is done in a tenth of a second; of a very large one each runs once, however long that takes."""
THREADS = 1
SURELY_SLOWER = 0.9
"""Where the rounds are too few to show what they differ by."""


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the float model: both ran in turns on the same samples, opened as their users do."""

    ratio: float
    """Of CPU time, which other processes hardly change: the median over rounds."""
    low: float
    """The ends of the middle half, as `high`."""
    high: float
    float_seconds: float
    """CPU time of a run: the median."""
    seconds: float
    """The same of the compiled model."""
    rounds: int
    threads: int
    inputs: str
    """The shape of the first sample's largest input."""
    machine: str

    @property
    def slower(self) -> bool:
        """Whether it is, beyond what rounds differ by."""
        return self.high < 1 if self.rounds >= LEAST_ROUNDS else self.ratio < SURELY_SLOWER

    def __str__(self) -> str:
        return f"{self.ratio:.3g} × ({self.low:.3g} … {self.high:.3g})"

    @property
    def case(self) -> str:
        """What it belongs to, in words."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.inputs}, {threads}"


def speedup(
    reference: onnxruntime.InferenceSession, compiled: onnxruntime.InferenceSession,
    samples: Sequence[Mapping[str, np.ndarray]], adapted: Sequence[Mapping[str, np.ndarray]],
    progress: Progress | None = None,
) -> Speedup:  # fmt: skip
    """Time both on the samples, `adapted` to what the compiled model reads. Raises DataError where one does not run."""
    runners = [Runner("the float model", reference, samples), Runner("the compiled model", compiled, adapted)]
    before, after = (times.cpu for times in in_turns(runners, LIMITS, progress=progress))
    ratio = ratios(before, after)
    return Speedup(
        ratio.median, ratio.low, ratio.high, Spread.of(before).median, Spread.of(after).median, len(before), THREADS,
        _largest(samples[0]), str(this_cpu()),
    )  # fmt: skip


def _largest(sample: Mapping[str, np.ndarray]) -> str:
    name = max(sample, key=lambda name: sample[name].size, default="")
    return f"{name} {list(sample[name].shape)}" if name else "no inputs"
