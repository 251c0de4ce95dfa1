"""An inspection as a person reads it in a terminal. Layers that are alike in different blocks share a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from qcompiler.report.plain import escape
from qcompiler.report.table import size

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.inspection import InspectedLayer, Inspection, Port, Touched, WeightStatistics

MOST_OPERATORS = 12
MOST_PORTS = 6
MOST_LAYERS = 400
MOST_REASONS = 6
WIDE = 120  # characters of a terminal that shows all columns


def render_inspection(found: Inspection, console: Console) -> None:
    """Print an inspection: the model first, then its layers one by one, then what a recipe would touch."""
    for name, text in _facts(found):
        console.print(f"[bold]{name:10}[/bold] {escape(text)}", highlight=False, soft_wrap=True)
    if found.layers:
        console.print()
        console.print(_table(found.layers[:MOST_LAYERS], wide=console.width >= WIDE))
        if len(found.layers) > MOST_LAYERS:
            console.print(f"… and {len(found.layers) - MOST_LAYERS} more; --json lists all")
    for layer in found.layers[:MOST_LAYERS]:
        if layer.note and not layer.scheme:
            console.print(f"{escape(layer.module_path or layer.name)}: {escape(layer.note)}", highlight=False)
    if found.touched:
        console.print("\n[bold]the recipe[/bold]")
        for line in _touched(found.touched):
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _facts(found: Inspection) -> Iterable[tuple[str, str]]:
    opsets = ", ".join(f"{name} {version}" for name, version in found.opsets.items())
    yield "model", ", ".join(part for part in (found.file, f"IR {found.ir_version}", opsets) if part)
    if found.producer:
        yield "made by", found.producer
    yield from (("input", _port(port)) for port in found.inputs[:MOST_PORTS])
    yield from _rest("inputs", found.inputs)
    yield from (("output", _port(port)) for port in found.outputs[:MOST_PORTS])
    yield from _rest("outputs", found.outputs)
    operators = [f"{name} {count}" for name, count in found.operators.items()]
    more = len(operators) - MOST_OPERATORS
    rest = f" and {more} more operators" if more > 0 else ""
    yield "nodes", f"{sum(found.operators.values())}: {', '.join(operators[:MOST_OPERATORS])}{rest}"
    if found.functions:
        yield "functions", ", ".join(found.functions)
    yield (
        "constants",
        f"{size(sum(found.bytes.values()))}: "
        + ", ".join(f"{kind} {size(count)}" for kind, count in found.bytes.items()),
    )
    for file, count in found.external.items():
        yield "external", f"{file} {size(count)}"
    for key, text in found.metadata.items():
        yield "metadata", f"{key}: {' '.join(text.split())}"


def _rest(name: str, ports: Sequence[Port]) -> Iterable[tuple[str, str]]:
    if len(ports) > MOST_PORTS:
        yield "", f"and {len(ports) - MOST_PORTS} more {name}"


def _port(port: Port) -> str:
    sizes = "?" if port.shape is None else ", ".join(map(str, port.shape))
    return f"{port.name}: {port.type} [{sizes}]{f', a cache, {port.cache}' if port.cache else ''}"


def _table(layers: Sequence[InspectedLayer], *, wide: bool) -> Table:
    """Narrow terminals get fewer columns; `--json` has all."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    measured = any(layer.statistics for layer in layers)
    columns = [column for column in COLUMNS if (wide or not column.wide) and (measured or not column.measured)]
    for column in columns:
        right = column.measured or column.name == "bytes"
        table.add_column(column.name, justify="right" if right else "left", no_wrap=right or column.name == "layer",
                         min_width=column.least)  # fmt: skip
    for layer in layers:
        table.add_row(*(escape(column.cell(layer)) for column in columns))
    return table


@dataclass(frozen=True)
class Column:
    name: str
    cell: Callable[[InspectedLayer], str]
    wide: bool = False
    """Left out of narrow tables."""
    measured: bool = False
    """A statistic of the weight."""
    least: int | None = None
    """Characters that it gets in any case."""


def _statistic(show: Callable[[WeightStatistics], str]) -> Callable[[InspectedLayer], str]:
    return lambda layer: "" if layer.statistics is None else show(layer.statistics)


def _largest(seen: WeightStatistics) -> str:
    return f"{seen.absmax:.3g}" + (f" ({seen.not_finite} not finite)" if seen.not_finite else "")


def _input(layer: InspectedLayer) -> str:
    return f"{layer.activations} × " if layer.activations else ""


COLUMNS = (
    Column("layer", lambda layer: layer.module_path or layer.name),
    Column("operator", lambda layer: layer.op, least=9),
    Column("type", lambda layer: _input(layer) + (layer.scheme or layer.type), least=14),
    Column("shape", lambda layer: "×".join(map(str, layer.shape)), wide=True, least=9),
    Column("bytes", lambda layer: size(layer.bytes) + (" (tied)" if layer.shared else "")),
    Column("|max|", _statistic(_largest), wide=True, measured=True),
    Column("std", _statistic(lambda seen: f"{seen.std:.3g}"), wide=True, measured=True),
    Column("kurtosis", _statistic(lambda seen: f"{seen.kurtosis:.1f}"), wide=True, measured=True),
    Column("> 6 rms", _statistic(lambda seen: f"{seen.outliers:.2%}" if seen.outliers else "0"), wide=True,
           measured=True),
)  # fmt: skip


def _touched(items: Sequence[Touched]) -> Iterable[str]:
    """A line for each pass: how many layers, of what shape of name, and what it would leave out."""
    for name in dict.fromkeys(item.pass_name for item in items):
        mine = [item for item in items if item.pass_name == name]
        done = [item for item in mine if not item.obstacle]
        for scheme in dict.fromkeys(item.does for item in done):
            group = [item for item in done if item.does == scheme]
            kinds = dict.fromkeys(re.sub(r"\d+", "*", item.module_path or item.name) for item in group)
            does = f" → {scheme}" if scheme else ""
            yield f"{name}: {len(group)} layers{does}: {', '.join(kinds)}"
        reasons: dict[str, list[str]] = {}
        for item in mine:
            if item.obstacle:
                reasons.setdefault(item.obstacle, []).append(item.module_path or item.name)
        for reason, layers in list(reasons.items())[:MOST_REASONS]:
            yield f"{name}: leaves {layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}: {reason}"
