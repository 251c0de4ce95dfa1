"""Scales up the weights that loud channels meet, so that rounding them loses less; the function stays.

**Before**  x = n ⊙ g (+ b),  y_i = x W_i        **After**  x' = n ⊙ (g / s) (+ b / s),  y_i = x' (s ⊙ W_i)

A few input channels carry most of what a layer computes, and round-to-nearest treats their weights as any other.
Multiplying row j of the weights by s_j before they are rounded and dividing channel j of x by s_j makes the error of
that row s_j times smaller, as long as the scale of its group stays about what it was.

Source: Lin et al. 2023, "AWQ", section 3.2: s_j = m_j^α, with α from the grid 0 … 1 that gives the least output error,
divided by √(max s · min s) as in the authors' code. Here m_j is the root mean square of channel j. The output error is
computed from the second moments H = E[x xᵀ], each token weighing the less the louder it is, as a sum would be the
loudest's alone: tr(D H Dᵀ) for D = Q(s ⊙ W) / s - W and Q round-to-nearest with the format and groups that the options
announce: it is the error on the calibration data, without running the model again. With `grid: 20`, 21 roundings and
products of [512, K] with [K, K] are made for each layer, as at most 512 output channels, evenly spaced, are looked at.
α = 0 leaves the layers alone, so they never get worse by this measure.

Where several layers read one value (q, k and v; gate and up), the sum of their errors relative to their outputs
decides, E‖y_i - ŷ_i‖² / E‖y_i‖². The paper runs the block and takes the error of its output; a sum of absolute errors
would follow the layer with the largest numbers, and change whenever another fold rescales an output (v's, for o_proj).

The division goes into the gain (and bias) of the norm that writes x; in an MLP into the columns of up_proj (and its
bias); and in attention into those of v_proj on behalf of o_proj, where nothing keeps its values: not with a cache, as
its contents would change meaning. With grouped queries the channels of o_proj that read one channel of v_proj get one
scale, from the mean of their squares.

This pass rounds nothing. It comes before `quantize-weights`, `gptq` or any other that does, with the same format and
group size; their own search for ranges takes the place of AWQ's clipping.

Skipped: values that nothing foldable writes, and values that something else than linear layers reads, too (unless
``insert_mul: true``, which puts an explicit Mul before the layers); weights that are tied to an embedding or shared
with another layer (scaling would untie them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.formats.scheme import Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting import folding
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.staged import Computed, Measured, StagedPass, Unit
from qcompiler.sites.find import Linear, NormGroup
from qcompiler.statistics import SecondMoment, StatisticsStore

if TYPE_CHECKING:
    from qcompiler.targets import Target

CHANNELS = 512  # output channels of a layer that the search looks at
INSTEAD = "insert_mul: true multiplies explicitly"
GROUP_SIZE = 128

Matrix = npt.NDArray[np.float32]


@options(frozen=True, config=OPTIONS)
class Awq(StagedPass):
    name: ClassVar[str] = "awq"
    kind: ClassVar[Kind] = "exact"

    format: str = "int4"
    """Number format that the weights will be rounded to."""
    group_size: int | None = None
    """Input channels that will share a scale; left out, the target's best block size, or 128."""
    symmetric: bool = True
    """Whether the weights will have no zero points."""
    grid: int = Field(default=20, ge=1)
    """Steps of α between 0 and 1."""
    insert_mul: bool = False
    """Put an explicit Mul where nothing can take the division (costs one elementwise pass per group at run time)."""

    def __post_init__(self) -> None:
        self.scheme()

    def scheme(self) -> Scheme:
        """What the search rounds to."""
        return Scheme.from_options(
            self.format, "group", GROUP_SIZE if self.group_size is None else self.group_size, self.symmetric
        )

    def for_target(self, target: Target) -> Pass:
        if self.group_size is not None or target.block_size is None:
            return self
        return replace(self, group_size=target.block_size)

    @property
    def measured(self) -> Measured:
        return "in stages"

    def units(self, model: ir.Model, changes: Changes) -> Sequence[Unit]:
        found: list[Unit] = []
        for group, obstacle in folding.rescalable(model, self, insert_mul=self.insert_mul, instead=INSTEAD):
            if obstacle is not None:
                changes.skipped.extend(Skipped(linear.name, obstacle) for linear in self.selected(group.linears))
                continue
            value = str(group.output.name)
            found.append(Unit(value, len(found), (Tap(value, SecondMoment(per_token=True)),), group))
        return found

    def compute(self, unit: Unit, statistics: StatisticsStore) -> Computed:
        """The α of the smallest expected error, the scales [K], and each layer's error without them and with them."""
        group: NormGroup = unit.work
        moment = statistics.get(unit.name, SecondMoment(per_token=True)).result().astype(np.float32, copy=False)
        magnitude = folding.without_silence(np.sqrt(folding.shared(group, np.diagonal(moment).astype(np.float64))))
        weights = [_sample(linear) for linear in group.linears]
        errors = [self._errors(weights, moment, _scales(magnitude, alpha)) for alpha in self._grid()]
        best = int(np.argmin([sum(error) for error in errors]))
        alpha = self._grid()[best]
        return Computed({"scale": _scales(magnitude, alpha)}, {"alpha": alpha, "errors": [errors[0], errors[best]]})

    def write(self, unit: Unit, computed: Computed, rw: Rewriter, changes: Changes) -> None:
        group: NormGroup = unit.work
        alpha, (before, after), scale = computed.facts["alpha"], computed.facts["errors"], computed.arrays["scale"]
        if alpha == 0:
            detail = "left as it is: no scales have a smaller expected output error than {:.3g}"
            for linear, error in zip(group.linears, before, strict=True):
                changes.changed.append(Changed(linear.name, detail=detail.format(error)))
            return
        if not folding.fits(group, scale):
            changes.skipped.extend(Skipped(linear.name, folding.NO_ROOM) for linear in group.linears)
            return
        folding.rescale(group, scale, rw, changes)
        for linear, was, now in zip(group.linears, before, after, strict=True):
            detail = f"alpha {alpha:.2f}, expected output error {was:.3g} → {now:.3g}, {folding.place(group)}"
            changes.changed.append(Changed(linear.name, detail=detail))

    def _grid(self) -> list[float]:
        return [step / self.grid for step in range(self.grid + 1)]

    def _errors(self, weights: Sequence[Matrix], moment: Matrix, scale: np.ndarray) -> list[float]:
        """E‖y - ŷ‖² / E‖y‖² of each layer, for weights [n, K] that are rounded after a multiplication by `scale`."""
        factors = scale.astype(np.float32)
        errors = []
        for rows in weights:
            rounded = quantize_weight(rows * factors, self.scheme(), channel_axis=0).dequantize()
            signal = _energy(rows, moment)
            errors.append(_energy(rounded / factors - rows, moment) / signal if signal > 0 else 0.0)
        return errors


def _scales(magnitude: np.ndarray, alpha: float) -> np.ndarray:
    scale = magnitude**alpha
    normalised: np.ndarray = scale / np.sqrt(scale.max() * scale.min())
    return normalised


def _energy(rows: Matrix, moment: Matrix) -> float:
    """tr(R H Rᵀ), the mean square of x Rᵀ summed over the rows of R."""
    return float(np.vdot(rows @ moment, rows))


def _sample(linear: Linear) -> Matrix:
    """At most CHANNELS output channels of the weight, evenly spaced, as rows [n, K]."""
    count = linear.out_features
    picked = np.linspace(0, count - 1, min(count, CHANNELS)).round().astype(np.int64)

    def compute(data: np.ndarray) -> Matrix:
        rows = data[picked] if linear.transposed else data[:, picked].T
        return np.array(rows, np.float32, order="C")

    return read(folding.weight_of(linear), compute)
