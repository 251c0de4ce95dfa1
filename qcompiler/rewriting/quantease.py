"""Improves the codes and scales of a quantized weight, one input feature after the other, without ONNX.

    quantized = refine(weight, quantized, hessian, scheme, channel_axis=1, damping=0.01, sweeps=4)

GPTQ rounds every column once, and the last columns find nobody who could make up for their error. Coordinate descent
goes over the columns again. With D = W - Ŵ and all other columns fixed, tr(D H Dᵀ) is least where column j becomes

    ŵ_j ← round(ŵ_j + (D H)_j / H_jj)

to its grid. Source: Behdin et al. 2023, "QuantEase", section 3 and algorithm 1, started from GPTQ's codes instead of
float weights. After the columns of a group its scale s, codes c (counted from the zero point) and the other groups
fixed, has a least-squares solution too: s ← s + Σ_j c_j (D H)_j / (c H_g cᵀ), for each output channel. No step makes
the error larger, but for the rounding of a scale to its type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcompiler.formats.arithmetic import Array, Quantized
from qcompiler.formats.scheme import PerGroup, PerTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS_AT_ONCE = 128
ELEMENTS_AT_ONCE = 1 << 21  # of a weight, or
CHANNELS_AT_ONCE = 64  # where these are more
LARGEST_CHANGE = 2.0  # of a scale in one step: a larger one is the work of a nearly singular Hessian


def refine(
    weight: Array, quantized: Quantized, hessian: Array, scheme: Scheme, *, channel_axis: int, damping: float,
    sweeps: int, device: str = "cpu",
) -> Quantized:  # fmt: skip
    """Better codes and scales for the matrix `weight`, whose output channels lie along `channel_axis`.

    `hessian` is E[x xᵀ] [K, K], and `damping` is added to its diagonal in units of the mean, as in GPTQ. Inputs that
    were never active keep their codes. A tensor's only scale stays as it is.
    """
    import torch

    H = torch.from_numpy(hessian).to(device, torch.float32, copy=True)
    diagonal = H.diagonal()
    alive = diagonal > 0
    if not bool(alive.any()):
        return quantized
    diagonal += damping * diagonal[alive].mean()
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else len(H)
    rows = np.moveaxis(np.asarray(weight), channel_axis, 0)
    codes = np.moveaxis(quantized.codes, channel_axis, 0).copy()
    scale, zero_point = _by_channel(quantized.scale, channel_axis), None
    if quantized.zero_point is not None:
        zero_point = _by_channel(quantized.zero_point, channel_axis)
    one = isinstance(scheme.granularity, PerTensor)
    step = max(CHANNELS_AT_ONCE, ELEMENTS_AT_ONCE // len(H))
    for part in (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)):
        mine = slice(None) if one else part
        zeros = None if zero_point is None else _tensor(zero_point[mine].T, H)
        state = _State(
            _tensor(rows[part].T, H), _tensor(codes[part].T, H), _tensor(scale[mine].T, H), zeros, H, size, scheme
        )
        for _ in range(sweeps):
            for group in range(-(-len(H) // size)):
                state.round_columns(group, alive)
                if not one:
                    state.fit_scale(group, scale.dtype)
        codes[part] = state.stored_codes().T
        if not one:
            scale[part] = state.scale.T.cpu().numpy()
    return replace(
        quantized, codes=np.ascontiguousarray(np.moveaxis(codes, 0, channel_axis)),
        scale=_laid_out(scale, quantized.scale, channel_axis),
    )  # fmt: skip


class _State:
    """A slice of a weight: all matrices are [K, n], scales and zero points [groups, n or 1]."""

    def __init__(
        self, W: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor | None, H: Tensor, size: int, scheme: Scheme
    ) -> None:
        number_format = scheme.number_format
        self.H, self.size, self.scale = H, size, scale
        self.zeros = scale.new_zeros(scale.shape) if zeros is None else zeros
        self.least, self.largest = number_format.qmin - self.zeros, number_format.qmax - self.zeros
        self.dtype = number_format.dtype
        self.codes = codes  # counted from the zero point from here on
        for group in range(len(scale)):
            self.codes[self._columns(group)] -= self.zeros[group]
        self.D = W
        for group in range(len(scale)):
            self.D[self._columns(group)] -= self.codes[self._columns(group)] * self.scale[group]

    def _columns(self, group: int) -> slice:
        return slice(group * self.size, min((group + 1) * self.size, len(self.H)))

    def round_columns(self, group: int, alive: Tensor) -> None:
        """One step of coordinate descent for every column of a group."""
        import torch

        scale, least, largest = self.scale[group], self.least[group], self.largest[group]
        for block in _blocks(self._columns(group)):
            gradient = self.H[block] @ self.D  # of the columns of the block, as if none of them had changed
            within = self.H[block, block]
            changes = torch.zeros_like(gradient)
            for i, column in enumerate(range(block.start, block.stop)):
                if not bool(alive[column]):
                    continue
                g = gradient[i]
                if i:
                    g = g.addmv(changes[:i].T, within[i, :i], alpha=-1)
                before = self.codes[column]
                after = before + g.div(within[i, i]).div_(scale)
                after = torch.minimum(torch.maximum(after.round_(), least), largest)
                changes[i] = (after - before) * scale
                self.codes[column] = after
            self.D[block] -= changes

    def fit_scale(self, group: int, dtype: npt.DTypeLike) -> None:
        """The scale of a group with the least error for the codes as they are."""
        import torch

        columns = self._columns(group)
        codes, scale = self.codes[columns], self.scale[group]
        numerator = (codes * (self.H[columns] @ self.D)).sum(0)
        denominator = (codes * (self.H[columns, columns] @ codes)).sum(0)
        ratio = 1 + numerator / (denominator * scale)
        wanted = (scale * ratio).cpu().numpy().astype(dtype).astype(np.float32)
        sane = (denominator > 0) & (ratio < LARGEST_CHANGE) & (ratio > 1 / LARGEST_CHANGE)
        new = torch.where(sane, torch.from_numpy(wanted).to(scale.device), scale)
        self.D[columns] -= codes * (new - scale)
        self.scale[group] = new

    def stored_codes(self) -> Array:
        for group in range(len(self.scale)):
            self.codes[self._columns(group)] += self.zeros[group]
        found: Array = self.codes.cpu().numpy().astype(self.dtype)
        return found


def _blocks(columns: slice) -> Iterator[slice]:
    for start in range(columns.start, columns.stop, COLUMNS_AT_ONCE):
        yield slice(start, min(start + COLUMNS_AT_ONCE, columns.stop))


def _tensor(array: Array, like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(np.array(array, np.float32, order="C")).to(like.device)


def _by_channel(parameter: Array, channel_axis: int) -> Array:
    """Scales or zero points as [N, groups]; a tensor's only one as [1, 1]."""
    if parameter.ndim == 2:
        return np.moveaxis(parameter, channel_axis, 0).copy()
    return parameter.reshape(parameter.size, 1).copy()


def _laid_out(by_channel: Array, like: Array, channel_axis: int) -> Array:
    """The inverse of `_by_channel`."""
    if like.ndim == 2:
        return np.ascontiguousarray(np.moveaxis(by_channel, 0, channel_axis))
    return by_channel.reshape(like.shape)
