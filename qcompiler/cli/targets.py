"""`qcompiler targets`: the targets, what one has kernels for, and what suits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def targets(
    name: Annotated[str | None, typer.Argument(help="A target, to show its kernels.", show_default=False)] = None,
    best: Annotated[
        Path | None,
        typer.Option("--best", readable=False, metavar="MODEL", help="Say what to take for this model, and why."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the targets, show what one has kernels for, or recommend a target and recipe for a model."""
    from qcompiler.targets import Target, usable_targets

    if best is not None:
        _recommend(best, name, json_)
        return
    from qcompiler.cli.common import console, print_json, print_table

    if name is None:
        usable, broken = usable_targets()
        titles = {item.name: item.title for item in usable}
        if json_:
            print_json({"targets": titles, **({"broken": broken} if broken else {})})
        else:
            titles |= {item: f"cannot be used: {reason}" for item, reason in broken.items()}
            print_table(("target", "what it is"), list(titles.items()))
        return
    from qcompiler.targets.show import render_target

    if json_:
        print_json(Target.load(name).model_dump(mode="json", by_alias=True))
    else:
        render_target(Target.load(name), console())


def _recommend(model: Path, target: str | None, json_: bool) -> None:
    from dataclasses import asdict

    from qcompiler.inspection.recommend import recommend

    found = recommend(model, target)
    if json_:
        from qcompiler.cli.common import print_json

        print_json({"model": str(model), "recommendations": [asdict(item) for item in found]})
        return
    if not found:
        typer.echo("no layer of the model can be quantized, so there is no recipe to recommend")
    for number, item in enumerate(found):
        head = "take" if number == 0 else "or"
        typer.echo(f"{head} --target {item.target} --recipe {item.recipe}")
        for reason in item.reasons:
            typer.echo(f"    {reason}")
