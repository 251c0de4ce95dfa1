"""`qcompiler debug`: which layers the error of a quantized model comes from, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.common import MOST, parse_size
from qcompiler.errors import OutputError
from qcompiler.graph.places import check_file

if TYPE_CHECKING:
    from qcompiler.diagnosis import Diagnosis


def debug(
    reference: Annotated[
        Path, typer.Argument(readable=False, metavar="FLOAT", help="The float model.", show_default=False)
    ],
    quantized: Annotated[
        Path, typer.Argument(readable=False, metavar="QUANTIZED", help="What any tool made of it.", show_default=False)
    ],
    calibration: Annotated[str, typer.Option("--calibration", metavar="SPEC", help="As for `compile`.")],
    tokenizer: Annotated[
        Path | None, typer.Option(readable=False, help="tokenizer.json; by default the one beside FLOAT.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="Samples to measure errors on.")] = 8,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, max=MOST, help="Tokens a sample, of text.")] = None,
    effect_samples: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Samples on which each layer's effect on the outputs is measured; 0: not at all."
        ),
    ] = 1,
    show: Annotated[int, typer.Option(min=1, max=MOST, help="Layers to print of each list.")] = 10,
    apply: Annotated[
        Path | None,
        typer.Option(
            "--apply", readable=False, metavar="FILE", help="Write the proposed recipe, for `compile --recipe`."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing FILE.")] = False,
    memory_limit: Annotated[
        int | None,
        typer.Option("--memory-limit", metavar="SIZE", parser=parse_size, help="What runs may use, e.g. 4GiB."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Find the layers that the error of a quantized model comes from, and propose what to change.

    Each layer is measured alone (all others in float) and in the quantized model, where errors pile up.
    """
    if apply is not None:
        check_file(apply, overwrite)
    from qcompiler.diagnosis import debug

    found = debug(
        reference, quantized, calibration=calibration, tokenizer=tokenizer, samples=samples, sequence_length=seq_len,
        effect_samples=effect_samples, memory_limit=memory_limit, progress=True,
    )  # fmt: skip
    if apply is not None and found.recipe is not None:
        _write(apply, found)
    if json_:
        from qcompiler.cli.common import print_json

        print_json(found.to_dict())
        return
    from qcompiler.cli.common import console
    from qcompiler.diagnosis.terminal import render_diagnosis

    render_diagnosis(found, console(), show)
    if apply is not None:
        said = f"written to {apply}" if found.recipe is not None else f"nothing is proposed, so {apply} was not written"
        console().print(f"\n{said}", markup=False, highlight=False, soft_wrap=True)


def _write(file: Path, found: Diagnosis) -> None:
    assert found.recipe is not None
    reasons = [f"# {proposal.text}: {proposal.reason}" for proposal in found.proposals]
    try:
        file.write_text("\n".join([*reasons, found.recipe.to_yaml()]), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
