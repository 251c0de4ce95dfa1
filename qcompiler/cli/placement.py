"""`qcompiler placement`: which provider runs each node of a compiled model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qcompiler.placement import Placement, PlacementDifference


def placement(
    model: Annotated[
        Path, typer.Argument(readable=False, metavar="OUT", help="A compiled folder, or any model.", show_default=False)
    ],
    target: Annotated[
        str | None, typer.Option("--target", help="Where it is to run; by default, where it was compiled for.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning makes the exit code 1.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show which provider runs each node: measured where the target's starts here, else predicted.

    The prediction is made from the kernel table of the target, without a GPU. Where both are known, they are compared.
    """
    from qcompiler.errors import TargetError
    from qcompiler.graph import files as model_io
    from qcompiler.graph.metadata import TARGET
    from qcompiler.placement import compare, measure, predict
    from qcompiler.targets import Target

    graph = model_io.load(model_io.find_model(model))
    chosen = Target.load(target or graph.metadata_props.get(TARGET, "ort-cuda"))
    predicted = predict(graph, chosen)
    if predicted is None:
        raise TargetError(f"the target {chosen.name} has no kernel table; give --target ort-cpu or ort-cuda")
    measured = measure(model, chosen, predicted=predicted)
    difference = compare(predicted, measured) if measured is not None else None
    shown = measured or predicted
    if json_:
        from qcompiler.cli.common import print_json

        print_json(_result(chosen.name, predicted, shown, difference))
    else:
        for line in _lines(chosen.name, shown, difference):
            typer.echo(line)
    raise typer.Exit(1 if strict and shown.warnings else 0)


def _result(
    target: str, predicted: Placement, shown: Placement, difference: PlacementDifference | None
) -> dict[str, Any]:
    from dataclasses import asdict

    data = {"target": target, **asdict(shown), "warnings": shown.warnings}
    if difference is not None:
        data["predicted"] = asdict(predicted)
        data["moved"] = [asdict(there) for _, there in difference.moved]
    return data


def _lines(target: str, shown: Placement, difference: PlacementDifference | None) -> list[str]:
    known = "measured with" if shown.measured else "predicted from the kernel table of"
    lines = [f"{target}, {known} {shown.runtime}: {shown.summary()}", ""]
    counts = Counter((node.provider or "none", node.role, node.op) for node in shown.nodes)
    for (provider, role, op), count in sorted(counts.items()):
        lines.append(f"{provider:6} {count:5}  {op}" + (f" ({WORDS[role]})" if role else ""))
    if difference is not None:
        lines += ["", _agreement(difference)]
        lines += [f"  {there.name} ({there.op}) is on {there.provider}, and {here.provider} was predicted"
                  for here, there in difference.moved]  # fmt: skip
    lines += [f"warning: {warning}" for warning in shown.warnings]
    if not shown.measured:
        lines += ["", "not measured: this onnxruntime does not start the provider; it needs onnxruntime-gpu and a GPU"]
    return lines


def _agreement(difference: PlacementDifference) -> str:
    made, removed = len(difference.made), len(difference.removed)
    optimizers = f"; optimizers removed {removed} nodes and made {made}" if made or removed else ""
    predicted, measured = difference.copies
    copies = f"{measured} copies" + ("" if predicted == measured else f" where {predicted} were predicted")
    if not difference.moved:
        return f"all nodes are where they were predicted to be, {copies}{optimizers}"
    return f"{len(difference.moved)} nodes are not where they were predicted to be, {copies}{optimizers}"


WORDS = {
    "shape": "shape arithmetic",
    "fallback": "no kernel on the target's provider",
    "follows": "reads only what such a node gives",
    "none": "no kernel at all",
    "expanded": "taken apart by the runtime",
    "fails": "fails when it runs",
}
