"""Attention over a quantized cache in float64, from the definitions: codes are made once and read at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LEVELS = {"int8": (-128, 127), "int4": (-8, 7)}
LARGEST = {"int8": 127.0, "int4": 7.5}  # what the largest number becomes with a static scale


def static_scale(calibrated: np.ndarray, format: str, granularity: str) -> np.ndarray:
    """From keys or values [batch, heads, positions, channels]: one number, or [heads, 1, channels]."""
    magnitudes = np.abs(calibrated.astype(np.float64))
    largest = magnitudes.max() if granularity == "tensor" else magnitudes.max((0, 2))[:, None]
    return np.where(largest == 0, 1.0, largest / LARGEST[format])


def center_and_reach(calibrated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle and half the width of what each channel of each head was seen to be, [heads, 1, channels]."""
    high, low = calibrated.astype(np.float64).max((0, 2)), calibrated.astype(np.float64).min((0, 2))
    return ((high + low) / 2)[:, None], ((high - low) / 2)[:, None]


@dataclass
class Cache:
    """Keys or values as codes. Without `scale` each row gets its own, rounded to `scale_dtype`."""

    format: str
    scale: np.ndarray | None = None
    symmetric: bool = True
    scale_dtype: str = "float16"
    center: np.ndarray = field(default_factory=lambda: np.zeros(()))
    reach: np.ndarray = field(default_factory=lambda: np.ones(()))

    def encode(self, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scale, offset."""
        low, high = LEVELS[self.format]
        numbers = (new.astype(np.float64) - self.center) / self.reach
        offset = np.zeros(())
        if self.scale is not None:
            scale = self.scale
        elif self.symmetric:
            scale = self._rounded(np.maximum(np.abs(numbers).max(-1, keepdims=True) / high, 2.0**-24))
        else:
            top, bottom = numbers.max(-1, keepdims=True), numbers.min(-1, keepdims=True)
            scale = self._rounded(np.maximum((top - bottom) / (high - low), 2.0**-24))
            offset = self._rounded(bottom - low * scale)
        return np.clip(np.rint((numbers - offset) / scale), low, high), scale, offset

    def decode(self, codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        return np.asarray((codes * scale + offset) * self.reach + self.center)

    def _rounded(self, numbers: np.ndarray) -> np.ndarray:
        return numbers.astype(self.scale_dtype).astype(np.float64)

    def stored(self, new: np.ndarray) -> np.ndarray:
        """What is read back."""
        return self.decode(*self.encode(new))


def unpacked(bytes: np.ndarray) -> np.ndarray:
    """Codes from uint8 [..., channels / 2]: low halves are the even channels."""
    return np.stack([bytes % 16, bytes // 16], -1).reshape(*bytes.shape[:-1], -1).astype(np.int64) - 8


def rotate(x: np.ndarray, positions: np.ndarray, base: float = 100.0) -> np.ndarray:
    """Rotary positions on [batch, heads, positions, channels]; channels i and i + half a head are a pair."""
    count = x.shape[-1] // 2
    angles = positions[:, None, :, None] * base ** -(np.arange(count) / count)
    first, second = x[..., :count], x[..., count:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """softmax(q kᵀ / √d + bias) v; a head of keys and values serves as many heads of queries as there are for it."""
    repeat = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeat, 1), np.repeat(v, repeat, 1)
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)
