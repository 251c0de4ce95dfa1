"""QLoRA's block-wise 4-bit formats in float64, from Dettmers et al. 2023, section 3: one number at a time."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

# The 4-bit float of bitsandbytes: code 0 … 7 in twelfths; with 8 added, the same below zero.
FP4 = [sign * m / 12 for sign in (1, -1) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def normal_float() -> list[float]:
    """Appendix E: quantiles on both sides of zero, of evenly spaced probabilities from 1/2 to an offset, over max."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    numbers = sorted([*positive, 0.0, *negative])
    return [number / max(numbers) for number in numbers]


def double_quantized(scales: list[float]) -> list[float]:
    """The mean taken off, 256 scales a float32 scale of absmax / 127, int8 codes; restored scales are above zero."""
    mean = float(np.float32(np.mean(scales)))
    restored: list[float] = []
    for start in range(0, len(scales), 256):
        centred = [float(np.float32(np.float32(s) - np.float32(mean))) for s in scales[start : start + 256]]
        step = float(np.float32(max(abs(c) for c in centred) / 127)) or 1.0
        for c in centred:
            code = round(c / step)
            restored.append(code * step + mean if code * step + mean > 0 else (code + 1) * step + mean)
    return restored


def restored(rows: np.ndarray, table: list[float], block: int, double: bool) -> np.ndarray:
    """The weight [N, K] as the codes and scales stand for it: blocks run through the flattened rows."""
    flat = [float(w) for w in rows.reshape(-1)]
    blocks = [flat[start : start + block] for start in range(0, len(flat), block)]
    largest = [max(abs(w) for w in part) for part in blocks]
    scales = double_quantized(largest) if double else [s or 1.0 for s in largest]
    out = [min((entry * s for entry in table), key=lambda x: abs(x - w)) for part, s in zip(blocks, scales, strict=True)
           for w in part]  # fmt: skip
    return np.array(out).reshape(rows.shape)
