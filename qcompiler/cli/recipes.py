"""`qcompiler recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompiler.cli.common import print_table


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A built-in recipe or a file, to print.", show_default=False)
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Print it with every option written out.")] = None,
) -> None:
    """List the built-in recipes, or print one as YAML."""
    from qcompiler.recipes import Recipe, recipe_names

    if name is None:
        print_table(("recipe", "what it does"), [(item, Recipe.load(item).description) for item in recipe_names()])
        return
    recipe = Recipe.load(name)
    typer.echo((recipe.resolved(target) if target else recipe).to_yaml(), nl=False)
