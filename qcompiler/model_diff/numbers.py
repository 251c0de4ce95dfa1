"""Runs both models on the same samples, and measures each matched layer's output and each output of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.samples import Samples, open_samples
from qcompiler.errors import ModelError
from qcompiler.evaluation.compare import Measures, compare
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.scales import Scaling
from qcompiler.model_diff.stories import LayerStory


def measure(
    first: ir.Model, second: ir.Model, pairs: Sequence[LayerPair], stories: Sequence[LayerStory],
    scalings: Mapping[Layer, Scaling], data: str | Samples, *, tokenizer: Path | None = None, limit: int | None = None,
    sequence_length: int | None = None, memory_limit: int | None = None, progress: bool = False,
) -> tuple[list[LayerStory], dict[str, Measures]]:  # fmt: skip
    """The stories with what was measured, and the same for outputs that both graphs have under one name.

    `data` is a SPEC (see `samples`) or Samples opened for the first model. What an exact pass divided is multiplied
    back. Raises ModelError where a model cannot be run, DataError where the data does not fit.
    """
    samples = data
    if isinstance(samples, str):
        samples = open_samples(
            samples, model=first, tokenizer=tokenizer, limit=limit, sequence_length=sequence_length
        )  # fmt: skip
    values: dict[str, str] = {}
    divided = {}
    for pair in pairs:
        if len(pair.before) != 1 or len(pair.after) != 1:
            continue
        name = str(pair.before[0].output.name)
        values[name] = str(pair.after[0].output.name)
        scaling = scalings.get(pair.before[0])
        if scaling is not None and scaling.outputs is not None:
            divided[name] = 1 / scaling.outputs
    known = {value.name for value in second.graph.outputs}
    common = [str(value.name) for value in first.graph.outputs if value.name in known]
    found = compare(
        first, second, samples, outputs=common, values=values, divided=divided, limit=limit, memory_limit=memory_limit,
        progress=progress,
    )  # fmt: skip
    changed = [name for name in common if name in found.reshaped]
    if changed:
        raise ModelError(f"{changed[0]!r} has another shape in the second model, so they cannot be compared")
    told = [
        replace(story, measures=found.values.get(story.before.output)) if story.before is not None else story
        for story in stories
    ]
    return told, found.outputs
