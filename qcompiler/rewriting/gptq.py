"""GPTQ's equations (Frantar et al. 2022), without ONNX: the factor of a Hessian, and the codes of a weight.

    factor = factorise(H, damping=0.01, act_order=False)        once for all layers that read a value
    quantized = solve(weight, factor, Scheme("int4", PerGroup(128)), channel_axis=1)

`passes/gptq.py` says what is computed. A weight is worked on transposed, [K, N], so that a column of the paper lies in
one piece of memory. What a column owes to those before it in its panel of 32 is gathered when its turn comes, by one
product of a matrix and a vector; panels and blocks pass their errors on by products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError, RecipeError
from qcompiler.formats.arithmetic import Array, Quantized, scale_and_zero_point
from qcompiler.formats.scheme import PerGroup, PerTensor, Scheme
from qcompiler.formats.search import Search as PlainSearch
from qcompiler.formats.search import laid_out, least_error_range, quantize_weight

if TYPE_CHECKING:
    from torch import Tensor

Search = Literal["minmax", "mse", "weighted"]

BLOCK_COLUMNS = 128
PANEL_COLUMNS = 32
SLICE_ELEMENTS = 1 << 22  # of a weight that are worked on at once: 16 MiB
RAISES = (1.0, 10.0, 100.0, 1000.0)  # of the damping, where H is singular
NOISE = 1e-7  # H is measured in float32: what is smaller than this part of its diagonal says nothing


def plain(search: Search) -> PlainSearch:
    """The nearest search that needs no Hessian."""
    return "mse" if search == "weighted" else search


def check_device(device: str) -> None:
    """Raise RecipeError where there is no torch, or none that computes on the device."""
    if find_spec("torch") is None:
        raise RecipeError("gptq computes with torch, which is not installed: pip install 'onnx-qcompiler[torch]'")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RecipeError("gptq.device: torch finds no CUDA device; take cpu, or install torch with CUDA")


@dataclass(frozen=True, eq=False)
class CholeskyFactor:
    """What all layers that read one value share."""

    upper: Tensor
    """U [K, K], float32, with H⁻¹ = Uᵀ U; rows and columns in the order in which they are rounded."""
    order: npt.NDArray[np.intp] | None
    """The input features in that order; None where it is their own."""
    diagonal: Tensor
    """Of the damped H [K], float32; in the features' own order."""
    damping: float
    """What was added to the diagonal, in units of its mean."""


def factorise(hessian: Array, *, damping: float, act_order: bool, device: str = "cpu") -> CholeskyFactor | None:
    """The factor of H [K, K]; None where H is singular even with 1000 times the damping.

    Inputs that were never active have zeros in H, so that their columns neither pass an error on nor take one. H is
    factorised in float64, as its eigenvalues may be K / damping apart; 20 · K² bytes are needed at the most.
    """
    torch = _torch(device)
    H = torch.from_numpy(hessian).to(device)
    diagonal = H.diagonal().double()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    order = np.argsort(-diagonal.cpu().numpy(), kind="stable") if act_order else None
    # With J the reversal, J H J = L Lᵀ gives H⁻¹ = Uᵀ U for U = J L⁻¹ J: the inverse of H is never needed.
    forwards = np.arange(len(hessian)) if order is None else order
    backwards = torch.from_numpy(forwards[::-1].copy()).to(device)
    for times in RAISES:
        used = damping * times if damping > 0 or times == 1 else 1e-5 * times
        damped = torch.where(alive, diagonal + used * mean, mean)
        A = H[backwards[:, None], backwards].double()
        A.diagonal().copy_(damped[backwards])
        L, info = torch.linalg.cholesky_ex(A)
        del A
        least = float(L.diagonal().square().min())
        if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()) and least > NOISE * mean:
            inverse = L.float()
            del L
            _invert_lower(inverse)
            return CholeskyFactor(inverse.flip(0, 1), order, damped.float(), used)
    return None


