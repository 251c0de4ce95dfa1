"""`qcompiler diff`: what became of each layer between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli.common import MOST
from qcompiler.errors import OutputError
from qcompiler.graph.places import check_file


def diff(
    a: Annotated[
        Path, typer.Argument(readable=False, metavar="A", help="The first model, a file or folder.", show_default=False)
    ],
    b: Annotated[Path, typer.Argument(readable=False, metavar="B", help="The second model.", show_default=False)],
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Run both models on this data, and measure each layer; as for `compile`."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(readable=False, help="tokenizer.json; by default the one beside A.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="With --calibration: at most so many.")] = 8,
    seq_len: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="With --calibration: tokens of a sample of text.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Compare the weights of layers as numbers.")
    ] = True,
    details: Annotated[bool, typer.Option("--details", help="Also list nodes, constants and scales.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", readable=False, metavar="FILE", help="Write one page for a browser.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Tell what became of each layer: how it is stored, at what error, and which scales moved.

    Any two ONNX files will do, those of another quantizer, too: layers are matched by name, by module path and by
    structure.
    """
    if calibration is None and (tokenizer is not None or seq_len is not None):
        raise typer.BadParameter("--tokenizer and --seq-len are about data; give --calibration, too")
    if html is not None:
        check_file(html, overwrite=True)
    from qcompiler import model_diff

    found = model_diff.diff(
        a, b, errors=weights, calibration=calibration, tokenizer=tokenizer, samples=samples, sequence_length=seq_len,
        progress=True,
    )  # fmt: skip
    if html is not None:
        try:
            html.write_text(found.to_html(f"{a} → {b}"), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{html} cannot be written: {error.strerror or error}") from error
    if json_:
        from qcompiler.cli.common import print_json

        print_json(found.to_dict())
        return
    from qcompiler.cli.common import console
    from qcompiler.model_diff.terminal import render_diff

    render_diff(found, console(), details=details)
    if html is not None:
        typer.echo(f"\nwritten to {html}")
