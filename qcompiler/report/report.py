"""The report as data, and its JSON form (`report.json`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from qcompiler.benchmarking.speedup import Speedup
from qcompiler.formats.scheme import Scheme
from qcompiler.placement.placed import Placement
from qcompiler.recipes.gates import GATES, GateKind
from qcompiler.report.compact_json import dumps
from qcompiler.report.pictures import Pictures
from qcompiler.rewriting.contract import CacheChange

Status = Literal["quantized", "excluded", "skipped"]
State = Literal["good", "look", "failed", "not checked"]
MOST_SHOWN = 3  # outputs in a repr


@dataclass(frozen=True)
class SiteReport:
    """What became of one quantizable site."""

    name: str
    module_path: str
    op: str
    status: Status
    block: str = ""
    reason: str = ""
    """Why it is excluded or skipped."""
    scheme: str = ""
    """`weight`, `activation` and the cache's, in words."""
    pass_name: str = ""
    """The pass that quantized it, skipped it, or left it out by an option of its own; ``pass`` in JSON."""
    kernel: str = ""
    """The operator that runs it in ONNX Runtime's optimized graph."""
    provider: str = ""
    """What runs that operator, by the kernel table of the target: CUDA, CPU; empty where there is no table."""
    conditions: str = ""
    """Which of the provider's kernels runs it, and of a faster one that does not, which conditions do not hold."""
    sqnr_db: float | None = None
    """Signal-to-noise ratio of the site's output against the float model in dB, by the mean over tokens of relative
    errors; None where it was not measured."""
    total_sqnr_db: float | None = None
    """The same of the sums over all tokens, which one loud token can have to itself."""
    details: dict[str, str] = field(default_factory=dict)
    """What other passes noted about the site, by pass."""
    weight: Scheme | None = None
    """What its weight is quantized to; None where that is float, and in reports of older versions, as below."""
    activation: Scheme | None = None
    """What its input is quantized to."""
    cache: CacheChange | None = None
    """Of a cache that was quantized: its types and bytes."""

    @property
    def is_cache(self) -> bool:
        """Whether it is a KV-cache, of keys or of values; all else are layers."""
        return self.cache is not None or self.op.endswith(" cache")


