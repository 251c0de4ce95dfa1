"""`qcompiler compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli.common import (
    Calibration,
    Device,
    Excluded,
    FloatType,
    Json,
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
    print_json_text,
)

SHOWN = 6  # names of files


def compile_(
    model: Model,
    recipe: RecipeName,
    output: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="The folder to write; made whole or not at all.")
    ],
    target: TargetName = None,
    dtype: FloatType = None,
    calibration: Calibration = None,
    tokenizer: Tokenizer = None,
    samples: SampleCount = None,
    seq_len: SequenceLength = None,
    statistics: Annotated[Path | None, typer.Option(readable=False, help="What `qcompiler calibrate` wrote.")] = None,
    set_: Settings = None,
    exclude: Excluded = None,
    strict: Annotated[bool, typer.Option("--strict", help="Skips and misplaced nodes make the exit code 1.")] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time the result beside the float model: some two seconds.")
    ] = True,
    memory_limit: MemoryLimit = None,
    device: RunsOn = Device.cpu,
    dump_dir: Annotated[
        Path | None, typer.Option(readable=False, help="Write the graph as text after each pass.")
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    json_: Json = False,
) -> None:
    """Compile a model: run a recipe's passes, check the result, and write it with a report."""
    settings = [*device_settings(device, recipe), *(set_ or ())]
    check_output(output, model)
    from qcompiler.compiler import compile
    from qcompiler.graph.files import check_free
    from qcompiler.graph.places import check_place

    check_free(output, overwrite)
    if dump_dir is not None:
        check_place(dump_dir)

    compiled = compile(
        model,
        recipe,
        calibration=calibration,
        target=target,
        dtype=dtype.value if dtype is not None else None,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=seq_len,
        statistics=statistics,
        options=settings,
        exclude=exclude or (),
        strict=strict,
        work_dir=output.parent / f".{output.name}.unfinished",
        resume=resume,
        measure_speed=speed,
        memory_limit=memory_limit,
        dump_dir=dump_dir,
        progress=True,
    )
    compiled.save(output, overwrite=overwrite)
    if json_:
        print_json_text(compiled.report.to_json())
    else:
        from qcompiler.report import render

        render(compiled.report, console())
        beside = _beside(compiled.source)
        console().print(f"\nwritten to {output}{beside}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(compiled.report.exit_code)


def _beside(source: Path | None) -> str:
    """What went along with the model, and what lay there and did not."""
    if source is None:
        return ""
    from qcompiler.graph.model_folder import companions_in

    taken, left = ([ascii(path.name)[1:-1] for path in files] for files in companions_in(source))
    told = [f"{verb} {', '.join(files[:SHOWN])}{' …' if len(files) > SHOWN else ''}"
            for verb, files in (("with", taken), ("without", left)) if files]  # fmt: skip
    return "".join(f", {text}" for text in told)
