"""Rounds the constants of linear layers, convolutions and embeddings to a low-bit format (round-to-nearest).

**Before**  y = x W            **After**  y = x · DequantizeLinear(Q, s, z),  Q = clip(round(W / s) + z)

Linear layers and convolutions get their weight through one DequantizeLinear; an embedding gathers codes and scales and
multiplies the few rows it gathered. A constant that several nodes share (tied embeddings) is quantized once and stored
once; a reader that the recipe excludes keeps the float constant.

Scales are those of the largest magnitude (``search: minmax``), or of the shrunken range with the smallest squared error
(``search: mse``), per tensor, per output channel, or per group of input features. ``search: weighted`` needs
calibration data and counts the squared error of a weight times E[x²] of its input, which is what the layer's output
sees of it (the clip search of AWQ, Lin et al. 2023; of correlations between inputs it knows nothing). The rounding is
that of ONNX's QuantizeLinear (to nearest, ties to even). Embeddings always have one scale for each row.

``saturation_safe`` is for recipes that quantize activations as well: on x86 CPUs without VNNI, ONNX Runtime's uint8 ×
int8 kernel adds the products of two neighbouring inputs in 16 bits and saturates without a word. The scale of an output
channel is raised until two neighbouring codes never add up to more than 128 (about 1.3 × on Gaussian weights), and
convolutions are stored as uint8, whose kernel is exact.

``format: binary`` keeps the sign of each weight, and α = mean |W| for each output channel or group, which is the
nearest such matrix (Rastegari et al. 2016, "XNOR-Net", eq. 6; ``search: weighted`` weighs the mean with E[x²]). The
weight is then one node, the function `qcompiler::DequantizeBinary`, which reads 8 signs from each byte. This is a
scheme to train models with: it takes most of its quality from one that was trained in float, and the report says how
much. Linear layers alone can have it.

Skipped: constants in forms that no pass handles (inside If or Loop bodies, batched weights, …), each with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.formats.saturation import saturation_safe_scale
from qcompiler.formats.scheme import Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.functions.binary import DEQUANTIZE, add_binary_function
from qcompiler.functions.binary import FORMAT as BINARY
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changes, Kind, Tap
from qcompiler.rewriting.weights import Reader, WeightConstant, WeightPass
from qcompiler.sites.find import Convolution
from qcompiler.statistics import ChannelMoments, StatisticsStore


@options(frozen=True, config=OPTIONS)
class QuantizeWeights(WeightPass):
    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Kind] = "rounding"

    search: Literal["minmax", "mse", "weighted"] = "minmax"
    """How a range is chosen: the whole one, the one with the least squared error, or with the least weighted error."""
    saturation_safe: bool = False
    """Keep sums of two int8 products within 16 bits (symmetric weights, scales per tensor or channel): see above."""

    def __post_init__(self) -> None:
        WeightPass.__post_init__(self)
        if self.search == "weighted" and self.granularity == "tensor":
            raise SchemeError("quantize-weights.search: weighted needs scales per channel or group, not per tensor.")

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        if self.search != "weighted":
            return ()
        found = self.constants(model, Changes())
        inputs = dict.fromkeys(str(linear.input.name) for constant in found for linear in constant.linears)
        return [Tap(name, ChannelMoments(per_token=True)) for name in inputs]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        constants = self.constants(model, changes)
        if self.format == BINARY and constants:
            add_binary_function(model, DEQUANTIZE)
        for constant in constants:
            quantized = self._quantized(constant, statistics)
            details = _bits_a_weight(constant, quantized) if self.format == BINARY else None
            self.install(constant, quantized, rw, changes, details=details, nearest=True)
        return changes

    def _quantized(self, constant: WeightConstant, statistics: StatisticsStore) -> Quantized:
        axis, scheme = constant.channel_axis, constant.scheme
        safe = self.saturation_safe and bool(constant.linears)
        weighted = self.search == "weighted" and bool(constant.linears)
        importance = _energy(constant, statistics) if weighted else None
        search: Literal["minmax", "mse"] = "minmax" if self.search == "minmax" else "mse"

        def scale_dtype(data: np.ndarray) -> npt.DTypeLike:
            return np.float32 if scheme.format == BINARY else data.dtype

        def choose(data: np.ndarray) -> Quantized:
            found = quantize_weight(
                data, scheme, channel_axis=axis, search=search, importance=importance, scale_dtype=scale_dtype(data),
                name=constant.name,
            )  # fmt: skip
            if safe and scheme.format == "int8" and scheme.symmetric and found.block_size is None:
                return replace(found, scale=saturation_safe_scale(data, found.scale, axis))
            return found

        return read(constant.tensor, choose)

    def scheme_for(self, readers: list[Reader], bits: int | None) -> Scheme:
        scheme = WeightPass.scheme_for(self, readers, bits)
        if self.saturation_safe and scheme.format == "int8" and any(isinstance(site, Convolution) for site in readers):
            return replace(scheme, format="uint8")
        return scheme


def _bits_a_weight(constant: WeightConstant, quantized: Quantized) -> dict[str, str]:
    """What a binary weight takes in the file, for the report."""
    linear = constant.linears[0]
    stored = 8 * -(-linear.in_features // 8) * linear.out_features + 32 * quantized.scale.size
    bits = stored / quantized.codes.size
    return {reader.name: f"{bits:.2f} bits a weight" for reader in constant.readers}


def _energy(constant: WeightConstant, statistics: StatisticsStore) -> np.ndarray:
    """E[x²] of the inputs that meet the constant, all layers together."""
    values = dict.fromkeys(str(linear.input.name) for linear in constant.linears)
    moments = [statistics.get(value, ChannelMoments(per_token=True)) for value in values]
    total = moments[0].fresh()
    for moment in moments:
        total.merge(moment)
    return total.result()
