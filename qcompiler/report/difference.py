"""A diff as a person reads it in a terminal: totals first, then what changed, grouped; `--json` holds every entry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from qcompiler.report.table import size

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.model_diff import Diff, InitializerChange, NodeChange, PortChange, Quantization, TensorInfo

SHOWN = 4  # names of a group
ROWS = 40  # of a section
MARKS = {
    "added": "[green]+[/green]",
    "removed": "[red]-[/red]",
    "replaced": "[yellow]→[/yellow]",
    "changed": "[yellow]~[/yellow]",
}


def render_diff(diff: Diff, console: Console) -> None:
    """Print a diff; sections with nothing in them are left out."""
    if not diff:
        console.print("The models are equal.")
        return
    before, after = sum(diff.before.bytes.values()), sum(diff.after.bytes.values())
    nodes_before, nodes_after = sum(diff.before.nodes.values()), sum(diff.after.nodes.values())
    console.print(f"[bold]{size(before)} → {size(after)}[/bold] of constants, {nodes_before} → {nodes_after} nodes")
    _section(console, "operators", _operators(diff))
    _section(console, "bytes by type", _bytes(diff))
    _section(console, "inputs and outputs", (_port(port) for port in diff.ports))
    _section(console, "nodes", _nodes(diff.nodes))
    _section(console, "initializers", (_initializer(change) for change in diff.initializers))
    _section(console, "quantization", (_quantization(item) for item in diff.quantization))


def _section(console: Console, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines[:ROWS]:
        console.print(f"  {line}", highlight=False, overflow="ellipsis", no_wrap=True)
    if len(lines) > ROWS:
        console.print(f"  … and {len(lines) - ROWS} more; --json lists all")


def _port(port: PortChange) -> str:
    return f"{port.direction} {escape(port.name)}: {escape(port.before) or '(none)'} → {escape(port.after) or '(none)'}"


def _operators(diff: Diff) -> list[str]:
    left, right = diff.before.nodes, diff.after.nodes
    names = sorted({*left, *right})
    return [
        f"{escape(name)} {left.get(name, 0)} → {right.get(name, 0)}"
        for name in names
        if left.get(name) != right.get(name)
    ]


def _bytes(diff: Diff) -> list[str]:
    left, right = diff.before.bytes, diff.after.bytes
    names = sorted({*left, *right})
    return [
        f"{name} {size(left.get(name, 0))} → {size(right.get(name, 0))}"
        for name in names
        if left.get(name) != right.get(name)
    ]


def _nodes(changes: Sequence[NodeChange]) -> list[str]:
    """Nodes with the same change on one line."""
    groups: dict[tuple[str, str, str, str], list[NodeChange]] = defaultdict(list)
    for change in changes:
        groups[change.kind, change.before, change.after, change.passes].append(change)
    lines = []
    for (kind, before, after, passes), members in groups.items():
        what = f"{before} → {after}" if kind == "replaced" else before or after
        by = f" by {passes}" if passes else ""
        names = ", ".join(member.name for member in members[:SHOWN]) + (", …" if len(members) > SHOWN else "")
        detail = f" ({members[0].detail})" if len(members) == 1 and members[0].detail else ""
        lines.append(f"{MARKS[kind]} {len(members)} × {escape(what)}{escape(by)}: {escape(names)}{escape(detail)}")
    return lines


def _initializer(change: InitializerChange) -> str:
    before, after = _tensor(change.before), _tensor(change.after)
    what = f"{before} → {after}" if before and after and before != after else before or after
    note = " (other values)" if change.kind == "changed" and before == after else ""
    return f"{MARKS[change.kind]} {escape(change.name)} {escape(what)}{note}"


def _tensor(info: TensorInfo | None) -> str:
    return f"{info.type}{list(info.shape)} {size(info.bytes)}" if info else ""


def _quantization(item: Quantization) -> str:
    scales = {0: "scales", 1: "1 scale"}.get(item.scales, f"{item.scales} scales")
    operand = f" {item.operand}" if item.operand else ""
    zero = f", zero point {_span(item.zero_point)}" if item.zero_point else ""
    span = _span(item.scale) if item.scale else "computed at run time"
    return f"{escape(item.op)}{operand} {escape(item.value)} {item.type}: {scales} {span}{zero}"


def _span(span: tuple[float, float]) -> str:
    low, high = span
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"
