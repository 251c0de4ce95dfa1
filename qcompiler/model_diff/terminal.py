"""A diff as a person reads it in a terminal: sizes, what became of each layer, moved scales, what became of the nodes.

Layers that tell the same story in every block share a row; `--json` holds every entry.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompiler.errors import printable
from qcompiler.report.plain import escape
from qcompiler.report.table import decibels, size

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.model_diff import (
        Diff,
        Fate,
        InitializerChange,
        LayerStory,
        MovedScale,
        NodeChange,
        PortChange,
        Quantization,
        TensorInfo,
    )

SHOWN = 4  # names of a group
ROWS = 40  # of a section
MARKS = {
    "added": "[green]+[/green]",
    "removed": "[red]-[/red]",
    "replaced": "[yellow]→[/yellow]",
    "changed": "[yellow]~[/yellow]",
}
NUMBER = re.compile(r"(?<=\.)\d+(?!\w)")  # of a block, in a module path


def render_diff(diff: Diff, console: Console, *, details: bool = False) -> None:
    """Print a diff, without sections that have nothing in them. `details` adds nodes, constants and their scales."""
    if not diff:
        names = f", but for the names of {diff.renamed} nodes" if diff.renamed else ""
        console.print(f"The models are equal{names}.")
        return
    before, after = sum(diff.before.bytes.values()), sum(diff.after.bytes.values())
    nodes_before, nodes_after = sum(diff.before.nodes.values()), sum(diff.after.nodes.values())
    console.print(f"[bold]{size(before)} → {size(after)}[/bold] of constants, {nodes_before} → {nodes_after} nodes")
    _section(console, "outputs", (f"{escape(name)}: {_measured(found)}" for name, found in diff.outputs.items()))
    _layers(diff, console)
    _section(console, "moved scales", (_scale(move) for move in diff.scales))
    _section(console, "what became of the nodes", _fates(diff.fates))
    _section(console, "bytes by type", _bytes(diff))
    _section(console, "inputs and outputs", (escape(line) for line in port_lines(diff.ports)))
    if not details and diff.layers:
        return
    _section(console, "operators", _operators(diff))
    _section(console, "nodes", _nodes(diff.nodes))
    _section(console, "initializers", (_initializer(change) for change in diff.initializers))
    _section(console, "quantization", (_quantization(item) for item in diff.quantization))


def _section(console: Console, title: str, lines: Iterable[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    lines = list(lines)
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines[:ROWS]:
        console.print(Padding(Text.from_markup(line), (0, 0, 0, 2)))
    if len(lines) > ROWS:
        console.print(f"  … and {len(lines) - ROWS} more; --json lists all")


# ------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Row:
    """Layers of different blocks with the same story."""

    path: str
    stories: tuple[LayerStory, ...]

    @property
    def first(self) -> LayerStory:
        return self.stories[0]


def rows_of(stories: Sequence[LayerStory]) -> list[Row]:
    """Stories that differ in nothing but the numbers of their paths, together, in the order of the first of each."""
    groups: dict[object, list[LayerStory]] = defaultdict(list)
    for story in stories:
        text = NUMBER.sub("*", story.module_path)
        forms = [
            (form.op, form.weight, form.activations, form.shape) if form else None
            for form in (story.before, story.after)
        ]
        notes = tuple(NUMBER.sub("*", note) for note in story.notes)
        groups[text, story.fate, story.method, *forms, notes].append(story)
    return [Row(common([story.module_path for story in group]), tuple(group)) for group in groups.values()]


def common(names: Sequence[str]) -> str:
    """``model.layers.{0…3}.mlp.up_proj``"""
    if len(names) == 1:
        return names[0]
    numbers = [[int(found) for found in NUMBER.findall(name)] for name in names]
    places = iter(range(len(numbers[0])))

    def spread(match: re.Match[str]) -> str:
        place = next(places)
        found = sorted({row[place] for row in numbers})
        if len(found) == 1:
            return match[0]
        whole = found == list(range(found[0], found[-1] + 1)) and len(found) > 2
        return f"{{{found[0]}…{found[-1]}}}" if whole else f"{{{','.join(map(str, found))}}}"

    return NUMBER.sub(spread, names[0])


def _layers(diff: Diff, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not diff.layers:
        return
    count = Counter(story.fate for story in diff.layers)
    console.print(f"\n[bold]layers[/bold]: {', '.join(f'{number} {fate}' for fate, number in count.most_common())}\n")
    rows = rows_of([story for story in diff.layers if story.fate != "untouched"])
    if not rows:
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    for row in rows[:ROWS]:
        story = Text.assemble((printable(row.path), "bold"), "\n", printable(what(row.first)), style="")
        table.add_row(story, Text("\n".join(figures(row))))
    console.print(table)
    if len(rows) > ROWS:
        console.print(f"… and {len(rows) - ROWS} more; --json lists all")


def what(story: LayerStory) -> str:
    """The story without the path; numbers of blocks in its notes become a star, as it stands for several."""
    _, _, text = story.text.partition(": ")
    return NUMBER.sub("*", text)


def figures(row: Row) -> list[str]:
    """Bytes, relative error of the weights, signal-to-noise ratio: those that are known."""
    before, after = (
        sum(form.bytes for story in row.stories if (form := getattr(story, side)) is not None)
        for side in ("before", "after")
    )
    unit = " a token" if row.first.kind == "cache" else ""
    lines = [f"{size(before)} → {size(after)}{unit}"] if before or after else []
    errors = [story.weight_error for story in row.stories if story.weight_error is not None]
    if errors:
        lines.append(f"error {_range(errors, '{:.2%}')}")
    known = [story.measures.sqnr_db for story in row.stories if story.measures is not None]
    if known:
        low, high = decibels(min(known)), decibels(max(known))
        lines.append(f"SQNR {low}" if low == high else f"SQNR {low.removesuffix(' dB')} … {high}")
    return lines


def _range(values: Sequence[float], form: str) -> str:
    low, high = (form.format(pick(values)) for pick in (min, max))
    return low if low == high else f"{low} … {high}"


def _measured(found: object) -> str:
    from qcompiler.report.table import MEASURES, measured

    values = found.to_dict()  # type: ignore[attr-defined]
    return ", ".join(f"{MEASURES[name][0]} {measured(name, value)}" for name, value in values.items())


def _scale(move: MovedScale) -> str:
    by = f" by {', '.join(move.passes)}" if move.passes else ""
    readers = ", ".join(reader.rsplit(".", 1)[-1] for reader in move.readers)
    return escape(f"{move.into} divided by {move.low:.3g} … {move.high:.3g}{by}, multiplied into {readers}")


def _fates(fates: Sequence[Fate]) -> list[str]:
    """One line for each fate, the most frequent operators first."""
    lines: dict[str, list[Fate]] = defaultdict(list)
    for fate in fates:
        lines[fate.fate].append(fate)
    return [
        f"[bold]{fate}[/bold] {sum(entry.count for entry in entries)}: " + escape(", ".join(_counts(fate, entries)))
        for fate, entries in lines.items()
    ]


def _counts(fate: str, entries: Sequence[Fate]) -> list[str]:
    counted: Counter[str] = Counter()
    for entry in entries:
        shown = (
            entry.op if fate == "untouched" or entry.after in ("", entry.op) else f"{entry.op} → {_plain(entry.after)}"
        )
        counted[shown] += entry.count
    return [f"{count} × {name}" for name, count in counted.most_common()]


def _plain(operator: str) -> str:
    return operator.removeprefix("com.microsoft.")


# ------------------------------------------------------------------------------------------------------------ details


def port_lines(ports: Sequence[PortChange]) -> list[str]:
    """Ports of different blocks with the same change share a line."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for port in ports:
        groups[port.direction, NUMBER.sub("*", port.name), port.before, port.after].append(port.name)
    return [
        f"{direction} {common(names)}: {before or '(none)'} → {after or '(none)'}"
        for (direction, _, before, after), names in groups.items()
    ]


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


