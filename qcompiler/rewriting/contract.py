"""What a pass is, what it asks to have measured, and what it says it did."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
import onnx_ir as ir
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options

from qcompiler.formats.scheme import Scheme, in_words
from qcompiler.sites.find import Site, matches
from qcompiler.statistics import Statistic, StatisticsStore

if TYPE_CHECKING:
    from qcompiler.targets import Target

SiteT = TypeVar("SiteT", bound=Site)
Kind = Literal["analysis", "exact", "rounding", "tuning", "lowering"]
"""`analysis` decides and rewrites nothing, `exact` keeps the function, `rounding` quantizes, `tuning` trains what was
inserted before, `lowering` brings the operators of a runtime."""


@dataclass(frozen=True)
class Tap:
    """A value that a pass wants measured, and how: `statistic` is an empty prototype."""

    value: str
    statistic: Statistic


@dataclass(frozen=True)
class CacheChange:
    """How a cache is stored now: element types, and bytes for each position of each sequence, scales counted."""

    past: str
    """The graph input."""
    present: str
    """The graph output."""
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    scheme: Scheme | None = None
    """None in reports of older versions."""

    def __str__(self) -> str:
        return f"{self.before} → {self.after}, {self.bytes_before} → {self.bytes_after} bytes a token"


@dataclass(frozen=True)
class Changed:
    """A site that a pass changed, with a scheme of each thing that it quantized; `detail` is one line for the report.

    A later pass may say the scheme again, where it has changed it.
    """

    site: str
    weight: Scheme | None = None
    activation: Scheme | None = None
    kernel: str = ""
    detail: str = ""
    cache: CacheChange | None = None
    """Set where the site is a cache."""
    float_input: bool = False
    """The site's activation was quantized, and this lowering has made it float again."""

    @property
    def scheme(self) -> str:
        """What the pass quantized the site to, in words; empty where it did not."""
        return in_words(self.weight, self.activation, self.cache.scheme if self.cache is not None else None)


@dataclass(frozen=True)
class Skipped:
    """A site that a pass was asked to change and did not, with the reason, one clause that a person can act on."""

    site: str
    reason: str
    undone: Literal["", "activation", "layer"] = ""
    """What of the site was quantized and is float again after this lowering."""


@dataclass
class Changes:
    """What one run of a pass did."""

    changed: list[Changed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    # What an option of the pass leaves out on principle (sensitive layers), with the reason; no fault of the site's.
    excluded: list[Skipped] = field(default_factory=list)
    # How an exact pass rescaled values: each is now its old self divided by the vector, along the last axis.
    rescaled: dict[str, np.ndarray] = field(default_factory=dict)
    # Values that are codes now, each with the value inside that holds what it stood for.
    moved: dict[str, str] = field(default_factory=dict)
    # Bits that an analysis has decided on for layers, by name; the passes that quantize weights get them (`decided`).
    bits: dict[str, int] = field(default_factory=dict)
    # Bytes that constants have lost which no pass quantized.
    narrowed: int = 0

    @property
    def modified(self) -> bool:
        return bool(self.changed)


OPTIONS = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@options(frozen=True, config=OPTIONS)
class Pass(abc.ABC):
    """A rewrite of the graph. The fields of a subclass are its options: recipe, command line and docs come from them.

    Subclasses are frozen (`@options(frozen=True, config=OPTIONS)`), keep no state between runs, and carry their
    manual page as the docstring of their module.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    works_on: ClassVar[Literal["layers", "caches"]] = "layers"

    targets: tuple[str, ...] = ()
    """Patterns of the sites to work on; empty means all. Exact, glob or ``re:…``, on module paths and node names."""
    ignore: tuple[str, ...] = ()
    """Patterns of the sites to leave alone."""

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        """What has to be measured before `apply`."""
        return ()

    def for_target(self, target: Target) -> Pass:
        """The pass with what its options leave open filled in by what the target runs best."""
        return self

    def decided(self, bits: Mapping[str, int]) -> Pass:
        """The pass with what analyses before it in the recipe have decided: bits of layers, by name."""
        return self

    @abc.abstractmethod
    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        """Rewrite the model in place and say what was done."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of all options; each has to name a site of the model."""
        return (*self.targets, *self.ignore)

    def selects(self, site: Site) -> bool:
        """Whether the options leave this site to the pass."""
        if self.targets and not any(matches(pattern, site) for pattern in self.targets):
            return False
        return not any(matches(pattern, site) for pattern in self.ignore)

    def selected(self, sites: Iterable[SiteT]) -> list[SiteT]:
        return [site for site in sites if self.selects(site)]


@dataclass(frozen=True)
class PassRun:
    """One run of a pass: what it did and what it cost."""

    step: Pass
    changes: Changes
    seconds: float
    peak_rss: int
    """Peak resident memory of the process up to here, in bytes."""
