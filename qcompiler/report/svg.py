"""The drawings of the report, as SVG whose colours come from the page: `svg` classes name what a mark stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qcompiler.report.layout import HEIGHT, WIDTH, layout, width_of
from qcompiler.report.pictures import Drawing, DrawnGraph, DrawnUnit

LONGEST_LABEL = 19  # characters that fit into a unit
LONGEST_OPERATOR = 23


def bars(values: Sequence[float], css: str, width: int = 300, height: int = 64) -> Markup:
    """Bars from 0 to the largest value, as one path."""
    top = max(values, default=0.0) or 1.0
    step = width / max(len(values), 1)
    line = "".join(
        f"M{index * step:.1f} {height}v{-_height(value / top, height):.1f}h{step * 0.86:.2f}V{height}z"
        for index, value in enumerate(values)
    )
    return _svg(f'<path class="{css}" d="{line}"/>', width, height, stretch=True)


def spreads(points: Sequence[tuple[str, float, float | None]], width: int = 760, height: int = 190) -> Markup:
    """The largest channel over the median one of each value, before and after, along the model; a logarithmic scale."""
    numbers = [number for _, before, after in points for number in (before, after) if number and math.isfinite(number)]
    top = max(10.0, 10 ** math.ceil(math.log10(max(numbers, default=10.0))))
    left, bottom = 60.0, height - 8.0

    def y(value: float) -> float:
        share = math.log10(min(max(value, 1.0), top)) / math.log10(top)
        return bottom - share * (bottom - 12)

    parts = []
    for power in range(round(math.log10(top)) + 1):
        line = y(10**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{line:.1f}" y2="{line:.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 6}" y="{line + 4:.1f}" text-anchor="end">{10**power:g}×</text>')
    step = (width - left - 12) / max(len(points), 1)
    radius = max(2.0, min(5.0, step / 3))
    for index, (label, before, after) in enumerate(points):
        x = left + 8 + (index + 0.5) * step
        text = f"{label}: {before:g}× the median channel" + (f" → {after:g}×" if after is not None else "")
        marks = f'<circle class="before" cx="{x:.1f}" cy="{y(before):.1f}" r="{radius:.1f}"/>'
        if after is not None:
            marks = f'<line class="between" x1="{x:.1f}" x2="{x:.1f}" y1="{y(before):.1f}" y2="{y(after):.1f}"/>{marks}'
            marks += f'<circle class="after" cx="{x:.1f}" cy="{y(after):.1f}" r="{radius:.1f}"/>'
        parts.append(f"<g><title>{escape(text)}</title>{marks}</g>")
    return _svg("".join(parts), width, height)


def box(quantiles: Sequence[float], lo: float, hi: float, width: int = 220, height: int = 22) -> Markup:
    """Least, 5, 25, 50, 75, 95 % and largest on a logarithmic axis from lo to hi."""
    span = math.log10(hi / lo) if hi > lo > 0 else 1.0

    def x(value: float) -> float:
        share = math.log10(max(value, lo) / lo) / span if lo > 0 else 0.5
        return 3 + min(max(share, 0.0), 1.0) * (width - 6)

    least, low, first, middle, third, high, largest = (x(value) for value in quantiles)
    half = height / 2
    return _svg(
        f'<line class="whisker" x1="{least:.1f}" x2="{largest:.1f}" y1="{half}" y2="{half}"/>'
        f'<rect class="tails" x="{low:.1f}" y="{half - 4}" width="{max(high - low, 1.5):.1f}" height="8" rx="2"/>'
        f'<rect class="quartiles" x="{first:.1f}" y="{half - 6}" width="{max(third - first, 1.5):.1f}" height="12"/>'
        f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="{half - 8}" y2="{half + 8}"/>',
        width, height,
    )  # fmt: skip


def drawing(graph: DrawnGraph, title: str) -> Markup:
    """A block: units as boxes, edges as curves from top to bottom."""
    placed = layout(graph)
    parts = []
    for (a, b), points in placed.edges.items():
        css = "edge code" if graph.units[b].fate == "quantized" and graph.units[a].fate == "added" else "edge"
        parts.append(f'<path class="{css}" d="{_curve(points)}"/>')
    parts += [_unit(unit, *placed.centres[index]) for index, unit in enumerate(graph.units)]
    width, height = placed.width + 8, placed.height + 8
    body = f'<g transform="translate(4 4)">{"".join(parts)}</g>'
    style = f"max-width:{width:.0f}px;min-width:{0.72 * width:.0f}px"
    opening = f'<svg class="drawing" role="img" viewBox="0 0 {width:.0f} {height:.0f}" style="{style}">'
    return Markup(f"{opening}<title>{escape(title)}</title>{body}</svg>")


@dataclass(frozen=True)
class Drawn:
    """A drawing that is ready for a page."""

    blocks: tuple[str, ...]
    before: Markup
    after: Markup


def side_by_side(drawings: Sequence[Drawing]) -> list[Drawn]:
    return [Drawn(one.blocks, drawing(one.before, "before"), drawing(one.after, "after")) for one in drawings]


def _unit(unit: DrawnUnit, x: float, y: float) -> str:
    if unit.fate == "outside":
        width = width_of(unit)
        return (
            f'<g class="unit outside"><title>{escape(unit.label)}</title>'
            f'<rect x="{x - width / 2:.1f}" y="{y - 10:.1f}" width="{width:g}" height="20" rx="10"/>'
            f'<text class="label" x="{x:.1f}" y="{y + 4:.1f}">{escape(_short(unit.label, LONGEST_LABEL))}</text></g>'
        )
    operators = ", ".join(unit.operators)
    said = f"{unit.label}: {operators}" + (f" ({unit.nodes} nodes)" if unit.nodes > 1 else "")
    said += f"; {unit.fate}" + (f" by {unit.note}" if unit.note else "")
    lines = [f"{unit.nodes} nodes"] if unit.nodes > 3 else [line for line in unit.operators[:2] if line != unit.label]
    if not lines and unit.fate in ("added", "removed"):
        lines = [unit.fate]
    top = y + 4 - 6.5 * len(lines)
    text = f'<text class="label" x="{x:.1f}" y="{top:.1f}">{escape(_short(unit.label, LONGEST_LABEL))}</text>'
    for number, line in enumerate(lines, 1):
        line = escape(_short(line, LONGEST_OPERATOR))
        text += f'<text class="operators" x="{x:.1f}" y="{top + 13 * number:.1f}">{line}</text>'
    corner = f'x="{x - WIDTH / 2:.1f}" y="{y - HEIGHT / 2:.1f}"'
    box = f'<rect {corner} width="{WIDTH:g}" height="{HEIGHT:g}" rx="7"/>'
    return f'<g class="unit {unit.fate}"><title>{escape(said)}</title>{box}{text}</g>'


def _short(text: str, most: int) -> str:
    """The end says which layer it is, so the beginning goes."""
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def _curve(points: Sequence[tuple[float, float]]) -> str:
    x, y = points[0]
    path = [f"M{x:.1f} {y:.1f}"]
    for next_x, next_y in points[1:]:
        middle = (y + next_y) / 2
        path.append(f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}")
        x, y = next_x, next_y
    return "".join(path)


def _height(share: float, height: int) -> float:
    """A value above 0 is seen, however small it is."""
    return max(share * (height - 2), 0.8) if share > 0 else 0.0


def _svg(body: str, width: int, height: int, *, stretch: bool = False) -> Markup:
    ratio = ' preserveAspectRatio="none"' if stretch else ""
    return Markup(f'<svg viewBox="0 0 {width} {height}"{ratio} aria-hidden="true">{body}</svg>')