@dataclass(frozen=True)
class PassSkip:
    """A site that a pass left as it was; the site itself may still be quantized by another pass."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """One run of a pass."""

    name: str
    seconds: float
    peak_rss: int
    """Peak resident memory of the process up to the end of the pass, in bytes."""
    changed: int
    """Number of sites."""
    skipped: tuple[PassSkip, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Bytes of the constants. A constant that several nodes share counts once."""

    float_bytes: int
    """The whole model before."""
    bytes: int
    """The whole model after."""
    quantized_float_bytes: int
    """What was quantized, before."""
    quantized_bytes: int
    """The same after, with scales and zero points."""


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that one position of one sequence takes in all caches, scales counted."""

    float_bytes: int
    bytes: int


@dataclass(frozen=True)
class Gate:
    """A limit, what was measured, and whether it holds; a limit on something that was not measured does not hold."""

    name: str
    limit: float
    value: float | None
    held: bool


@dataclass
class Report:
    """Everything that one compilation did. `to_json` and `from_json` are inverse to each other."""

    recipe: str
    target: str
    sites: list[SiteReport]
    sizes: Sizes
    passes: list[PassReport] = field(default_factory=list)
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Error of each output against the float model on held-out samples, by measure: sqnr_db, kl, top1, …"""
    speed: Speedup | None = None
    """How fast it ran beside the float model on the machine that compiled it."""
    speed_note: str = ""
    """Why that was not measured."""
    unoptimized: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of outputs that ONNX Runtime's optimizer moves: the same without it."""
    gates: list[Gate] = field(default_factory=list)
    strict: bool = False
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    """Distribution to version."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what went in (model, calibration data, recipe), by name."""
    warnings: list[str] = field(default_factory=list)
    looks: list[str] = field(default_factory=list)
    """What a person should look at before shipping the model, a sentence each, with the next step."""
    cache: CacheSizes | None = None
    """Set where the recipe quantizes caches and the model has some."""
    placement: Placement | None = None
    """Where each node will run, predicted; None for a target without a kernel table."""
    model: str = ""
    """What the model was read from, or its own name."""
    resolved_recipe: str = ""
    """The recipe in YAML, nothing left open."""
    pictures: Pictures = field(default_factory=Pictures)
    """What report.html draws beyond the above."""

    def __repr__(self) -> str:
        """A few lines: what was quantized, how large it is, how far it is from the float model."""
        counts = ", ".join(f"{len(self.with_status(status))} {status}" for status in get_args(Status))
        megabytes = f"{self.sizes.float_bytes / 1e6:.1f} → {self.sizes.bytes / 1e6:.1f} MB"
        lines = [f"Report({self.recipe} for {self.target}: {counts}; {megabytes}"]
        for name, measures in list(self.outputs.items())[:MOST_SHOWN]:
            lines.append(f"  {name}: {', '.join(f'{key} {value:.4g}' for key, value in measures.items())}")
        lines += [f"  {text}" for text in [*self.failures, *self.looks]]
        return "\n".join(lines) + ")"

    def with_status(self, status: Status) -> list[SiteReport]:
        return [site for site in self.sites if site.status == status]

    @property
    def failures(self) -> list[str]:
        """Why the exit code is 1: gates that do not hold, and under `strict` skipped sites; empty when all is well."""
        broken = [describe(gate) for gate in self.gates if not gate.held]
        skipped = len(self.with_status("skipped"))
        if self.strict and skipped:
            broken.append(f"{skipped} {'layer was' if skipped == 1 else 'layers were'} skipped (--strict)")
        misplaced = len(self.placement.warnings) if self.placement is not None else 0
        if self.strict and misplaced:
            broken.append(f"{misplaced} {'warning' if misplaced == 1 else 'warnings'} about where nodes run (--strict)")
        return broken

    @property
    def state(self) -> State:
        """What to think of the result: a failure has exit code 1, and what nobody compared is neither good nor bad."""
        if self.failures:
            return "failed"
        if self.looks:
            return "look"
        return "good" if self.outputs else "not checked"

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Infinite numbers (the signal-to-noise ratio of equal outputs) become the string ``inf``."""
        data = dataclasses.asdict(self)
        for site in data["sites"]:
            site["pass"] = site.pop("pass_name")
        plain: dict[str, Any] = finite(
            {**data, "state": self.state, "exit_code": self.exit_code, "failures": self.failures}
        )
        return plain

    def to_json(self) -> str:
        return dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Report:
        data = json.loads(text)
        for derived in ("state", "exit_code", "failures"):
            data.pop(derived, None)
        for site in data["sites"]:
            site["pass_name"] = site.pop("pass")
        return TypeAdapter(Report).validate_python(data)


def check_gates(limits: Mapping[str, float], outputs: Mapping[str, Mapping[str, float]]) -> list[Gate]:
    """Compare each limit with the worst output. The names of the limits are keys of `GATES`."""
    gates = []
    for name, limit in limits.items():
        kind = GATES[name]
        values = [measures[kind.metric] for measures in outputs.values() if kind.metric in measures]
        # NaN compares false with everything, so a broken output never passes for the best one.
        broken = [value for value in values if math.isnan(value)]
        worst = broken[0] if broken else _worst(values, kind)
        held = worst is not None and (worst >= limit if kind.better == "higher" else worst <= limit)
        gates.append(Gate(name, limit, worst, held))
    return gates


def describe(gate: Gate) -> str:
    """A gate as one clause: ``kl 0.013 is not ≤ 0.01 nats``."""
    kind = GATES[gate.name]
    sign = "≥" if kind.better == "higher" else "≤"
    limit = f"{sign} {gate.limit:g} {kind.unit}".rstrip()
    if gate.value is None:
        return f"{gate.name} was not measured, so {limit} does not hold"
    value = "exact" if kind.unit == "dB" and gate.value == math.inf else f"{gate.value:.4g}"
    return f"{gate.name} {value} is {'' if gate.held else 'not '}{limit}"


def _worst(values: list[float], kind: GateKind) -> float | None:
    if not values:
        return None
    return min(values) if kind.better == "higher" else max(values)


def finite(value: Any) -> Any:
    """Plain data as JSON can hold it, without infinity and NaN: they become the strings ``inf``, ``-inf``, ``nan``."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
