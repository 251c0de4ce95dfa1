"""int8 weights on which the fast product of every x86 CPU is exact: no sum of two products leaves 16 bits.

See docs/decisions/0001-saturation-safe-int8-weights.md for what goes wrong without it, and for what it costs.
"""

from __future__ import annotations

import numpy as np

from qcompiler.formats.arithmetic import Array, slices

PAIR_LIMIT = 128  # 255 · 128 = 32640 still fits in 16 bits


def saturation_safe_scale(weight: Array, scale: Array, channel_axis: int) -> Array:
    """`scale` [] or [channels], raised where two neighbouring int8 codes could add up to more than 128.

    x86 CPUs without VNNI multiply uint8 by int8 codes with an instruction (vpmaddubsw) that adds the products of inputs
    2i and 2i + 1 in 16 bits and saturates. With |q_2i + q_2i+1| ≤ 128 the sum is at most 255 · 128 and never does, so
    that the fast kernel is exact. `weight` is a matrix; the pairs lie along the axis that is not `channel_axis`.
    """
    rows = np.moveaxis(np.asarray(weight), channel_axis, 0)
    largest = np.empty(rows.shape[0], np.float32)
    for part in slices(rows.shape, 1):
        block = rows[part].astype(np.float32)
        even = block.shape[1] // 2 * 2
        sums = np.abs(block[:, 0:even:2] + block[:, 1:even:2])
        largest[part] = sums.max(axis=1, initial=0.0)
    # Each code may be rounded up by a half, so that codes of values that add up to 127 steps add up to 128 at most.
    needed = largest / (PAIR_LIMIT - 1)
    needed = needed.max(initial=0.0) if np.ndim(scale) == 0 else needed
    raised: Array = np.maximum(scale, needed.astype(np.asarray(scale).dtype))
    return raised


def is_saturation_safe(codes: Array, channel_axis: int) -> bool:
    """Whether no two neighbouring int8 codes add up to more than 128: see `saturation_safe_scale`."""
    rows = np.moveaxis(np.asarray(codes), channel_axis, 0)
    even = rows.shape[1] // 2 * 2
    for part in slices(rows.shape, 1):
        block = rows[part].astype(np.int16)
        if np.abs(block[:, 0:even:2] + block[:, 1:even:2]).max(initial=0) > PAIR_LIMIT:
            return False
    return True
