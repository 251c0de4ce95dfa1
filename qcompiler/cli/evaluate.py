"""`qcompiler eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli.common import MOST, Json, Model, SequenceLength, print_json, print_table


def eval_(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", metavar="SPEC", help="As --calibration of `compile`; a text is read whole.")
    ],
    reference: Annotated[
        Path | None, typer.Option(readable=False, help="The float model to compare with, token by token.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(readable=False, help="tokenizer.json; by default the one beside the model.")
    ] = None,
    seq_len: SequenceLength = None,
    samples: Annotated[int | None, typer.Option(min=1, max=MOST, help="Stop after so many samples.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Read in steps through the cache, so that its errors are in the figures.")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, max=MOST, help="With --decode: tokens a step.")] = 1,
    prefill: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="With --decode: tokens of the first step; by default as many.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST, help="Threads of ONNX Runtime.")] = None,
    json_: Json = False,
) -> None:
    """Measure the perplexity of a language model and, with --reference, how close it is to another."""
    if not decode and (chunk > 1 or prefill is not None):
        raise typer.BadParameter("--chunk and --prefill say how --decode reads; give --decode, too")
    from qcompiler.evaluation.evaluate import Steps, evaluate
    from qcompiler.report.table import evaluation_rows

    figures = evaluate(
        model,
        data,
        reference=reference,
        tokenizer=tokenizer,
        sequence_length=seq_len,
        limit=samples,
        decode=Steps(chunk, prefill) if decode else None,
        threads=threads,
        progress=True,
    ).to_dict()
    if json_:
        print_json(figures)
    else:
        print_table(("measure", "value"), evaluation_rows(figures))
