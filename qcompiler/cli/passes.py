"""`qcompiler passes` and `qcompiler explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompiler.cli.common import console, print_table
from qcompiler.errors import RecipeError


def passes() -> None:
    """List the passes that recipes can use."""
    from qcompiler.recipes.registry import pass_class, pass_names, summary

    def row(name: str) -> tuple[str, ...]:
        try:
            return name, pass_class(name).kind, summary(name)
        except RecipeError as error:  # a plugin that cannot be loaded harms only those who use it
            return name, "broken", str(error)

    print_table(("pass", "kind", "what it does"), [row(name) for name in pass_names()])


def explain(
    name: Annotated[str, typer.Argument(metavar="PASS", help="See `qcompiler passes`.", show_default=False)],
) -> None:
    """Show the manual page of a pass, and its options."""
    from qcompiler.recipes.registry import manual, options_of, pass_class

    cls = pass_class(name)
    out = console()
    out.print(f"{name} ({cls.kind})\n", style="bold", markup=False)
    out.print(manual(name) + "\n", markup=False, highlight=False)
    rows = [(option.name, option.default, option.type, option.help) for option in options_of(cls)]
    print_table(("option", "default", "type", "what it means"), rows)
