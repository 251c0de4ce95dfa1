"""`qcompiler bench`: how fast models run here, beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.common import MOST, Json, SequenceLength

if TYPE_CHECKING:
    from qcompiler.benchmarking.bench import BenchCase, Benchmark
    from qcompiler.benchmarking.timing import Spread

MOST_OPERATORS = 8
LONGEST_PATH = 26
SHOWN = 30  # characters of an odd option


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            readable=False,
            metavar="MODEL",
            help="Models or their folders; others are compared with the first.",
        ),
    ],
    threads: Annotated[int, typer.Option(min=1, max=MOST, help="Threads of ONNX Runtime.")] = 1,
    tokens: Annotated[
        str | None, typer.Option(metavar="N,…", help="Tokens that a language model reads at once; by default 1,128.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SPEC", help="Run on data, as --calibration of `compile` has it.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(readable=False, help="tokenizer.json; by default that beside the first.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="Samples of --data, run one after another.")] = 4,
    seq_len: SequenceLength = None,
    json_: Json = False,
) -> None:
    """Time models in turns, opened as their users open them, and say which operators the time goes to.

    Without --data, language models read random tokens after an empty cache, and models of another kind random numbers.
    """
    from qcompiler.benchmarking.bench import bench

    found = bench(
        *models, threads=threads, tokens=None if tokens is None else _counts(tokens), data=data, tokenizer=tokenizer,
        samples=samples, sequence_length=seq_len, progress=True,
    )  # fmt: skip
    if json_:
        from qcompiler.cli.common import print_json

        print_json(found.to_dict())
        return
    _print(found)


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < len(part) < 10 and int(part) for part in parts):
        raise typer.BadParameter(f"{text[:SHOWN]!r} is no list of counts; write it like 1,128", param_hint="--tokens")
    return [int(part) for part in parts]


def _print(found: Benchmark) -> None:
    from qcompiler.cli.common import console

    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    console().print(f"{found.runtime}, {threads}, {found.machine}", markup=False, highlight=False)
    for case in found.cases:
        console().print()
        _print_case(case, found.threads)


def _print_case(case: BenchCase, threads: int) -> None:
    from qcompiler.cli.common import console, print_table

    # With one thread CPU time is the time of a run, and other processes hardly change it; with several it is their sum.
    by = "CPU" if threads == 1 else "wall"
    rows = []
    for number, one in enumerate(case.models, 1):
        time, ratio = (one.cpu, one.cpu_ratio) if threads == 1 else (one.wall, one.wall_ratio)
        middle = _ends(ratio, 1) if number > 1 else ""
        figures = (f"{1e3 * one.cpu.median:.3g}", f"{1e3 * one.wall.median:.3g}", _ends(time, 1e3))
        rows.append((f"{number} {_end(one.model)}", *figures, f"{ratio.median:.3g} ×", middle))
    console().print(f"{case.title}, {case.rounds} rounds, ratios of {by} time", markup=False, highlight=False)
    print_table(("model", "CPU ms", "wall ms", "middle half", "as fast", "middle half"), rows)
    shares: dict[str, dict[int, str]] = {}
    most: dict[str, float] = {}
    for number, one in enumerate(case.models):
        for operator in one.operators:
            shares.setdefault(operator.operator, {})[number] = f"{operator.share:.1%} of {operator.nodes}"
            most[operator.operator] = max(most.get(operator.operator, 0.0), operator.share)
    shown = sorted(most, key=lambda name: -most[name])[:MOST_OPERATORS]
    titles = ("time by operator", *(str(number) for number in range(1, len(case.models) + 1)))
    rest = [(f"… {len(most) - len(shown)} more", *("" for _ in case.models))] if len(most) > len(shown) else []
    table = [(name, *(shares[name].get(number, "") for number in range(len(case.models)))) for name in shown]
    print_table(titles, [*table, *rest])


def _end(path: str) -> str:
    """The end of a path says which model it is; the table is to fit into a terminal of 80 columns."""
    return path if len(path) <= LONGEST_PATH else "…" + path[1 - LONGEST_PATH :]


def _ends(spread: Spread, factor: float) -> str:
    return f"{factor * spread.low:.3g} … {factor * spread.high:.3g}"