@dataclass(frozen=True)
class NodeGroup:
    """Nodes with the same change."""

    kind: str
    count: int
    operator: str
    """``MatMul``, or ``MatMul → MatMulNBits`` of nodes that were replaced."""
    passes: str
    names: str
    """Of the first few."""
    detail: str
    """In parentheses, where the group is a single node."""


def node_groups(changes: Sequence[NodeChange]) -> list[NodeGroup]:
    groups: dict[tuple[str, str, str, str], list[NodeChange]] = defaultdict(list)
    for change in changes:
        groups[change.kind, change.before, change.after, change.passes].append(change)
    found = []
    for (kind, before, after, passes), members in groups.items():
        operator = f"{before} → {after}" if kind == "replaced" else before or after
        names = ", ".join(member.name for member in members[:SHOWN]) + (", …" if len(members) > SHOWN else "")
        detail = f" ({members[0].detail})" if len(members) == 1 and members[0].detail else ""
        found.append(NodeGroup(kind, len(members), operator, passes, names, detail))
    return found


def _nodes(changes: Sequence[NodeChange]) -> list[str]:
    """Nodes with the same change on one line."""
    lines = []
    for group in node_groups(changes):
        by = f" by {group.passes}" if group.passes else ""
        what = escape(f"{group.operator}{by}: {group.names}{group.detail}")
        lines.append(f"{MARKS[group.kind]} {group.count} × {what}")
    return lines


def _initializer(change: InitializerChange) -> str:
    before, after = tensor_text(change.before), tensor_text(change.after)
    what = f"{before} → {after}" if before and after and before != after else before or after
    note = ""
    if change.kind == "changed" and before == after:
        note = " (other values)" if change.error is None else f" (relative error {change.error:.3g})"
    return f"{MARKS[change.kind]} {escape(change.name)} {escape(what)}{note}"


def tensor_text(info: TensorInfo | None) -> str:
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
