"""Runs timed in turns, so that whatever slows the machine down meanwhile slows all of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcompiler.progress import Progress

Clock = Callable[[], float]
"""Gives seconds."""
NOTCH = 1.57
"""Middle halves over √n that a median may be off by, at 95 % (McGill, Tukey, Larsen 1978)."""
LEAST_ROUNDS = 5
"""Below it, no spread is believed."""


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and the ends of the middle half."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return Spread(middle, low, high)

    def known(self, count: int, precision: float) -> bool:
        """Whether the median of `count` numbers is known to a share of itself."""
        return count >= LEAST_ROUNDS and NOTCH * (self.high - self.low) <= precision * self.median * math.sqrt(count)


@dataclass(frozen=True)
class Limits:
    """When to stop: as soon as one of these is reached."""

    rounds: int
    seconds: float
    """Of wall time for all rounds, the warm-up too; a round is always finished, and one is always run."""
    precision: float
    """Of the median time of each run, as a share of it."""
    shortest: float = 0.002
    """Seconds that a run is to take, or it is repeated within its turn: shorter ones are lost in the clock."""


@dataclass(frozen=True)
class Timed:
    """Seconds of each round, of one run."""

    cpu: tuple[float, ...]
    """Of all threads of the process."""
    wall: tuple[float, ...]


def in_turns(
    runs: Sequence[Callable[[int], object]],
    limits: Limits,
    *,
    cpu: Clock = time.process_time,
    wall: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> list[Timed]:
    """Call each run, with the number of the round, once a round; who begins changes from round to round.

    The first round warms up and does not count, unless it takes all the time there is.
    """
    begin, found, repeats = wall(), [Timed((), ()) for _ in runs], [1] * len(runs)
    for number in itertools.count():
        for index in ((number + place) % len(runs) for place in range(len(runs))):
            start, used = wall(), cpu()
            for _ in range(repeats[index]):
                runs[index](number)
            taken = (cpu() - used) / repeats[index], (wall() - start) / repeats[index]
            found[index] = Timed((*found[index].cpu, taken[0]), (*found[index].wall, taken[1]))
        late = wall() - begin >= limits.seconds
        if number == 0 and not late:
            repeats = [max(1, math.ceil(limits.shortest / max(one.wall[0], 1e-6))) for one in found]
            found = [Timed((), ()) for _ in runs]
        elif progress is not None:
            progress(min(number, limits.rounds), limits.rounds)
        if late or number >= limits.rounds or all(_known(one, limits.precision) for one in found):
            return found
    raise AssertionError("rounds are counted without end")


def _known(one: Timed, precision: float) -> bool:
    return len(one.cpu) >= LEAST_ROUNDS and Spread.of(one.cpu).known(len(one.cpu), precision)


def ratios(first: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast the other is, round by round."""
    pairs = zip(first, other, strict=True)
    return Spread.of([a / max(b, 1e-9) for a, b in pairs])
