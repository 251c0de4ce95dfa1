"""The report as a person reads it after `compile`: verdict first, then sizes, errors, layers, what to look at."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qcompiler.report import speed
from qcompiler.report.report import Report, SiteReport, Status, describe
from qcompiler.report.verdict import verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MEASURES = {
    "sqnr_db": ("SQNR", "{:.1f} dB"),
    "cosine": ("cosine", "{:.6f}"),
    "max_abs_error": ("largest error", "{:.3g}"),
    "kl": ("KL divergence", "{:.3g}"),
    "top1": ("same top-1", "{:.1%}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "perplexity_ratio": ("perplexity ratio", "{:.4f}"),
}
MOST_KINDS = 16  # rows of the table of layers: a block of a language model with its caches has some 11
MOST_OUTPUTS = 3
MOST_REASONS = 3
LONGEST_REASON = 140  # characters; report.json has all of it
LONGEST_NAME = 40
MOST_WARNINGS = 6
MOST_SCHEMES = 2
WORST = 5
STATUSES: tuple[Status, ...] = ("quantized", "excluded", "skipped")


def render(report: Report, console: Console) -> None:
    """Print the results, at most some 40 lines at a width of 100, but for warnings, which are never cut."""
    console.print(_verdict(report))
    _print_lines(console, "look at", list(report.looks))
    console.print(_sizes(report))
    if report.outputs:
        console.print()
        console.print(_outputs(report))
    console.print()
    console.print(_layers(report))
    _print_lines(console, "schemes", _schemes(report))
    _print_lines(console, "kernels", _conditions(report))
    worst = sorted((site for site in report.sites if site.sqnr_db is not None), key=lambda site: site.sqnr_db or 0.0)
    if worst:
        console.print()
        console.print(_worst(worst[:WORST]))
    _print_lines(console, "left out", _reasons(report))
    _print_lines(console, "gates", [_mark(gate.held) + describe(gate) for gate in report.gates])
    _print_lines(console, "warnings", _warnings(report))


def evaluation_rows(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    """The figures of `evaluate` as rows of text."""
    names = {
        "samples": ("samples", "{}"),
        "tokens": ("tokens predicted", "{}"),
        "nll": ("negative log-likelihood", "{:.4f} nats a token"),
        "reference_perplexity": ("perplexity of the reference", "{:.3f}"),
        **MEASURES,
    }
    return [
        (names[name][0], measured(name, value) if name in MEASURES else names[name][1].format(value))
        for name, value in figures.items()
    ]


def measured(name: str, value: float) -> str:
    """A figure of `MEASURES` with its unit; a signal without any noise is exact."""
    return "exact" if name == "sqnr_db" and value == math.inf else MEASURES[name][1].format(value)


def decibels(value: float) -> str:
    """A signal-to-noise ratio."""
    return measured("sqnr_db", value)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: 6.21 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _verdict(report: Report) -> Text:
    from rich.text import Text

    caches = [site for site in report.sites if site.is_cache]
    count = Counter(site.status for site in report.sites if not site.is_cache)
    rest = [f"{count[status]} {status}" for status in STATUSES[1:] if count[status]]
    counts = f"{count['quantized']} of {count.total()} layers quantized" + (f" ({', '.join(rest)})" if rest else "")
    if caches:
        counts += f", {sum(site.status == 'quantized' for site in caches)} of {len(caches)} caches"
    made = f"{report.recipe} for {report.target}, {report.seconds:.0f} s: {counts}"
    found = verdict(report)
    said = f"; {found.said}" if report.state != "good" else ""
    return Text(f"{found.mark} {made}{said}", style=found.style)


def _sizes(report: Report) -> str:
    sizes = report.sizes
    line = (
        f"  model {size(sizes.float_bytes)} → [bold]{size(sizes.bytes)}[/bold]{_ratio(sizes.bytes, sizes.float_bytes)}"
    )
    if sizes.quantized_float_bytes:
        ratio = _ratio(sizes.quantized_bytes, sizes.quantized_float_bytes)
        line += f"\n  quantized weights {size(sizes.quantized_float_bytes)} → {size(sizes.quantized_bytes)}{ratio}"
    if report.cache is not None:
        before, after = report.cache.float_bytes, report.cache.bytes
        line += f"\n  caches {size(before)} → {size(after)} a token{_ratio(after, before)}"
    figure, note, _ = speed.figure(report)
    line += f"\n  speed against float [bold]{figure}[/bold] ({_plain(note)})"
    if report.placement is not None:
        line += f"\n  predicted: {report.placement.summary()}"
    return line


def _ratio(after: int, before: int) -> str:
    return f" ({after / before:.3f} ×)" if before else ""


def _outputs(report: Report) -> Table:
    present = {name for measures in report.outputs.values() for name in measures}
    # Where the output is a distribution over tokens, its own measures say more than those of any array.
    general = {"cosine", "max_abs_error"} if "kl" in present else set()
    columns = [name for name in MEASURES if name in present - general]
    table = _table("output against float", *(MEASURES[name][0] for name in columns))
    shown = list(report.outputs.items())[:MOST_OUTPUTS]
    for output, measures in shown:
        cells = [measured(name, measures[name]) if name in measures else "" for name in columns]
        table.add_row(_plain(output), *cells)
    if len(report.outputs) > len(shown):
        table.add_row(f"… and {len(report.outputs) - len(shown)} more", *("" for _ in columns))
    return table


def _layers(report: Report) -> Table:
    groups: dict[str, list[SiteReport]] = defaultdict(list)
    for site in report.sites:
        groups[kind_of(site)].append(site)
    if len(groups) > MOST_KINDS:  # no repeating blocks: the operators say more than a hundred names
        groups.clear()
        for site in report.sites:
            groups[site.op].append(site)
    present = [status for status in STATUSES if status == "quantized" or report.with_status(status)]
    table = _table("layers", *present, "worst SQNR", "kernel", text_columns=1)
    for kind, sites in groups.items():
        count = Counter(site.status for site in sites)
        errors = [site.sqnr_db for site in sites if site.sqnr_db is not None]
        table.add_row(
            _plain(kind),
            *(str(count[status]) if count[status] else "·" for status in present),
            decibels(min(errors)) if errors else "·",
            _commonest(site.kernel for site in sites),
        )
    return table


def _schemes(report: Report) -> list[str]:
    counted = Counter(site.scheme for site in report.with_status("quantized"))
    lines = [f"{count} × {scheme}" for scheme, count in counted.most_common(MOST_SCHEMES)]
    rest = len(counted) - len(lines)
    return [*lines, f"… and {rest} more"] if rest else lines


def _conditions(report: Report) -> list[str]:
    counted = Counter((site.kernel or site.op, site.conditions) for site in report.sites if site.conditions)
    lines = [f"{count} × {kernel}: {conditions}" for (kernel, conditions), count in counted.most_common(MOST_SCHEMES)]
    rest = len(counted) - len(lines)
    return [*lines, f"… and {rest} more"] if rest else lines


def kind_of(site: SiteReport) -> str:
    """What the site is within its block, so that the same layer of all blocks is one row."""
    path = site.module_path or site.name
    if site.block and path.startswith(site.block + "."):
        path = path.removeprefix(site.block + ".")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _commonest(texts: Iterable[str]) -> str:
    counted = Counter(text for text in texts if text)
    if not counted:
        return "·"
    first = counted.most_common(1)[0][0]
    return _plain(first) + (f" (+{len(counted) - 1})" if len(counted) > 1 else "")


def _worst(sites: list[SiteReport]) -> Table:
    table = _table("largest errors", "SQNR", "kernel", text_columns=1)
    for site in sites:
        table.add_row(_plain(site.module_path or site.name), decibels(site.sqnr_db or 0.0), _plain(site.kernel) or "·")
    return table


def _reasons(report: Report) -> list[str]:
    """Who left out how many sites and why, the commonest first; a site that one pass leaves may be another's work."""
    paths = {site.name: site.module_path or site.name for site in report.sites}
    skipped = report.with_status("skipped")
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for site in skipped:
        found["skipped", site.reason].append(paths[site.name])
    for site in report.with_status("excluded"):
        if site.pass_name:  # else the recipe does not mention it, and there is nothing to explain
            found["excluded", site.reason].append(paths[site.name])
    known = {site.name for site in skipped}
    for run in report.passes:
        for skip in run.skipped:
            if skip.site not in known:
                found[f"without {run.name}", skip.reason].append(paths.get(skip.site, skip.site))
    lines = []
    for (how, reason), sites in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(_end(site) for site in sites[:2]) + (", …" if len(sites) > 2 else "")
        lines.append(f"{len(sites)} {how}: {_beginning(reason)} [{shown}]")
    if len(lines) > MOST_REASONS:
        lines = [*lines[:MOST_REASONS], f"… and {len(lines) - MOST_REASONS} more reasons in report.json"]
    return lines


