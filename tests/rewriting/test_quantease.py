"""coordinate_descent: against a float64 oracle that computes every step from nothing, in every layout."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passes.gptq import Gptq
from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.formats.scheme import PerChannel, PerGroup, PerTensor, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.rewriting.gptq import factorise, solve
from qcompiler.rewriting.quantease import refine
from tests.oracles import coordinate_descent as oracle

BOUNDS = {"int3": (-4, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127)}


def problem(N: int, K: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [N, K] and the second moment of inputs that lie near a subspace."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(max(1, K // 4), K))
    X = rng.normal(size=(4 * K, len(directions))) @ directions + 0.3 * rng.normal(size=(4 * K, K))
    return rng.normal(size=(N, K)).astype(np.float32), (X.T @ X / len(X)).astype(np.float32)


def damped(H: np.ndarray, damping: float = 0.01) -> np.ndarray:
    return H.astype(np.float64) + damping * np.mean(np.diag(H)) * np.eye(len(H))


def refined(W: np.ndarray, start: Quantized, H: np.ndarray, scheme: Scheme, axis: int, sweeps: int = 1) -> Quantized:
    return refine(W, start, H, scheme, channel_axis=axis, damping=0.01, sweeps=sweeps)


@pytest.mark.parametrize("format", ["int3", "int4", "uint4"])
@pytest.mark.parametrize("group", [16, 24])
def test_a_sweep_equals_the_oracle(format: str, group: int) -> None:
    W, H = problem(12, 64)
    scheme = Scheme(format, PerGroup(group), symmetric=not format.startswith("u"))
    start = quantize_weight(W, scheme, channel_axis=0)
    zero = np.zeros_like(start.scale) if start.zero_point is None else start.zero_point.astype(np.float64)
    codes, scale = oracle.sweep(W.astype(np.float64), start.codes, start.scale, zero, damped(H), BOUNDS[format], group)

    found = refined(W, start, H, scheme, 0)

    # A tie may fall to either side, as the oracle computes in float64: nearly all codes are equal, the error is.
    assert np.mean(found.codes == codes) > 0.99
    np.testing.assert_allclose(found.scale, scale, rtol=2e-2)
    by_oracle = (codes - zero.repeat(group, 1)[:, :64]) * scale.repeat(group, 1)[:, :64]
    wanted = oracle.error(W, by_oracle, damped(H)).sum()
    assert oracle.error(W, found.dequantize(), damped(H)).sum() == pytest.approx(wanted, rel=1e-2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    N=st.integers(1, 20), K=st.integers(2, 150), group=st.integers(2, 160), format=st.sampled_from(sorted(BOUNDS)),
    axis=st.sampled_from([0, 1]), seed=st.integers(0, 100),
)  # fmt: skip
def test_no_channel_gets_worse(N: int, K: int, group: int, format: str, axis: int, seed: int) -> None:
    W, H = problem(N, K, seed)
    scheme = Scheme(format, PerGroup(group), symmetric=not format.startswith("u"))
    turned = W if axis == 0 else np.ascontiguousarray(W.T)
    factor = factorise(H, damping=0.01, act_order=False)
    assert factor is not None
    start = solve(turned, factor, scheme, channel_axis=axis)

    found = refined(turned, start, H, scheme, axis, sweeps=3)

    def errors(quantized: Quantized) -> np.ndarray:
        rows = quantized.dequantize() if axis == 0 else quantized.dequantize().T
        return oracle.error(W.astype(np.float64), rows, damped(H))

    assert np.all(errors(found) <= errors(start) * (1 + 1e-3) + 1e-6 * oracle.error(W, 0 * W, damped(H)))
    low, high = BOUNDS[format]
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    assert (found.codes.dtype, found.codes.shape) == (start.codes.dtype, turned.shape)
    assert found.scale.shape == start.scale.shape


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()])
@pytest.mark.parametrize("axis", [0, 1])
def test_other_granularities(granularity: PerChannel | PerTensor, axis: int) -> None:
    W, H = problem(40, 200)
    scheme = Scheme("int4", granularity)
    turned = W if axis == 0 else np.ascontiguousarray(W.T)
    start = quantize_weight(turned, scheme, channel_axis=axis)
    found = refined(turned, start, H, scheme, axis, sweeps=2)
    before, after = (oracle.error(W, (q.dequantize() if axis == 0 else q.dequantize().T), H) for q in (start, found))
    assert after.sum() < 0.7 * before.sum()
    assert found.scale.shape == start.scale.shape
    if isinstance(granularity, PerTensor):
        np.testing.assert_array_equal(found.scale, start.scale)


def test_it_gains_on_gptq() -> None:
    W, H = problem(64, 256)
    scheme = Scheme("int3", PerGroup(64))
    factor = factorise(H, damping=0.01, act_order=True)
    assert factor is not None
    start = solve(W, factor, scheme, channel_axis=0, search="weighted")
    found = refined(W, start, H, scheme, 0, sweeps=4)
    assert oracle.error(W, found.dequantize(), H).sum() < 0.95 * oracle.error(W, start.dequantize(), H).sum()


def test_inputs_that_were_never_active_keep_their_codes() -> None:
    W, H = problem(8, 64)
    H[5] = H[:, 5] = 0.0
    scheme = Scheme("int4", PerGroup(32))
    start = quantize_weight(W, scheme, channel_axis=0)
    found = refined(W, start, H, scheme, 0, sweeps=2)
    np.testing.assert_array_equal(found.codes[:, 5], start.codes[:, 5])
    assert (found.codes != start.codes).any()
    silent = refined(W, start, np.zeros_like(H), scheme, 0)
    np.testing.assert_array_equal(silent.codes, start.codes)


def test_channels_in_slices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(200, 64)
    scheme = Scheme("uint4", PerGroup(32), symmetric=False)
    start = quantize_weight(W, scheme, channel_axis=0)
    whole = refined(W, start, H, scheme, 0)
    monkeypatch.setattr("qcompiler.rewriting.quantease.ELEMENTS_AT_ONCE", 64 * 64)
    parts = refined(W, start, H, scheme, 0)
    assert np.mean(whole.codes == parts.codes) > 0.999  # products of other shapes may round otherwise
    np.testing.assert_allclose(whole.scale, parts.scale, rtol=1e-2)


def test_scales_keep_their_type() -> None:
    W, H = problem(16, 64)
    scheme = Scheme("int4", PerGroup(32))
    start = quantize_weight(W.astype(np.float16), scheme, channel_axis=0, scale_dtype=np.float16)
    found = refined(W.astype(np.float16), start, H, scheme, 0)
    assert found.scale.dtype == np.float16
    assert np.isfinite(found.scale).all()
    assert replace(found, codes=start.codes).dequantize().shape == W.shape


def test_a_scale_changes_less_than_twofold_in_a_sweep() -> None:
    """A weight far out of its range asks for a scale many times as large: that much is nothing to trust a fit with."""
    W, H = problem(8, 64)
    scheme = Scheme("int4", PerGroup(32))
    start = quantize_weight(W, scheme, channel_axis=0)
    for factor in (1 / 16, 16):
        wrong = replace(start, scale=(start.scale * factor).astype(np.float32))
        ratio = refined(W, wrong, H, scheme, 0).scale / wrong.scale
        assert ratio.min() > 0.5
        assert ratio.max() < 2


def test_a_scale_that_would_double_stays() -> None:
    """The largest code is 7, and 14 steps of it are wanted: the fit is exactly twofold. A little less is done."""
    H, scheme = np.eye(2, dtype=np.float32), Scheme("int4", PerGroup(2))
    start = Quantized(np.array([[7, 7]], np.int8), np.ones((1, 1), np.float32), None, 1, 2, "int4")
    for weight, scale in ((14.0, 1.0), (13.0, 13 / 7)):
        W = np.full((1, 2), weight, np.float32)
        found = refine(W, start, H, scheme, channel_axis=0, damping=0.0, sweeps=1)
        np.testing.assert_allclose(found.scale, [[scale]], rtol=1e-6)
        np.testing.assert_array_equal(found.codes, start.codes)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_always_zero_cost_nothing_and_break_nothing(damping: float) -> None:
    W, H = problem(8, 64)
    H += 0.1 * np.eye(64, dtype=np.float32)  # so that it is regular without damping
    H[5] = H[:, 5] = 0.0
    scheme = Scheme("int4", PerGroup(32))
    start = quantize_weight(W, scheme, channel_axis=0)
    found = refine(W, start, H, scheme, channel_axis=0, damping=damping, sweeps=2)
    assert np.isfinite(found.scale).all()
    np.testing.assert_array_equal(found.codes[:, 5], start.codes[:, 5])
    assert oracle.error(W, found.dequantize(), H).sum() < oracle.error(W, start.dequantize(), H).sum()


def test_two_sweeps_are_one_sweep_twice() -> None:
    """A sweep goes on with the scales as they are stored: of bfloat16, three digits."""
    W, H = problem(64, 256)
    scheme = Scheme("int4", PerGroup(32))
    start = quantize_weight(W, scheme, channel_axis=0, scale_dtype=ml_dtypes.bfloat16)
    twice = refined(W, refined(W, start, H, scheme, 0), H, scheme, 0)
    both = refined(W, start, H, scheme, 0, sweeps=2)
    assert np.mean(both.codes == twice.codes) > 0.999  # a tie may fall to either side
    assert np.mean(both.scale == twice.scale) > 0.98


def test_a_negative_number_of_sweeps_is_refused() -> None:
    with pytest.raises((SchemeError, ValueError), match="refine"):
        Gptq(refine=-1)
