"""What the report draws, as data of bounded size: channels of activations, weights, scales, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["same", "changed", "quantized", "added", "removed", "outside"]


@dataclass(frozen=True)
class ChannelPicture:
    """How large the channels of an activation get on the calibration data, before and after passes rescaled it."""

    value: str
    sites: tuple[str, ...]
    """Names of the layers that read it."""
    measure: Literal["absmax", "rms"]
    """What was measured of a channel: its largest magnitude, or the root of its mean square."""
    channels: int
    before: tuple[float, ...]
    """Of each channel; where there are more channels than bars, the largest of neighbours. Three digits."""
    after: tuple[float, ...]
    """Empty where no pass rescaled the value."""
    spread_before: float
    """The largest channel over the median one, of all channels."""
    spread_after: float | None
    passes: tuple[str, ...]
    """The passes that rescaled it."""


@dataclass(frozen=True)
class WeightPicture:
    """The values of one layer's float weight, sampled evenly, and the scales of its codes."""

    site: str
    absmax: float
    """Of the sample."""
    rms: float
    histogram: tuple[int, ...]
    """Counts of equal bins from -absmax to absmax."""
    scales: tuple[float, ...]
    """Least, 5 %, 25 %, 50 %, 75 %, 95 % and largest magnitude of its scales; empty where there are none to be read."""
    scale_count: int = 0


@dataclass(frozen=True)
class DrawnUnit:
    """Some nodes of a block that are drawn as one: those of one module which lie together."""

    label: str
    """The module's path within the block; the operator where it has none."""
    operators: tuple[str, ...]
    """Each once, the commonest first; for one weight, its type and shape follow the operator."""
    nodes: int
    fate: Fate = "same"
    note: str = ""
    """The passes that touched it."""


@dataclass(frozen=True)
class DrawnGraph:
    """A block as units and the edges between them, by their indices."""

    units: tuple[DrawnUnit, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Drawing:
    """One or more blocks that look the same before and after."""

    blocks: tuple[str, ...]
    before: DrawnGraph
    after: DrawnGraph


@dataclass(frozen=True)
class SpeedClass:
    """How fast the layers of one kernel are expected to run, by what was measured of that kernel on some machine."""

    kernel: str
    scheme: str
    """The family, as the target's table names it; empty where the table has no row for these layers."""
    sites: int
    ratios: tuple[float, ...]
    """Speed over the float kernel's, of every measured case; empty where nobody has measured it."""
    cases: tuple[str, ...]
    """What each ratio belongs to."""
    here: tuple[bool, ...] = ()
    """Whether each was measured on a CPU of the kind that compiled the model."""


@dataclass(frozen=True)
class Pictures:
    """Everything that is drawn and is not in the report already."""

    channels: tuple[ChannelPicture, ...] = ()
    weights: tuple[WeightPicture, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    undrawn: str = ""
    """Why blocks are missing among the drawings; empty where none is."""
    speed: tuple[SpeedClass, ...] = ()