def _torch(device: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise RecipeError("gptq solves its equations in torch, which is not installed: pip install torch.") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("gptq.device: torch sees no CUDA device here; choose cpu.")
    return torch


def _invert_lower(L: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, most of it by products of matrices."""
    import torch

    n = len(L)
    if n <= 256:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return
    A, B, C = L[: n // 2, : n // 2], L[n // 2 :, : n // 2], L[n // 2 :, n // 2 :]
    _invert_lower(A)
    _invert_lower(C)
    B.copy_(-(C @ B) @ A)


def solve(
    weight: Array, factor: CholeskyFactor, scheme: Scheme, *, channel_axis: int, search: Search = "minmax",
    scale_dtype: npt.DTypeLike = np.float32, name: str = "the weight", block_columns: int = BLOCK_COLUMNS,
) -> Quantized:  # fmt: skip
    """The codes that GPTQ finds for a weight, a matrix with its output channels along `channel_axis`.

    `scheme` is of an integer format, per tensor, channel or group. Output channels are worked on in slices, so that
    12 bytes for each element of a slice are needed besides the weight and the codes. Raises `DataError` for NaN and
    infinity. A tensor's only scale is searched without the weights of ``search: weighted``.
    """
    import torch

    rows = np.moveaxis(np.asarray(weight), channel_axis, 0)
    N, K = rows.shape
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else K
    order = np.arange(K) if factor.order is None else factor.order
    group_of = (order // size).tolist()
    beforehand = factor.order is not None or size >= K
    codes = np.empty((K, N), scheme.number_format.dtype)
    grid = _Grid.empty(-(-K // size), N, scheme, search, scale_dtype)
    if isinstance(scheme.granularity, PerTensor):
        one = quantize_weight(
            weight, scheme, channel_axis=channel_axis, search=plain(search), scale_dtype=scale_dtype, name=name
        )
        grid.put(0, one.scale, one.zero_point)
    step = max(64, SLICE_ELEMENTS // K)
    for part in (slice(start, min(start + step, N)) for start in range(0, N, step)):
        T = torch.from_numpy(np.array(rows[part].T, np.float32, order="C")).to(factor.upper.device)
        if not bool(torch.isfinite(T).all()):
            raise DataError(f"{name} contains NaN or infinity: repair it before it is quantized.")
        here = grid.of(part)
        if beforehand and not isinstance(scheme.granularity, PerTensor):
            for group, start in enumerate(range(0, K, size)):
                here.choose(group, T[start : start + size], factor.diagonal[start : start + size])
        if factor.order is not None:
            T = T[torch.from_numpy(order).to(T.device)]
        for block, found in _blocks(T, factor, here, group_of, None if beforehand else size, block_columns):
            codes[order[block], part] = found
    scale, zero_point, axis, block_size = laid_out(*grid.by_channel(), scheme.granularity, channel_axis)
    codes = np.ascontiguousarray(codes.T) if channel_axis == 0 else codes
    return Quantized(codes, scale, zero_point, axis, block_size, scheme.format)


def _blocks(
    T: Tensor, factor: CholeskyFactor, grid: _Grid, group_of: list[int], size: int | None, block_columns: int
) -> Iterator[tuple[slice, Array]]:
    """Columns and codes [columns, n] of each block of T [K, n] (a weight's columns lie in its rows), which is used up.

    `group_of` is the group of each column. Scales are chosen here where the `size` of a group is given.
    """
    import torch

    K, n = T.shape
    U = factor.upper
    divisors = U.diagonal().tolist()
    rounded, errors = T.new_empty((2, block_columns, n))
    for start, stop, panels in _cuts(K, size or K, block_columns):
        within = U[start:stop, start:stop].T.contiguous()
        R, E = rounded[: stop - start], errors[: stop - start]
        for first, end in panels:
            if size is not None and first % size == 0:
                grid.choose(first // size, T[first : first + size], factor.diagonal[first : first + size])
            a = first - start
            for i in range(first, end):
                w, r, e, b = T[i], R[i - start], E[i - start], i - start
                if b > a:
                    w.addmv_(E[a:b].T, within[b, a:b], alpha=-1)  # w_i -= Σ_j e_j U_ji
                step = grid.step(group_of[i], T)
                torch.addcmul(w, step.round(w, r), step.scale, value=-1, out=e).div_(divisors[i])
            if end < stop:
                T[end:stop].addmm_(U[first:end, end:stop].T, E[a : end - start], alpha=-1)
        if stop < K:
            T[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
        yield slice(start, stop), grid.codes(R, group_of[start:stop])


def _cuts(K: int, size: int, block_columns: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Blocks (start, stop, panels) of K columns, such that all errors reach a group before its scales are chosen.

    A group lies in one block or begins with one; panels do not go beyond a group.
    """
    whole = max(size, block_columns // size * size)
    for begin in range(0, K, whole):
        for start in range(begin, min(begin + whole, K), block_columns):
            stop = min(start + block_columns, begin + whole, K)
            panels = [
                (first, min(first + PANEL_COLUMNS, group + size, stop))
                for group in range(start, stop, size)
                for first in range(group, min(group + size, stop), PANEL_COLUMNS)
            ]
            yield start, stop, panels


@dataclass(frozen=True, eq=False)
class _Grid:
    """Scales and zero points [groups, N] of output channels, as numbers and as tensors."""

    scheme: Scheme
    search: Search
    scale: Array
    zero_point: Array | None
    tensors: dict[int, _Step] = field(default_factory=dict)

    @staticmethod
    def empty(groups: int, channels: int, scheme: Scheme, search: Search, scale_dtype: npt.DTypeLike) -> _Grid:
        number_format = scheme.number_format
        has_zero_point = not scheme.symmetric or number_format.middle != 0
        zero_point = np.empty((groups, channels), number_format.dtype) if has_zero_point else None
        return _Grid(scheme, search, np.empty((groups, channels), scale_dtype), zero_point)

    def of(self, channels: slice) -> _Grid:
        zero_point = None if self.zero_point is None else self.zero_point[:, channels]
        return _Grid(self.scheme, self.search, self.scale[:, channels], zero_point)

    def by_channel(self) -> tuple[Array, Array | None]:
        """Scales and zero points [N, groups]; a tensor's only ones [1, 1]."""
        some = slice(1) if isinstance(self.scheme.granularity, PerTensor) else slice(None)
        return self.scale.T[some], None if self.zero_point is None else self.zero_point.T[some]

    def choose(self, group: int, columns: Tensor, weights: Tensor) -> None:
        """The scales of one group for its columns [k, N]; an error in column i counts `weights`[i] times."""
        import torch

        buffer = torch.empty_like(columns)

        def as_array(vector: Tensor) -> Array:
            found: Array = vector.double().cpu().numpy()
            return found

        def error(lo: Array, hi: Array) -> Array:
            step = self._step(*self._parameters(lo, hi), columns)
            step.round(columns, buffer).mul_(step.scale).sub_(columns).square_()
            total = weights @ buffer if self.search == "weighted" else buffer.sum(0)
            return as_array(total)

        lo, hi = as_array(columns.amin(0).clamp_(max=0)), as_array(columns.amax(0).clamp_(min=0))
        if self.search != "minmax":
            lo, hi = least_error_range(lo, hi, error)
        self.put(group, *self._parameters(lo, hi))

    def put(self, group: int, scale: Array, zero_point: Array | None) -> None:
        self.scale[group] = scale
        if self.zero_point is not None and zero_point is not None:
            self.zero_point[group] = zero_point

    def step(self, group: int, like: Tensor) -> _Step:
        """The scales of a group as tensors, on the device of `like`; they must have been chosen."""
        if group not in self.tensors:
            zero_point = None if self.zero_point is None else self.zero_point[group]
            self.tensors[group] = self._step(self.scale[group], zero_point, like)
        return self.tensors[group]

    def codes(self, rounded: Tensor, group_of: list[int]) -> Array:
        """The codes [k, N] of numbers that were rounded, each in its group; these are counted from the zero points."""
        found: Array = rounded.cpu().numpy()
        if self.zero_point is not None:
            found = found + self.zero_point[group_of]
        return found.astype(self.scheme.number_format.dtype)

    def _parameters(self, lo: Array, hi: Array) -> tuple[Array, Array | None]:
        return scale_and_zero_point(lo, hi, self.scheme, self.scale.dtype, either_sign=self.search != "minmax")

    def _step(self, scale: Array, zero_point: Array | None, like: Tensor) -> _Step:
        import torch

        number_format = self.scheme.number_format
        steps = torch.from_numpy(scale.astype(np.float32)).to(like.device)
        if self.scheme.symmetric or zero_point is None:
            middle = number_format.middle
            return _Step(steps, number_format.qmin - middle, number_format.qmax - middle)
        zeros = torch.from_numpy(zero_point.astype(np.float32)).to(like.device)
        return _Step(steps, number_format.qmin - zeros, number_format.qmax - zeros)


@dataclass(frozen=True, eq=False)
class _Step:
    """The scales [N] of a group, and its least and largest code, counted from the zero point (tensors or numbers)."""

    scale: Tensor
    least: Any
    largest: Any

    def round(self, x: Tensor, out: Tensor) -> Tensor:
        """saturate(round(x / scale)): the arithmetic of `qcompiler.formats.arithmetic`, zero points left out."""
        import torch

        torch.div(x, self.scale, out=out)
        torch.clamp(out.round_(), self.least, self.largest, out=out)
        return out
