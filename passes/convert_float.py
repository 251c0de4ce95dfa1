"""Computes in float16 or bfloat16, as kernels on GPUs want it, what a recipe leaves in float32.

**Before**  y = f(x) in float32          **After**  y = f(x) in float16; where float32 is needed, between two Casts

Constants are rounded once, when the model is written. Graph inputs and outputs, caches among them, change their type,
too, except those that ``keep_io`` names. Names stay.

What stays in float32, because 16 bits would not do:

- means, sums, powers, roots and exponentials, and what joins their results with the data: the inside of a norm that the
  exporter spelled out. Squares overflow in float16 from 256 on, and an ε of 1e-12 underflows;
- what is computed of whole numbers alone: positions and rotary angles, masks. It is rounded where it meets the data.
  Numbers that hide something (-3.4e38, -inf) become half of the type's largest: a row that is hidden whole would else
  be -inf everywhere, and its softmax NaN;
- scales that operators want in float32, and operators that have no form in 16 bits;
- with ``check_range``, what writes or reads a value that gets larger on calibration data, times ``headroom``, than
  float16 holds (65504). Large models have such values, most often what a down_proj reads. bfloat16 has float32's range;
- nodes whose constants do not fit: larger than the range, or so small that rounding loses them.

The last two kinds are reported with the reason. What the model computes in float32 between Casts of its own stays so.
Products, softmax, and norms that are one operator accumulate in float32 inside ONNX Runtime's kernels.

Skipped: If, Loop and Scan with the graphs inside them, and the last two kinds above. Layers that ``ignore`` names stay
in float32, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import ModelError
from qcompiler.formats.arithmetic import slices
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import multiplies_floats
from qcompiler.half.constants import MASK
from qcompiler.half.decided import HalfPlan
from qcompiler.half.plan import HALF_TYPES, plan
from qcompiler.half.rewrite import convert
from qcompiler.half.types import FLOAT, fill_in_types
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Convolution, Embedding, Linear
from qcompiler.statistics import MinMax, StatisticsStore

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@options(frozen=True, config=OPTIONS)
class ConvertFloat(Pass):
    name: ClassVar[str] = "convert-float"
    kind: ClassVar[Kind] = "lowering"

    dtype: Literal["fp16", "bf16"] = "fp16"
    """fp16 (float16), or bf16 (bfloat16)."""
    keep_io: tuple[str, ...] | None = None
    """Names, or globs, of graph inputs and outputs that stay in float32. Open: none for fp16, logits for bf16, which
    numpy does not have."""
    check_range: bool = False
    """Measure on calibration data what float16 cannot hold, and keep that in float32."""
    headroom: float = Field(default=2.0, ge=1.0)
    """How many times as large as on calibration data values may get."""

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        return [Tap(name, MinMax()) for name in self._measured(model)]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        dtype = DTYPES[self.dtype]
        _refuse_other_type(model, dtype)
        peaks = {}
        for name in self._measured(model):
            found = statistics.get(name, MinMax()).result()
            peaks[name] = self.headroom * max(abs(found.lo), abs(found.hi))
        fill_in_types(model)
        decided = self._plan(model, peaks)
        sites = sites_of(model)
        changes = Changes()
        for site in sites:
            if not self.selects(site):
                changes.excluded.append(Skipped(site.name, "stays in float32: the recipe leaves it so"))
            elif isinstance(site, Linear | Convolution | Embedding) and decided.modes.get(site.node) == "half":
                changes.changed.append(Changed(site.name, detail=f"in {dtype.name.lower()}"))
        changes.skipped += [
            Skipped(str(node.name), f"stays in float32: {reason}") for node, reason in decided.reasons.items()
        ]
        changes.narrowed = convert(model, decided, self._stays, self.name)
        return changes

    def _measured(self, model: ir.Model) -> list[str]:
        """The values whose range decides: what nodes write that can make numbers larger."""
        if not self.check_range or self.dtype == "bf16":
            return []
        decided = self._plan(model, {})
        return [
            str(node.outputs[0].name)
            for node, mode in decided.modes.items()
            if mode == "half" and node in decided.forms and _can_grow(node, decided)
        ]

    def _plan(self, model: ir.Model, peaks: dict[str, float]) -> HalfPlan:
        sites = sites_of(model)
        left = {site.node for site in sites if not self.selects(site)}
        return plan(model, DTYPES[self.dtype], sites, lambda node: node not in left, self._stays, peaks)

    def _stays(self, name: str) -> bool:
        """Whether a graph input or output keeps its type."""
        kept = self.keep_io
        if kept is None:
            kept = ("logits",) if self.dtype == "bf16" else ()
        return any(fnmatchcase(name, pattern) for pattern in kept)


def _refuse_other_type(model: ir.Model, dtype: ir.DataType) -> None:
    other = next(item for item in HALF_TYPES if item != dtype)
    products = (node.outputs[0] for node in model.graph if multiplies_floats(node))  # caches have scales in float16
    if any(value.dtype == other for value in products):
        raise ModelError(f"the model is in {other.name.lower()} already, and convert-float starts from float32")


def _grows(node: ir.Node) -> bool:
    """Whether the operator's result may be larger than what it reads."""
    return multiplies_floats(node) or node.op_type in ("Mul", "Div", "Add", "Sub", "Sum")


def _can_grow(node: ir.Node, decided: HalfPlan) -> bool:
    """Whether the numbers that a node writes may be larger than those it reads, masks that are added left out."""
    if node.domain == "" and not _grows(node) and "Normalization" not in node.op_type:
        return False
    for value in node.inputs:
        if value is None or value.dtype != FLOAT or node.op_type not in ("Add", "Sub"):
            continue
        if decided.kinds.get(value) == "table" or _masks(constant(value)):
            return False
    return True


def _masks(tensor: ir.TensorProtocol | None) -> bool:
    if tensor is None or tensor.size > 1 << 24:
        return False
    numbers = tensor.numpy()
    return any(bool((numbers.reshape(-1)[part] < MASK).any()) for part in slices((numbers.size,)) if numbers.size)
