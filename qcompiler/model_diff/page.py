"""A diff as a page of its own, and as the card that a notebook shows; templates in `templates/difference*`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qcompiler.model_diff.terminal import NodeGroup, Row, figures, node_groups, port_lines, rows_of, tensor_text, what
from qcompiler.report.html import environment
from qcompiler.report.svg import Drawn, side_by_side
from qcompiler.report.table import MEASURES, decibels, measured, size

if TYPE_CHECKING:
    from qcompiler.evaluation.compare import Measures
    from qcompiler.model_diff import Diff, Form, LayerStory, MovedScale
    from qcompiler.report.pictures import Drawing

CARD_ROWS = 30


def page(diff: Diff, title: str = "") -> str:
    """One file: nothing is fetched from anywhere."""
    view = DiffView(diff)
    return environment().get_template("difference.html.j2").render(diff=diff, view=view, title=title or "Two models")


def card(diff: Diff) -> str:
    """Figures, and the layers that changed, those of all blocks together; no script."""
    return environment().get_template("difference_card.html.j2").render(diff=diff, view=DiffView(diff))


@dataclass(frozen=True)
class Block:
    """A block of the model, and what is told of it."""

    name: str
    summary: str
    stories: list[LayerStory]
    drawing: int | None
    """Its place among the drawings; None where it is not drawn."""


class DiffView:
    """What the templates need to have counted or put into words."""

    def __init__(self, diff: Diff) -> None:
        self._diff = diff
        self.measured = any(story.measures is not None for story in diff.layers)
        self.nodes_before, self.nodes_after = (sum(totals.nodes.values()) for totals in (diff.before, diff.after))
        counted = Counter((story.kind == "cache", story.fate) for story in diff.layers)
        self.counts = [
            (f"{'caches' if cache else 'layers'} {fate}", count) for (cache, fate), count in counted.most_common()
        ]
        self.fates = list(dict.fromkeys(fate for (_, fate), _ in counted.most_common()))
        self.ports = port_lines(diff.ports)

    @property
    def columns(self) -> list[tuple[str, str]]:
        sqnr = [("SQNR dB", "number")] if self.measured else []
        return [
            ("layer", "text"), ("fate", "text"), ("method", "text"), ("was", "text"), ("is", "text"),
            ("bytes", "number"), ("weight error", "number"), *sqnr, ("notes", "text"),
        ]  # fmt: skip

    @cached_property
    def _bytes(self) -> tuple[int, int]:
        return sum(self._diff.before.bytes.values()), sum(self._diff.after.bytes.values())

    @property
    def size_before(self) -> str:
        return size(self._bytes[0])

    @property
    def size_after(self) -> str:
        return size(self._bytes[1])

    @property
    def ratio(self) -> str:
        before, after = self._bytes
        return f"{after / before:.0%} of the first model's" if before else ""

    @property
    def types(self) -> list[tuple[str, str, str]]:
        before, after = self._diff.before.bytes, self._diff.after.bytes
        return [(name, size(before.get(name, 0)), size(after.get(name, 0))) for name in sorted({*before, *after})]

    @cached_property
    def blocks(self) -> list[Block]:
        """In the order of the first layer of each; then those without layers that are drawn and have changed."""
        stories: dict[str, list[LayerStory]] = {}
        for story in self._diff.layers:
            stories.setdefault(story.block, []).append(story)
        drawn = {block: place for place, one in enumerate(self._diff.drawings) for block in one.blocks}
        changed = [block for one in self._diff.drawings if _differs(one) for block in one.blocks]
        found = []
        for block in dict.fromkeys((*stories, *changed)):
            told = stories.get(block, [])
            counted = Counter(story.fate for story in told).most_common()
            summary = ", ".join(f"{count} {fate}" for fate, count in counted) or "no layers"
            found.append(Block(block or "outside the blocks", summary, told, drawn.get(block)))
        return found

    @cached_property
    def drawings(self) -> list[Drawn]:
        return side_by_side(self._diff.drawings)

    def nodes(self, story: LayerStory) -> str:
        names = [form.name if form is not None else "(none)" for form in (story.before, story.after)]
        return " → ".join(dict.fromkeys(names))

    def readers(self, move: MovedScale) -> str:
        return ", ".join(reader.rsplit(".", 1)[-1] for reader in move.readers)

    @property
    def fate_rows(self) -> list[tuple[str, int, str, str, str]]:
        """Fate, nodes, operator, what that is now, what it reads; of nodes that something happened to."""
        return [
            (entry.fate, entry.count, entry.op, entry.after if entry.after != entry.op else "", entry.activations)
            for entry in self._diff.fates
            if entry.fate != "untouched"
        ]

    @property
    def untouched(self) -> str:
        """How many nodes nothing happened to, and of which operators; empty where there are none."""
        kept = [entry for entry in self._diff.fates if entry.fate == "untouched"]
        operators = ", ".join(f"{entry.count}\u00a0×\u00a0{entry.op}" for entry in kept)
        return f"{sum(entry.count for entry in kept)} nodes are untouched: {operators}." if kept else ""

    @property
    def node_groups(self) -> list[NodeGroup]:
        return node_groups(self._diff.nodes)

    @property
    def changed(self) -> list[tuple[str, str, str, str]]:
        """Name, before, after and relative error of constants that both models have."""
        return [
            (change.name, tensor_text(change.before), tensor_text(change.after),
             "" if change.error is None else f"{change.error:.3g}")
            for change in self._diff.initializers
            if change.kind == "changed"
        ]  # fmt: skip

    @cached_property
    def _rows(self) -> list[Row]:
        return rows_of([story for story in self._diff.layers if story.fate != "untouched"])

    @property
    def rows(self) -> list[Row]:
        return self._rows[:CARD_ROWS]

    @property
    def left_out(self) -> int:
        return max(0, len(self._rows) - CARD_ROWS)

    @property
    def measures(self) -> list[str]:
        known = {name for found in self._diff.outputs.values() for name in found.to_dict()}
        return [name for name in MEASURES if name in known]

    def measure_name(self, name: str) -> str:
        return MEASURES[name][0]

    def measure(self, name: str, found: Measures) -> str:
        value = found.to_dict().get(name)
        return "" if value is None else measured(name, value)

    def what(self, story: LayerStory) -> str:
        return what(story)

    def figures(self, row: Row) -> list[str]:
        return figures(row)

    def form(self, form: Form | None) -> str:
        return "" if form is None else ", ".join(x for x in (f"{form.op} {form.weight}".strip(), form.activations) if x)

    def decibels(self, story: LayerStory) -> str:
        """For a column whose head has the unit."""
        return "·" if story.measures is None else decibels(story.measures.sqnr_db).removesuffix(" dB")

    def shape(self, story: LayerStory) -> str:
        shapes = ["×".join(map(str, form.shape)) for form in (story.before, story.after) if form is not None]
        return " → ".join(dict.fromkeys(shapes))

    def sizes(self, story: LayerStory) -> str:
        return " → ".join(size(form.bytes) if form else "(none)" for form in (story.before, story.after))

    def share(self, story: LayerStory) -> str:
        """What the table sorts by: bytes now."""
        form = story.after or story.before
        return str(form.bytes) if form else ""


def _differs(drawing: Drawing) -> bool:
    return any(unit.fate not in ("same", "outside") for side in (drawing.before, drawing.after) for unit in side.units)
