"""Compares two models and tells what became of each layer, however many nodes stand for it in either of them.

    difference = diff("float.onnx", "compiled/")
    for story in difference.layers:
        print(story.text)

Both models are brought into one form first, on copies: functions inlined, constants lifted, everything named.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.calibration.samples import Samples
from qcompiler.evaluation.compare import Measures
from qcompiler.graph import files as model_io
from qcompiler.graph.model_folder import tokenizer_beside
from qcompiler.model_diff.changes import (
    InitializerChange,
    NodeChange,
    PortChange,
    Quantization,
    TensorInfo,
    Totals,
    initializer_changes,
    initializers,
    new_quantization,
    node_changes,
    port_changes,
    same_constants,
    totals,
)
from qcompiler.model_diff.drawn import draw
from qcompiler.model_diff.fates import Fate, count_fates
from qcompiler.model_diff.layers import read_layers
from qcompiler.model_diff.node_pairing import pair_nodes
from qcompiler.model_diff.numbers import measure
from qcompiler.model_diff.outliers import joined
from qcompiler.model_diff.pairing import pair_layers
from qcompiler.model_diff.scales import MovedScale, find_scalings, moves
from qcompiler.model_diff.stories import Form, LayerStory, tell, tell_caches
from qcompiler.report.pictures import Drawing
from qcompiler.report.report import finite
from qcompiler.sites.canonicalize import inline_functions, lift_constants, name_everything, remove_identities

__all__ = [
    "Diff", "Fate", "Form", "InitializerChange", "LayerStory", "MovedScale", "NodeChange", "PortChange", "Quantization",
    "TensorInfo", "Totals", "diff",
]  # fmt: skip


@dataclass(frozen=True)
class Diff:
    """What differs from model A to model B; falsy where nothing does."""

    layers: tuple[LayerStory, ...]
    """Every layer with weights, and every cache, untouched ones too."""
    scales: tuple[MovedScale, ...]
    fates: tuple[Fate, ...]
    """What became of the nodes of A."""
    nodes: tuple[NodeChange, ...]
    initializers: tuple[InitializerChange, ...]
    ports: tuple[PortChange, ...]
    quantization: tuple[Quantization, ...]
    before: Totals
    after: Totals
    renamed: int = 0
    """Nodes that are the same under another name."""
    outputs: dict[str, Measures] = field(default_factory=dict)
    """How far B's outputs are from A's, where both were run."""
    drawings: tuple[Drawing, ...] = ()
    """Of each block, those that look the same once; for the page."""
    undrawn: str = ""
    """Why blocks are missing among the drawings; empty where none is."""

    def __repr__(self) -> str:
        fates = Counter(story.fate for story in self.layers)
        told = ", ".join(f"{count} {fate}" for fate, count in fates.most_common())
        return f"Diff({len(self.layers)} layers: {told or 'none'}; {len(self.nodes)} changes of nodes)"

    def __bool__(self) -> bool:
        return bool(self.nodes or self.initializers or self.ports or self.quantization)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the drawings; infinite numbers become the string ``inf``."""
        plain = dataclasses.replace(self, drawings=(), undrawn="")
        data: dict[str, Any] = finite(dataclasses.asdict(plain))
        del data["drawings"], data["undrawn"]
        for entry, story in zip(data["layers"], self.layers, strict=True):
            entry["text"] = story.text
        return data

    def to_html(self, title: str = "") -> str:
        """One page that needs nothing else."""
        from qcompiler.model_diff.page import page

        return page(self, title)

    def _repr_html_(self) -> str:
        from qcompiler.model_diff.page import card

        return card(self)


def diff(
    a: str | Path | ir.Model,
    b: str | Path | ir.Model,
    *,
    errors: bool = True,
    calibration: str | Samples | None = None,
    tokenizer: str | Path | None = None,
    samples: int | None = 8,
    sequence_length: int | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Diff:
    """Compare two models: `.onnx` files, folders or `onnx_ir.Model`, which are left as they are.

    Without `errors` the weights of layers are not compared as numbers, which takes the longest for large models. With
    `calibration` (a SPEC, see `samples`, or Samples) both are run, on at most `samples` of it, and each matched layer's
    output is measured. Raises ModelError where a model cannot be read or run, DataError where the data does not fit.
    """
    first, second = _prepared(a), _prepared(b)
    pairs = pair_layers(*(joined(model, read_layers(model)) for model in (first, second)))
    nodes = pair_nodes(first, second, pairs)
    mine, theirs = initializers(first), initializers(second)
    same = same_constants(mine, theirs)
    scalings = find_scalings(first, pairs, nodes)
    stories = list(tell(pairs, scalings, same, errors=errors))
    outputs: dict[str, Measures] = {}
    if calibration is not None:
        beside = None if isinstance(a, ir.Model) else tokenizer_beside(a)
        stories, outputs = measure(
            first, second, pairs, stories, scalings, calibration, tokenizer=Path(tokenizer) if tokenizer else beside,
            limit=samples, sequence_length=sequence_length, memory_limit=memory_limit, progress=progress,
        )  # fmt: skip
    caches = list(tell_caches(first, second))
    drawn, undrawn = draw(first, second, nodes, pairs, stories, caches, same)
    return Diff(
        layers=(*stories, *caches),
        scales=tuple(moves(scalings)),
        fates=count_fates(first, nodes, pairs, stories, same),
        nodes=tuple(node_changes(first, second, nodes, same)),
        initializers=tuple(initializer_changes(mine, theirs, same)),
        ports=tuple(port_changes(first, second)),
        quantization=tuple(new_quantization(first, second, nodes)),
        before=totals(first),
        after=totals(second),
        renamed=sum(node.name != other.name for node, other in nodes.items()),
        outputs=outputs,
        drawings=drawn,
        undrawn=undrawn,
    )


def _prepared(model: str | Path | ir.Model) -> ir.Model:
    """A copy in which constants are initializers and every node has a name; weights are shared with the original."""
    copy = model_io.take(model)
    inline_functions(copy)
    name_everything(copy.graph)
    lift_constants(copy)
    remove_identities(copy.graph)
    return copy
