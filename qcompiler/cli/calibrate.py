"""`qcompiler calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli.common import (
    Device,
    Excluded,
    MemoryLimit,
    Model,
    Overwrite,
    RecipeName,
    RunsOn,
    SampleCount,
    SequenceLength,
    Settings,
    TargetName,
    Tokenizer,
    check_output,
    console,
    device_settings,
)
from qcompiler.graph.places import check_file


def calibrate(
    model: Model,
    recipe: RecipeName,
    calibration: Annotated[str, typer.Option("--calibration", metavar="SPEC", help="As for `compile`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="The file to write: stats.safetensors.")
    ],
    target: TargetName = None,
    tokenizer: Tokenizer = None,
    samples: SampleCount = None,
    seq_len: SequenceLength = None,
    set_: Settings = None,
    exclude: Excluded = None,
    memory_limit: MemoryLimit = None,
    device: RunsOn = Device.cpu,
    overwrite: Overwrite = False,
) -> None:
    """Measure what a recipe needs, once; `compile --statistics` then needs no data."""
    settings = [*device_settings(device, recipe), *(set_ or ())]
    check_output(output, model)
    check_file(output, overwrite)
    from qcompiler.compiler import calibrate

    calibrate(
        model,
        recipe,
        calibration=calibration,
        output=output,
        target=target,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=seq_len,
        options=settings,
        exclude=exclude or (),
        memory_limit=memory_limit,
        progress=True,
    )
    console().print(f"written to {output}", markup=False, highlight=False, soft_wrap=True)
