"""A diagnosis as a person reads it in a terminal: what to do first, then the layers in both orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from qcompiler.report.plain import escape

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.diagnosis import Diagnosis, LayerDiagnosis

MOST_UNMATCHED = 3
WIDE = 120  # characters of a terminal that shows all columns


def render_diagnosis(found: Diagnosis, console: Console, rows: int) -> None:
    """Print a diagnosis with `rows` layers of each list."""
    total = len(found.alone)
    kl = f", KL {found.kl:.3g} nats a token" if found.kl is not None else ""
    console.print(f"[bold]outputs {decibels(found.output_db)} from the float model{kl}[/bold], {found.samples} samples")
    if found.caches_db is not None:
        kl = f", KL {found.caches_kl:.3g}" if found.caches_kl is not None else ""
        console.print(f"all KV-caches alone, the layers in float: {decibels(found.caches_db)}{kl}", highlight=False)
    for proposal in found.proposals:
        console.print(f"[green]→[/green] {escape(proposal.text)}: {escape(proposal.reason)}", highlight=False)
    if not found.proposals:
        console.print("nothing to propose: the error is small, and no layer stands out", highlight=False)
    title = "each layer alone, all others in float"
    _table(console, title, found.alone[:rows], total, ALONE, found.effect_samples > 0)
    _table(console, "accumulated, by what each layer adds", found.accumulated[:rows], total, ACCUMULATED, True)
    if found.unmatched:
        console.print(f"\n[bold]not examined: {len(found.unmatched)}[/bold]")
        for name, reason in found.unmatched[:MOST_UNMATCHED]:
            console.print(f"  {escape(name)}: {escape(reason)}", highlight=False)


def decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "no error" if value == math.inf else f"{value:.1f} dB"


Column = tuple[str, "Callable[[LayerDiagnosis], str]"]


def _cause(layer: LayerDiagnosis) -> str:
    if not layer.quantized:
        return "float"
    if layer.activation_share is None:
        return layer.cause
    return f"input {layer.activation_share:.0%}"


def _outliers(layer: LayerDiagnosis) -> str:
    return "" if layer.channel_outliers is None else f"{layer.channel_outliers:.1f} ×"


LAYER: Column = ("layer", lambda layer: layer.module_path or layer.name)
SCHEME: Column = (
    "scheme",
    lambda layer: layer.cache or " × ".join(part for part in (layer.activations, layer.weights) if part),
)
ALONE: tuple[Column, ...] = (
    LAYER,
    ("outputs", lambda layer: decibels(layer.output_db)),
    ("KL", lambda layer: "" if layer.kl is None else f"{layer.kl:.3g}"),
    ("own", lambda layer: decibels(layer.alone_db)),
    ("cause", _cause),
    ("loudest channel", _outliers),
    SCHEME,
)
ACCUMULATED: tuple[Column, ...] = (
    LAYER,
    ("adds", lambda layer: f"{layer.added_db:.1f} dB"),
    ("input", lambda layer: decibels(layer.before_db)),
    ("output", lambda layer: decibels(layer.accumulated_db)),
    SCHEME,
)


def _table(
    console: Console, title: str, layers: Sequence[LayerDiagnosis], total: int, columns: Sequence[Column], all_: bool
) -> None:
    left_out = set() if console.width >= WIDE else {"loudest channel", "scheme"}
    shown = [column for column in columns if column[0] not in left_out and any(column[1](layer) for layer in layers)]
    count = f" (the worst {len(layers)} of {total})" if len(layers) < total else ""
    console.print(f"\n[bold]{title}[/bold]{count}" + ("" if all_ else "; their effect on the outputs was not measured"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, _ in shown:
        number = name in _NUMBERS
        table.add_column(name, no_wrap=number, overflow="fold", justify="right" if number else "left")
    for layer in layers:
        table.add_row(*(escape(cell(layer)) for _, cell in shown))
    console.print(table)


_NUMBERS = {"outputs", "KL", "own", "adds", "input", "output", "loudest channel"}