def _warnings(report: Report) -> list[str]:
    rest = len(report.warnings) - MOST_WARNINGS
    more = [f"… and {rest} more in report.json"] if rest > 0 else []
    return [*report.warnings[:MOST_WARNINGS], *more]


def _beginning(text: str) -> str:
    """A text that is not too long, cut between two words."""
    if len(text) <= LONGEST_REASON:
        return text
    head, _, _ = text[: LONGEST_REASON + 1].rpartition(" ")
    return f"{head or text[:LONGEST_REASON]} …"


def _end(name: str) -> str:
    """The end of a name says which layer it is, so the beginning goes."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _print_lines(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    from rich.padding import Padding

    console.print()
    console.print(f"  [bold]{title}[/bold]")
    for line in lines:
        console.print(Padding(_plain(line), (0, 0, 0, 4)), highlight=False)


def _mark(held: bool) -> str:
    return "✓ " if held else "✗ "


def _table(first: str, *columns: str, text_columns: int = 0) -> Table:
    """A table without frame; the last `text_columns` columns are text, those between are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=True, padding=(0, 1), header_style="bold", title_justify="left")
    table.add_column(first, overflow="ellipsis", no_wrap=True, min_width=20)
    numbers = len(columns) - text_columns
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index < numbers else "left", overflow="ellipsis", no_wrap=True)
    return table


def _plain(text: str) -> str:
    """Names of layers may hold brackets, which rich would take for its markup."""
    from qcompiler.report.plain import escape

    return escape(text)
