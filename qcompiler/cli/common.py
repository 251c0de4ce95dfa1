"""What the commands share: types of options, sizes, tables and JSON on stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.errors import OutputError, TargetError
from qcompiler.graph.places import check_place, exists

if TYPE_CHECKING:
    from rich.console import Console


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp16 = "fp16"
    bf16 = "bf16"


def parse_size(text: str | int) -> int:
    """Bytes of ``4GiB``, ``500MB``, ``1.5 GB``, ``1073741824``; powers of 1024 with an i, of 1000 without."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write it like 4GiB or 500MB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    size = Decimal(number) * (1024 if binary else 1000) ** power
    if not 1 <= size < 1 << 63:
        raise typer.BadParameter(f"{str(text)[:40]!r} is no size that a machine has; write it like 4GiB or 500MB")
    return int(size)


Model = Annotated[
    Path,
    typer.Argument(
        readable=False, metavar="MODEL", help="A .onnx file, or the folder that an exporter wrote.", show_default=False
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", metavar="NAME|FILE.yaml", help="See `qcompiler recipes`.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SPEC",
        help="data.npz, a folder of them, data.jsonl, text.txt, pb:DIR, py:module:function, or random.",
    ),
]
Tokenizer = Annotated[Path | None, typer.Option(readable=False, help="tokenizer.json, where the data is text.")]
MOST = 2**31 - 1  # samples, tokens, threads: more than any machine has
SampleCount = Annotated[int | None, typer.Option("--samples", min=1, max=MOST, help="Samples to calibrate on.")]
SequenceLength = Annotated[
    int | None, typer.Option("--seq-len", min=1, max=MOST, help="Tokens a sample, where the data is text.")
]
TargetName = Annotated[
    str | None, typer.Option("--target", help="portable, ort-cpu, ort-cuda or tensorrt; see `qcompiler targets`.")
]
FloatType = Annotated[
    Precision | None,
    typer.Option("--dtype", help="Convert what is left in float32: graph inputs and outputs, too. For GPUs."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Change an option of a pass; may be repeated."),
]
Excluded = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave layers alone: name, glob or re:…; may be repeated."),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option("--memory-limit", metavar="SIZE", parser=parse_size, help="What calibration may use, e.g. 4GiB."),
]
RunsOn = Annotated[Device, typer.Option("--device", help="Where linear algebra is done; models run on the CPU.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def console(*, stderr: bool = False) -> Console:
    from qcompiler.report.plain import PlainConsole

    return PlainConsole(stderr=stderr)


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table without frame; the last column wraps."""
    from rich.table import Table

    from qcompiler.report.plain import escape

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def print_json(data: dict[str, Any]) -> None:
    from qcompiler.report.report import finite

    print_json_text(json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def print_json_text(text: str) -> None:
    """With letters as they are, and escaped what a terminal might obey; JSON itself does so up to U+001F."""
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def device_settings(device: Device, recipe: str) -> list[str]:
    """The settings that move linear algebra to the device. Raises TargetError where the recipe has none to move."""
    if device is Device.cpu:
        return []
    from qcompiler.recipes import Recipe
    from qcompiler.recipes.registry import options_of, pass_class

    names = dict.fromkeys(step.name for step in Recipe.load(recipe).passes)
    movable = [name for name in names if any(option.name == "device" for option in options_of(pass_class(name)))]
    if not movable:
        raise TargetError(f"--device cuda: no pass of the recipe {recipe} computes on a GPU; leave the option out")
    return [f"{name}.device={device.value}" for name in movable]


def check_output(output: Path, model: Path) -> None:
    """Raise OutputError where a folder that may be overwritten holds the input, too."""
    check_place(output)
    if exists(model) and model.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} holds the input model, which would be overwritten; choose another name")
