"""com.microsoft GroupQueryAttention with a quantized cache, in float64, from the operator's contract."""

from __future__ import annotations

import numpy as np


def rotate(x: np.ndarray, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [heads, tokens, D] turned by its positions; channel i goes with channel i + D / 2."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    c, s = cos[positions], sin[positions]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def to_codes(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """x [heads, tokens, D] → codes, round half to even, saturated; scale [1] or [heads, 1, D]."""
    low = -(2 ** (bits - 1))
    return np.asarray(np.clip(np.rint(x / scale), low, -low - 1), np.int64)


def packed(codes: np.ndarray) -> np.ndarray:
    """int4 codes as the operator stores them: 8 + code, an even channel in the low half of the byte."""
    shifted = (codes + 8).astype(np.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


class Row:
    """One sequence of a batch: its cache, as codes, grows with every call."""

    def __init__(self, bits: int, k_scale: np.ndarray, v_scale: np.ndarray, scale: float) -> None:
        self.bits, self.scales, self.scale = bits, (k_scale.astype(np.float64), v_scale.astype(np.float64)), scale
        self.codes: list[np.ndarray] | None = None

    def step(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """query [heads, tokens, D], key and value [kv heads, tokens, D], rotated → result [heads, tokens, D]."""
        new = [to_codes(x, scale, self.bits) for x, scale in zip((key, value), self.scales, strict=True)]
        old = self.codes or [codes[:, :0] for codes in new]
        self.codes = [np.concatenate(both, axis=1) for both in zip(old, new, strict=True)]
        keys, values = (codes * scale for codes, scale in zip(self.codes, self.scales, strict=True))
        group, past = query.shape[0] // key.shape[0], old[0].shape[1]
        result = np.zeros(query.shape)
        for head in range(query.shape[0]):
            for token in range(query.shape[1]):
                seen = past + token + 1
                scores = self.scale * keys[head // group, :seen] @ query[head, token]
                weights = np.exp(scores - scores.max())
                result[head, token] = weights @ values[head // group, :seen] / weights.sum()
        return result
