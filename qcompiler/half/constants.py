"""Float32 constants in 16 bits: how well they fit, and the constants themselves, computed when they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import slices
from qcompiler.graph.lazy import derived, read

MASK = -1e8
"""What is below hides something: attention's masks hold -1e9, -3.4e38 or -inf."""
FITTING = 2.0**-8
"""‖c - rounded‖ / ‖c‖ up to which a constant may be rounded; numbers that do not underflow stay below 2⁻⁹."""


def largest(dtype: ir.DataType) -> float:
    """The largest finite number of a 16-bit type."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)


def mask_value(dtype: ir.DataType) -> float:
    """What stands for "hidden" where a mask is added: half of the largest number, so that the sum stays finite.

    A row that is hidden whole would else be -inf everywhere, and its softmax NaN.
    """
    return largest(dtype) / 2


@dataclass(frozen=True)
class Fit:
    """How a float32 constant goes into 16 bits."""

    largest: float
    """The largest finite magnitude, numbers below `MASK` left out."""
    masks: bool
    """Whether there are numbers below `MASK`."""
    error: float
    """‖c - rounded‖ / ‖c‖ of the numbers within the range."""


def fit(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Fit:
    """Read a constant once, a part at a time."""
    limit = largest(dtype)

    def examined(data: np.ndarray) -> Fit:
        top, masks, lost, total = 0.0, False, 0.0, 0.0
        if not data.size:
            return Fit(top, masks, lost)
        rows = data.reshape(1, -1) if data.ndim < 2 else data.reshape(-1, data.shape[-1])
        for part in slices(rows.shape):
            numbers = rows[part].astype(np.float64)
            hidden = numbers < MASK
            masks = masks or bool(hidden.any())
            numbers = numbers[np.isfinite(numbers) & ~hidden]
            top = max(top, float(np.abs(numbers).max(initial=0.0)))
            numbers = numbers[np.abs(numbers) <= limit]
            lost += float(np.square(numbers.astype(dtype.numpy()).astype(np.float64) - numbers).sum())
            total += float(np.square(numbers).sum())
        return Fit(top, masks, math.sqrt(lost / total) if total else 0.0)

    return read(tensor, examined)


def rounded(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """The constant in 16 bits, numbers that hide something as `mask_value`; -inf stays -inf."""
    hidden = -mask_value(dtype)

    def convert(data: np.ndarray) -> np.ndarray:
        result = np.empty(data.shape, dtype.numpy())
        if not data.size:
            return result
        whole, flat = data.reshape(-1, data.shape[-1]), result.reshape(-1, data.shape[-1])
        for part in slices(whole.shape):
            flat[part] = _rounded(whole[part], hidden, result.dtype)
        return result

    if not len(tensor.shape):
        return ir.tensor(_rounded(tensor.numpy(), hidden, dtype.numpy()), name=name)
    return derived(tensor, convert, dtype, tuple(int(size) for size in tensor.shape.numpy()), name)


def _rounded(numbers: np.ndarray, hidden: float, dtype: np.dtype) -> np.ndarray:
    finite_mask = (numbers < min(MASK, hidden)) & np.isfinite(numbers)
    return np.asarray(np.where(finite_mask, hidden, numbers).astype(dtype))
