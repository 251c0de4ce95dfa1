"""What calibration measures at a value: small mergeable statistics, and the store that keeps them.

A statistic is a dataclass. Its init fields are its options; its other fields are what it has measured. `update` takes a
batch of any rank and any (also ragged) shape, `merge` adds what another one of the same options measured on other data,
`result` answers. One of your own needs these three, and may then be named in a recipe as `module:Class`:

    from dataclasses import dataclass, field
    from qcompiler.statistics import Statistic, finite

    @dataclass(eq=False)
    class LargestL1(Statistic):
        threshold: float = 0.0                                # an option
        largest: float = field(default=0.0, init=False)       # measured

        def update(self, batch):
            rows = finite(batch)
            self.largest = max(self.largest, self.threshold, float(abs(rows).sum(-1).max(initial=0.0)))

        def merge(self, other):
            self.largest = max(self.largest, other.largest)

        def result(self):
            return self.largest

Measured fields are numbers, numpy arrays or None, and are saved as they stand. `merge` adds what was measured on data
that came *after* one's own. Except for `MovingAverageMinMax` the order does not matter: counts, minima and maxima are
the same however the data is cut into shards, sums are the same up to rounding.
"""

from __future__ import annotations

from qcompiler.statistics.channels import ChannelAbsMax, ChannelFolds, ChannelMoments, ChannelRange, SecondMoment
from qcompiler.statistics.heads import HeadRange
from qcompiler.statistics.ranges import MSE, Entropy, MinMax, MovingAverageMinMax, Percentile
from qcompiler.statistics.statistic import Range, Statistic, class_name, finite
from qcompiler.statistics.store import StatisticsStore

__all__ = [
    "ChannelAbsMax",
    "ChannelFolds",
    "ChannelMoments",
    "ChannelRange",
    "Entropy",
    "HeadRange",
    "MSE",
    "MinMax",
    "MovingAverageMinMax",
    "Percentile",
    "Range",
    "SecondMoment",
    "Statistic",
    "StatisticsStore",
    "class_name",
    "finite",
]
