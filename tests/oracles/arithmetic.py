"""Quantization in float64, one number at a time, from the definitions of the ONNX operators and the papers."""

from __future__ import annotations

import math

import numpy as np

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def half_even(value: float) -> int:
    below = math.floor(value)
    rest = value - below
    if rest != 0.5:
        return below + (rest > 0.5)
    return below + below % 2


def quantize(x: float, scale: float, zero_point: int, qmin: int, qmax: int) -> int:
    """QuantizeLinear of one number."""
    return max(qmin, min(qmax, half_even(x / scale) + zero_point))


def float_values(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """Every value ≥ 0 of a small float format, by its definition (IEEE-like, subnormals at exponent 0)."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
            if value <= largest:
                values.append(value)
    return values


def nearest_float(ratio: float, values: list[float]) -> float:
    """The nearest of `values` with the sign of `ratio`, a tie to the even mantissa (the even place in the list)."""
    place = min(range(len(values)), key=lambda i: (abs(values[i] - abs(ratio)), i % 2))
    return math.copysign(values[place], ratio)


def nearest_nf4(ratio: float) -> int:
    """The nearest entry of the table; a tie to the lower one."""
    return min(range(16), key=lambda i: (abs(NF4[i] - ratio), i))


def asymmetric_parameters(lo: float, hi: float, qmin: int, qmax: int) -> tuple[float, int]:
    """Scale and zero point that map [min(lo, 0), max(hi, 0)] onto [qmin, qmax] (Jacob et al. 2018, section 2.1)."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if lo == hi:
        return 1.0, qmin
    scale = float(np.float32((hi - lo) / (qmax - qmin)))
    return scale, max(qmin, min(qmax, half_even(qmin - lo / scale)))


def grid_search(values: list[float], divisor: float, qmin: int, qmax: int) -> float:
    """The least squared error of symmetric rounding over ranges of 20 %, 21 % … 100 % of the largest magnitude."""
    largest = max(abs(v) for v in values)

    def error(scale: float) -> float:
        return sum((quantize(v, scale, 0, qmin, qmax) * scale - v) ** 2 for v in values)

    return min(error(largest * percent / 100 / divisor) for percent in range(20, 101))
