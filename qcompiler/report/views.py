"""The report as its page shows it: what is counted, grouped and named before a template sees it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qcompiler.recipes.gates import GATES
from qcompiler.report import speed, svg
from qcompiler.report.pictures import ChannelPicture, SpeedClass, WeightPicture
from qcompiler.report.report import Gate, Report, SiteReport, describe
from qcompiler.report.svg import Drawn, side_by_side
from qcompiler.report.table import MEASURES, decibels, kind_of, measured, size
from qcompiler.report.verdict import Verdict, verdict

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["View", "number", "size"]

SQNR_STEPS = (10, 15, 20, 25, 30, 35, 40)  # dB: the limits between the colours of the map
MOST_COLUMNS = 14  # of the map; a model with more kinds of layers is shown as a row of cells for each operator
SHOWN_CHANNELS = 6  # activations that are drawn without being asked for: those with the largest spread
CONTEXTS = (1024, 8192, 32768, 131072)  # tokens


@dataclass(frozen=True)
class Tile:
    """One figure of the verdict."""

    title: str
    figure: str
    note: str
    mood: str = ""
    """good, bad or empty: for the colour of its edge."""


@dataclass(frozen=True)
class Reason:
    """Why some sites were left as they were."""

    how: str
    reason: str
    sites: list[str]


@dataclass(frozen=True)
class WeightRow:
    """The weights of one kind of layer, over all blocks."""

    kind: str
    layers: int
    absmax: str
    rms: str
    histogram: Markup
    scales: Markup | None
    scale_count: int


class View:
    """What the templates ask of a report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.paths = {site.name: site.module_path or site.name for site in report.sites}

    @property
    def layers(self) -> list[SiteReport]:
        return [site for site in self.report.sites if not site.is_cache]

    @cached_property
    def verdict(self) -> Verdict:
        return verdict(self.report)

    @cached_property
    def tiles(self) -> list[Tile]:
        found = [self._size(), self._layers(), *self._errors(), *self._worst()]
        found.append(self._speed())
        if self.report.cache is not None:
            before, after = self.report.cache.float_bytes, self.report.cache.bytes
            count = f"{len(self.caches)} {'cache' if len(self.caches) == 1 else 'caches'} quantized"
            note = f"{size(before)} before, {_times(before, after)}; {count}"
            found.append(Tile("KV cache, a token", size(after), note))
        return found

    def _size(self) -> Tile:
        sizes = self.report.sizes
        note = f"{size(sizes.float_bytes)} before, {_times(sizes.float_bytes, sizes.bytes)}"
        if sizes.quantized_float_bytes:
            quantized = f"{size(sizes.quantized_float_bytes)} → {size(sizes.quantized_bytes)}"
            note += f"; quantized weights {quantized}"
        return Tile("Size", size(sizes.bytes), note)

    def _layers(self) -> Tile:
        counted = Counter(site.status for site in self.layers)
        rest = [f"{counted[status]} {status}" for status in ("excluded", "skipped") if counted[status]]
        figure = f"{counted['quantized']} of {len(self.layers)}"
        return Tile("Layers quantized", figure, ", ".join(rest) or "none left out", "bad" if counted["skipped"] else "")

    def _errors(self) -> list[Tile]:
        """The worst output by the measures that say most: for tokens their own, for anything else signal to noise."""
        outputs = self.report.outputs
        if not outputs:
            return [Tile("Error", "not measured", "give --calibration with two samples or more")]
        if any("kl" in measures for measures in outputs.values()):
            chosen = [name for name in ("perplexity_ratio", "kl", "top1") if any(name in m for m in outputs.values())]
        else:
            chosen = ["sqnr_db"]
        found = []
        for name in chosen:
            values = {output: measures[name] for output, measures in outputs.items() if name in measures}
            worst = max if name in ("perplexity_ratio", "kl") else min
            output = worst(values, key=lambda key: values[key])
            gate = next((gate for gate in self.report.gates if GATES[gate.name].metric == name), None)
            mood = "" if gate is None else "good" if gate.held else "bad"
            note = _limit(gate) if gate is not None else f"{output}, no gate"
            found.append(Tile(_measure(name), measured(name, values[output]), note, mood))
        return found

    def _worst(self) -> list[Tile]:
        """The quantized layer, or cache, that is farthest from the float model."""
        sites = self.report.with_status("quantized")
        known = [(site.sqnr_db, site) for site in sites if site.sqnr_db is not None]
        if not known:
            return []
        level, worst = min(known, key=lambda found: -math.inf if math.isnan(found[0]) else found[0])
        title = "Worst cache" if worst.is_cache else "Worst layer"
        return [Tile(title, decibels(level), self.paths[worst.name])]

    def _speed(self) -> Tile:
        figure, note, mood = speed.figure(self.report)
        return Tile("Speed against float", figure, note, mood)

    @property
    def measures(self) -> list[str]:
        return [name for name in MEASURES if any(name in measured for measured in self.report.outputs.values())]

    def measure_name(self, name: str) -> str:
        return MEASURES[name][0]

    def measure(self, name: str, value: float) -> str:
        return measured(name, value)

    def decibels(self, site: SiteReport) -> str:
        """For a column whose head has the unit."""
        return "·" if site.sqnr_db is None else decibels(site.sqnr_db).removesuffix(" dB")

    def gate(self, gate: Gate) -> str:
        return describe(gate)

    # The map of layers and caches

    @cached_property
    def kinds(self) -> list[str]:
        """What layers are within their blocks; empty where they are of too many kinds for a table."""
        kinds = list(dict.fromkeys(kind_of(site) for site in self.report.sites if site.block))
        return kinds if len(kinds) <= MOST_COLUMNS else []

    @cached_property
    def rows(self) -> list[tuple[str, dict[str, SiteReport]]]:
        """(block, its layers by kind), in graph order."""
        found: dict[str, dict[str, SiteReport]] = defaultdict(dict)
        for site in self.report.sites:
            if site.block and self.kinds:
                found[site.block][kind_of(site)] = site
        return list(found.items())

    @cached_property
    def others(self) -> list[SiteReport]:
        """What the table of blocks does not show."""
        return [site for site in self.report.sites if not (site.block and self.kinds)]

    def short(self, block: str) -> str:
        """A block's name for a narrow column: its number, where all blocks are numbers of one list."""
        stems = {name.rpartition(".")[0] for name, _ in self.rows}
        return block.rpartition(".")[2] if len(stems) == 1 else block

    def step(self, site: SiteReport) -> str:
        """Which colour of the map: 0 (worst) to 7, or why there is none."""
        if site.status != "quantized":
            return site.status
        if site.sqnr_db is None or math.isnan(site.sqnr_db):
            return "unknown"
        return str(sum(site.sqnr_db >= limit for limit in SQNR_STEPS))

    def bits(self, site: SiteReport) -> str:
        """Bits of the codes of a quantized site; empty for one that is not."""
        scheme = site.weight or (site.cache.scheme if site.cache is not None else None)
        return str(scheme.number_format.bits) if scheme is not None else ""

    def cell(self, site: SiteReport) -> str:
        """What a cell of the map says: decibels, or why there are none."""
        if site.status != "quantized":
            return {"excluded": "–", "skipped": "×"}[site.status]
        if site.sqnr_db is None or math.isnan(site.sqnr_db):
            return "·"
        return "exact" if math.isinf(site.sqnr_db) else f"{site.sqnr_db:.0f}"

    def tip(self, site: SiteReport) -> str:
        what = site.scheme if site.status == "quantized" else f"{site.status}: {site.reason}"
        sqnr = f", {decibels(site.sqnr_db)}" if site.sqnr_db is not None else ""
        return f"{self.paths[site.name]}: {what}{sqnr}"

    @property
    def legend(self) -> list[tuple[str, str]]:
        limits = [f"< {SQNR_STEPS[0]} dB", *(str(limit) for limit in SQNR_STEPS[:-1]), f"≥ {SQNR_STEPS[-1]} dB"]
        return [(str(step), text) for step, text in enumerate(limits)]

    def notes(self, site: SiteReport) -> str:
        return "; ".join(f"{name}: {text}" for name, text in site.details.items())

    # Drawings

    @cached_property
    def drawings(self) -> list[Drawn]:
        return side_by_side(self.report.pictures.drawings)

    @cached_property
    def drawn(self) -> dict[str, int]:
        """Which drawing each block has."""
        places = {b: index for index, drawn in enumerate(self.report.pictures.drawings) for b in drawn.blocks}
        order = [block for block, _ in self.rows]
        known = {block: places[block] for block in order if block in places}
        return known | {block: index for block, index in places.items() if block not in known}

    # Activations

    @cached_property
    def channels(self) -> list[ChannelPicture]:
        """Those with the largest spread first."""
        return sorted(self.report.pictures.channels, key=lambda one: -one.spread_before)

    @property
    def shown_channels(self) -> int:
        return SHOWN_CHANNELS

    def readers(self, picture: ChannelPicture) -> str:
        names = [self.paths.get(site, site) for site in picture.sites]
        stem = names[0].rpartition(".")[0]
        if len(names) > 1 and all(name.rpartition(".")[0] == stem for name in names):
            return f"{stem}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}"
        return ", ".join(names)

    def spread(self, picture: ChannelPicture) -> str:
        before = f"{picture.spread_before:g}×"
        return before if picture.spread_after is None else f"{before} → {picture.spread_after:g}×"

    def bars(self, values: tuple[float, ...], css: str) -> Markup:
        return svg.bars(values, css)

    @cached_property
    def spreads(self) -> Markup:
        return svg.spreads(
            [(self.readers(one), one.spread_before, one.spread_after) for one in self.report.pictures.channels]
        )

    # Weights

    @cached_property
    def weights(self) -> list[WeightRow]:
        kinds = {site.name: kind_of(site) for site in self.report.sites}
        groups: dict[str, list[WeightPicture]] = defaultdict(list)
        for picture in self.report.pictures.weights:
            groups[kinds.get(picture.site, "other")].append(picture)
        scaled = [one.scales for one in self.report.pictures.weights if one.scales]
        ends = [end for scales in scaled for end in (scales[0], scales[-1]) if end]
        return [_weight_row(kind, group, ends) for kind, group in groups.items()]

    # The rest

    @cached_property
    def reasons(self) -> list[Reason]:
        """Who was left out by whom and why, the commonest first."""
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for site in self.report.sites:
            if site.status != "quantized":
                found[site.status, site.reason].append(self.paths[site.name])
        skipped = {site.name for site in self.report.with_status("skipped")}
        for run in self.report.passes:
            for skip in run.skipped:
                if skip.site not in skipped:
                    found[f"without {run.name}", skip.reason].append(self.paths.get(skip.site, skip.site))
        rows = [Reason(how, reason, sites) for (how, reason), sites in found.items()]
        order = {"skipped": 0, "excluded": 1}
        return sorted(rows, key=lambda row: (order.get(row.how, 2), -len(row.sites)))

    @property
    def contexts(self) -> list[tuple[int, int, int]]:
        """(tokens, bytes before, after) of one sequence."""
        cache = self.report.cache
        return [] if cache is None else [(n, n * cache.float_bytes, n * cache.bytes) for n in CONTEXTS]

    @property
    def caches(self) -> list[SiteReport]:
        return [site for site in self.report.sites if site.cache is not None]

    @cached_property
    def providers(self) -> list[tuple[str, int, float]]:
        """(provider, nodes, share in %)."""
        placement = self.report.placement
        counted = Counter(node.provider or "none" for node in placement.nodes) if placement is not None else Counter()
        total = sum(counted.values())
        return [(name, count, 100 * count / total) for name, count in counted.most_common()]

    @cached_property
    def operators(self) -> list[tuple[str, str, int]]:
        """(operator, provider, nodes) of the target's graph, the commonest first."""
        placement = self.report.placement
        counted = Counter((node.op, node.provider) for node in placement.nodes) if placement is not None else Counter()
        return [(op, provider or "none", count) for (op, provider), count in counted.most_common(12)]

    @cached_property
    def slowest(self) -> float:
        return max((run.seconds for run in self.report.passes), default=0.0) or 1.0

    @cached_property
    def largest(self) -> float:
        return max((run.peak_rss for run in self.report.passes), default=0) or 1.0

    def speed(self, one: SpeedClass) -> str:
        return speed.by_table(one)


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _weight_row(kind: str, group: list[WeightPicture], ends: list[float]) -> WeightRow:
    histogram = [sum(counts) for counts in zip(*(one.histogram for one in group), strict=True)]
    with_scales = [one for one in group if one.scales]
    scales = None
    if with_scales:
        columns = zip(*(one.scales for one in with_scales), strict=True)
        middle = [sorted(column)[len(with_scales) // 2] for column in columns]
        middle[0], middle[-1] = min(o.scales[0] for o in with_scales), max(o.scales[-1] for o in with_scales)
        scales = svg.box(middle, min(ends, default=0.0), max(ends, default=0.0))
    return WeightRow(
        kind=kind, layers=len(group), absmax=_span([one.absmax for one in group]),
        rms=_span([one.rms for one in group]), histogram=svg.bars(histogram, "weight", 180, 34), scales=scales,
        scale_count=sum(one.scale_count for one in group),
    )  # fmt: skip


def _span(values: list[float]) -> str:
    lo, hi = f"{min(values):.2g}", f"{max(values):.2g}"
    return lo if lo == hi else f"{lo} … {hi}"


def _times(before: float, after: float) -> str:
    if not before or not after:
        return "empty"
    if f"{before / after:.2f}" == "1.00":
        return "as large"
    return f"{before / after:.2f}× smaller" if after < before else f"{after / before:.2f}× larger"


def _measure(name: str) -> str:
    return MEASURES[name][0][0].upper() + MEASURES[name][0][1:]


def _limit(gate: Gate) -> str:
    sign = "≥" if GATES[gate.name].better == "higher" else "≤"
    return f"gate {sign} {gate.limit:g}: {'held' if gate.held else 'broken'}"
