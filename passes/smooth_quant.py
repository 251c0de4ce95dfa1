"""Moves activation outliers into the weights that read them, without changing the function.

**Before**  x = n ⊙ g (+ b),  y_i = x W_i        **After**  x' = n ⊙ (g / s) (+ b / s),  y_i = x' (s ⊙ W_i)

A few channels of a transformer's activations are 10 to 100 times larger than the others. One scale for the whole tensor
then leaves the small channels a handful of levels. Dividing channel j of x by s_j and multiplying row j of every weight
that reads x by s_j evens them out; x W is the same, and the weights, quantized per output channel, hardly notice.

Source: Xiao et al. 2023, "SmoothQuant", equation 4: s_j = max|x_j|^α / max|W_j|^(1-α). The division goes into the gain
(and bias) of the norm that writes x, so it costs nothing at run time; in a gated MLP, x = a ⊙ (v W_up + b), it goes
into the columns of W_up (and b), and likewise through a ReLU. With ``alpha: auto`` each group takes the α of the grid
0, 0.05 … 1 (or no smoothing at all) with the smallest expected error of the int8 product, computed from the measured
ranges and second moments; the model is not run again.

Skipped: values that no foldable norm writes, and values that something else than linear layers reads, too (unless
``insert_mul: true``, which puts an explicit Mul before the layers); weights that are tied to an embedding or shared
with another layer (scaling would untie them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.graph.edit import constant
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting import folding
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.folding import COLUMNS_AT_ONCE, without_silence
from qcompiler.sites.find import Linear, NormGroup
from qcompiler.statistics import ChannelFolds, ChannelMoments, ChannelRange, Statistic, StatisticsStore

GRID = tuple(np.arange(0, 21) / 20)
INSTEAD = "insert_mul: true multiplies explicitly"
HELD = 1 << 20  # bytes of a weight that is kept while the search looks at it
UNSEEN = 4.0  # new text differs more from the calibration text than its stretches do: docs/decisions/0003


@options(frozen=True, config=OPTIONS)
class SmoothQuant(Pass):
    name: ClassVar[str] = "smooth-quant"
    kind: ClassVar[Kind] = "exact"

    alpha: Literal["auto"] | float = "auto"
    """How much of the difficulty goes to the weights: 0 … 1, or `auto` to choose it per group."""
    insert_mul: bool = False
    """Put an explicit Mul where no norm can take the division (costs one elementwise pass per group at run time)."""
    activation_bits: int = Field(default=8, ge=2, le=16)
    """Bits of the activations that `auto` expects."""
    weight_bits: int = Field(default=8, ge=2, le=16)
    """Bits of the weights that `auto` expects."""

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise SchemeError(f"smooth-quant.alpha is a number from 0 to 1, or auto, not {self.alpha}.")

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        wanted = [group for group, obstacle in self._groups(model) if obstacle is None]
        return [Tap(str(g.output.name), statistic) for g in wanted for statistic in _Measured.STATISTICS]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        for group, obstacle in self._groups(model):
            if obstacle is not None:
                changes.skipped.extend(Skipped(linear.name, obstacle) for linear in self.selected(group.linears))
                continue
            value = str(group.output.name)
            measured = _Measured.at(value, statistics)
            alpha, scale = self._choose(measured, [_Weight(linear) for linear in group.linears])
            if not folding.fits(group, scale):
                changes.skipped.extend(Skipped(linear.name, folding.NO_ROOM) for linear in group.linears)
                continue
            if alpha is None:
                detail = "left as it is: no smoothing has the smallest expected error"
                changes.changed.extend(Changed(linear.name, detail=detail) for linear in group.linears)
                continue
            folding.rescale(group, scale, rw, changes)
            before, after = np.max(measured.magnitude), np.max(measured.magnitude / scale)
            detail = f"alpha {alpha:.2f}, input absmax {before:.3g} → {after:.3g}, {folding.place(group)}"
            changes.changed.extend(Changed(linear.name, detail=detail) for linear in group.linears)
        return changes

    def _groups(self, model: ir.Model) -> list[tuple[NormGroup, str | None]]:
        # As in the paper, attention's o_proj is left alone.
        return folding.rescalable(model, self, insert_mul=self.insert_mul, instead=INSTEAD, products_only=True)

    def _choose(self, measured: _Measured, weights: Sequence[_Weight]) -> tuple[float | None, np.ndarray]:
        """The chosen α and scales [K]; α is None where leaving the group alone is expected to be best."""
        peak = np.max([weight.row_peak for weight in weights], axis=0)
        if self.alpha != "auto":
            return float(self.alpha), _scales(measured.magnitude, peak, float(self.alpha))
        choices: list[float | None] = [None, *GRID]
        errors = self._expected_errors(measured, weights, peak, choices)
        best = choices[int(np.argmin(errors))]
        return best, _scales(measured.magnitude, peak, best)

    def _expected_errors(
        self, measured: _Measured, weights: Sequence[_Weight], peak: np.ndarray, choices: Sequence[float | None]
    ) -> list[float]:
        """For each α: Σ over the layers of E‖y - ŷ‖² / E‖y‖², with rounding errors independent and uniform.

        The means are over tokens, each weighed by 1 / ‖x‖²: of relative errors, as nearly as the measured moments tell.
        A rounding's error has the variance step²/12. The activation's meets the scaled weight, Σ_j (s_j² Δx²/12 +
        4 c_j) ‖W_j‖², and the weight's meets the scaled activation, Σ_j E[x_j²]/s_j² Σ_n Δw_n²/12 with
        Δw_n = 2 max_j |s_j W_jn| / (2^b - 1). c_j is what new data is expected to lose by clipping (see
        `_Measured.clipped`): without it all channels would be made equally loud on the calibration data, and the
        loudest of the next text would not fit.
        """
        scales = [_scales(measured.magnitude, peak, alpha) for alpha in choices]
        column_peaks = [weight.column_peaks(scales) for weight in weights]
        errors = []
        for index, (alpha, scale) in enumerate(zip(choices, scales, strict=True)):
            step = measured.span(scale) / (2**self.activation_bits - 1)
            activation_error = scale**2 * step**2 / 12 + UNSEEN * measured.clipped(peak, alpha)
            energy = measured.squares / scale**2
            total = 0.0
            for weight, column_peak in zip(weights, column_peaks, strict=True):
                from_activation = float(np.sum(activation_error * weight.row_energy))
                steps = 2 * column_peak[index] / (2**self.weight_bits - 1)
                from_weight = float(np.sum(energy)) * float(np.sum(steps**2)) / 12
                signal = float(np.sum(measured.squares * weight.row_energy))
                total += (from_activation + from_weight) / signal if signal > 0 else 0.0
            errors.append(total)
        return errors


@dataclass(frozen=True)
class _Measured:
    """What calibration saw of a value with K channels."""

    STATISTICS: ClassVar[tuple[Statistic, ...]] = (ChannelRange(), ChannelMoments(per_token=True), ChannelFolds())

    lo: np.ndarray
    hi: np.ndarray
    squares: np.ndarray
    """E[x²], each token weighing the less the louder it is."""
    fold_lo: np.ndarray
    """The same as `lo`, of stretches of the data apart [F, K]."""
    fold_hi: np.ndarray
    rows: int

    @staticmethod
    def at(value: str, statistics: StatisticsStore) -> _Measured:
        lo, hi = statistics.get(value, ChannelRange()).result()
        moments = statistics.get(value, ChannelMoments(per_token=True))
        fold_lo, fold_hi = statistics.get(value, ChannelFolds()).result()
        lo, hi, fold_lo, fold_hi = (side.astype(np.float64) for side in (lo, hi, fold_lo, fold_hi))
        return _Measured(lo, hi, moments.result(), fold_lo, fold_hi, moments.count)

    @property
    def magnitude(self) -> np.ndarray:
        larger: np.ndarray = np.maximum(-self.lo, self.hi)
        return larger

    def span(self, scale: np.ndarray) -> float:
        """The range that one scale for the whole of x / s has to cover, 0 included."""
        return max(float(np.max(self.hi / scale)), 0.0) - min(float(np.min(self.lo / scale)), 0.0)

    def clipped(self, peak: np.ndarray, alpha: float | None) -> np.ndarray:
        """Mean square [K] that a stretch of the data loses when scales and range come from all others.

        Of each channel the largest value alone is known, and counts as the only one of its stretch that is clipped. Its
        token weighs the less, the more of all energy the value has.
        """
        usual = float(self.squares.sum())
        lost = np.zeros_like(peak)
        for fold in range(len(self.fold_lo)):
            others = np.arange(len(self.fold_lo)) != fold
            if not others.any():
                break
            below, above = self.fold_lo[others].min(axis=0), self.fold_hi[others].max(axis=0)
            scale = _scales(np.maximum(-below, above), peak, alpha)
            lo, hi = min(float(np.min(below / scale)), 0.0), max(float(np.max(above / scale)), 0.0)
            beyond = np.maximum(self.fold_hi[fold] - hi * scale, lo * scale - self.fold_lo[fold])
            edge = np.maximum(np.square(self.fold_hi[fold]), np.square(self.fold_lo[fold]))
            weight = usual / np.maximum(edge, usual) if usual > 0 else 1.0
            lost += weight * np.square(np.maximum(beyond, 0.0)) / self.rows
        return lost


class _Weight:
    """What the search needs of a weight [K, N], read a slice at a time so that no float64 copy of it is ever made."""

    def __init__(self, linear: Linear) -> None:
        tensor = constant(linear.weight)
        assert tensor is not None  # a Linear's weight is a constant
        small = tensor.nbytes <= HELD
        self.tensor = ir.Tensor(read(tensor, np.array), dtype=tensor.dtype) if small else tensor
        self.transposed = linear.transposed
        self.row_peak, self.row_energy = self._per_row()

    def _per_row(self) -> tuple[np.ndarray, np.ndarray]:
        def compute(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = data.T if self.transposed else data
            peak, energy = np.zeros(rows.shape[0]), np.zeros(rows.shape[0])
            for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
                part = rows[:, start : start + COLUMNS_AT_ONCE].astype(np.float32)
                np.maximum(peak, np.abs(part).max(axis=1), out=peak)
                energy += np.square(part, dtype=np.float64).sum(axis=1)
            return peak, energy

        return read(self.tensor, compute)

    def column_peaks(self, scales: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each of the scales, max_j |s_j W_jn| for every output channel n."""

        def compute(data: np.ndarray) -> list[np.ndarray]:
            rows = data.T if self.transposed else data
            found: list[list[np.ndarray]] = [[] for _ in scales]
            for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
                part = rows[:, start : start + COLUMNS_AT_ONCE].astype(np.float32)
                for peaks, scale in zip(found, scales, strict=True):
                    peaks.append(np.abs(part * scale.astype(np.float32)[:, None]).max(axis=0))
            return [np.concatenate(peaks) for peaks in found]

        return read(self.tensor, compute)


def _scales(magnitude: np.ndarray, peak: np.ndarray, alpha: float | None) -> np.ndarray:
    """Equation 4; ones where there is no α."""
    if alpha is None:
        return np.ones_like(peak)
    return without_silence(magnitude) ** alpha / without_silence(peak) ** (1 - alpha)
