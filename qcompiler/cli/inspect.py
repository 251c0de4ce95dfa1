"""`qcompiler inspect`: what is in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[
        Path, typer.Argument(readable=False, metavar="MODEL", help="Any .onnx file, or its folder.", show_default=False)
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="NAME|FILE.yaml", help="Show which layers it would touch.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="With --recipe: as for `compile`.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PASS.OPTION=VALUE", help="With --recipe: as for `compile`.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="With --recipe: as for `compile`.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Read the weights, for their statistics.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show what is in a model: layers with their types, schemes and bytes, weights, inputs and outputs, metadata."""
    if recipe is None and (target or set_ or exclude):
        raise typer.BadParameter("--target, --set and --exclude are about a recipe; give --recipe, too")
    from qcompiler.inspection import inspect

    found = inspect(model, recipe=recipe, target=target, options=set_ or (), exclude=exclude or (), statistics=weights)
    if json_:
        from qcompiler.cli.common import print_json

        print_json(found.to_dict())
        return
    from qcompiler.cli.common import console
    from qcompiler.inspection.terminal import render_inspection

    render_inspection(found, console())
