"""The search for scales: laid out as operators read them, as good as an exhaustive search, the same in slices."""

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import DataError, SchemeError
from qcompiler.formats.arithmetic import dequantize, quantize
from qcompiler.formats.scheme import FORMATS, Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.formats.search import Search, least_error_range, quantize_weight
from tests.oracles import arithmetic as oracle

WEIGHT_FORMATS = [name for name in FORMATS if name not in ("int32",)]


def test_binary_takes_the_sign_and_the_mean_magnitude() -> None:
    weight = np.array([[0.5, -1.5, 0.0, 2.0, -1.0], [1, 1, 1, 1, 6]], np.float32)
    quantized = quantize_weight(weight, Scheme("binary", PerGroup(2)), channel_axis=0)
    np.testing.assert_array_equal(quantized.codes, [[1, -1, 1, 1, -1], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(quantized.scale, [[1.0, 1.0, 1.0], [1.0, 1.0, 6.0]])


def test_symmetric_uint8_is_int8_moved_up_by_128() -> None:
    weight = np.random.default_rng(4).standard_normal((9, 33)).astype(np.float32)
    signed = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0)
    unsigned = quantize_weight(weight, Scheme("uint8", PerChannel()), channel_axis=0)
    np.testing.assert_array_equal(unsigned.codes.astype(int) - 128, signed.codes)
    np.testing.assert_array_equal(unsigned.dequantize(), signed.dequantize())


def expected_layout(shape: tuple[int, ...], granularity: Granularity, channel_axis: int) -> tuple[Any, Any, Any]:
    if isinstance(granularity, PerTensor):
        return (), None, None
    if isinstance(granularity, PerChannel):
        return (shape[channel_axis],), channel_axis, None
    if isinstance(granularity, PerGroup):
        size = granularity.size
    else:
        assert isinstance(granularity, PerBlock)
        size = granularity.columns
    axis = 1 - channel_axis
    return tuple(-(-n // size) if i == axis else n for i, n in enumerate(shape)), axis, size


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("channel_axis", [0, 1, -1])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4), PerGroup(7), PerBlock(4, 5)], ids=str)
def test_every_scheme_lays_its_scales_out_for_dequantizelinear(
    granularity: Granularity, channel_axis: int, format: str, search: Any
) -> None:
    weight = np.random.default_rng(5).standard_normal((11, 18)).astype(np.float32)
    weight[3] = 0
    quantized = quantize_weight(weight, Scheme(format, granularity), channel_axis=channel_axis, search=search)
    layout = (quantized.scale.shape, quantized.axis, quantized.block_size)
    assert layout == expected_layout(weight.shape, granularity, channel_axis % 2)
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.dtype == FORMATS[format].dtype
    again = quantize(weight, quantized.scale, quantized.zero_point, format, quantized.axis, quantized.block_size)
    np.testing.assert_array_equal(again, quantized.codes)
    # Half a step of the coarsest part of each format, relative to the largest weight of its scale.
    step = {"binary": 2.2, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08, "fp4": 0.17, "fp4_bnb": 0.17, "nf4": 0.16}.get(
        format, 0.51 / FORMATS[format].symmetric_divisor
    )
    if search == "minmax":
        assert abs(quantized.dequantize() - weight).max() <= step * abs(weight).max()
    own = isinstance(granularity, PerChannel | PerGroup) and channel_axis == 0  # the row has scales of its own
    if format != "binary" or own:
        assert (quantized.dequantize()[3] == 0).all()


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    size=st.integers(1, 41),
    channel_axis=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_what_a_loop_over_them_gives(
    shape: tuple[int, int], size: int, channel_axis: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    scheme = Scheme("uint4", PerGroup(size), symmetric=False)
    quantized = quantize_weight(weight, scheme, channel_axis=channel_axis)
    rows = weight if channel_axis == 0 else weight.T
    assert quantized.zero_point is not None
    scales, zeros = (p if channel_axis == 0 else p.T for p in (quantized.scale, quantized.zero_point))
    for channel, row in enumerate(rows):
        for group, start in enumerate(range(0, row.size, size)):
            part = row[start : start + size]
            scale, zero = oracle.asymmetric_parameters(float(part.min()), float(part.max()), 0, 15)
            assert (float(scales[channel, group]), int(zeros[channel, group])) == (scale, zero)


@pytest.mark.parametrize("format", ["int4", "int3", "int2"])
def test_mse_search_finds_what_an_exhaustive_search_finds(format: str) -> None:
    number_format = FORMATS[format]
    weight = np.random.default_rng(6).standard_t(4, (6, 96)).astype(np.float32)
    scheme = Scheme(format, PerGroup(48))
    errors = {}
    for search in ("minmax", "mse"):
        difference = quantize_weight(weight, scheme, channel_axis=0, search=search).dequantize() - weight
        errors[search] = np.square(difference.astype(np.float64)).reshape(6, 2, 48).sum(-1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.95 * errors["minmax"].sum()
    low, high = int(number_format.qmin), int(number_format.qmax)
    for channel in range(6):
        for group in range(2):
            values = weight[channel, 48 * group :][:48].astype(float).tolist()
            best = oracle.grid_search(values, number_format.symmetric_divisor, low, high)
            assert errors["mse"][channel, group] <= 1.05 * best


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(40)], ids=str)
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_weighted_search_has_the_least_weighted_error(granularity: Granularity, channel_axis: int) -> None:
    generator = np.random.default_rng(9)
    weight = generator.standard_t(4, (6, 96) if channel_axis == 0 else (96, 6)).astype(np.float32)
    importance = np.exp(2 * generator.standard_normal(96))
    errors = {}
    for weights in (None, importance):
        quantized = quantize_weight(
            weight, Scheme("int4", granularity), channel_axis=channel_axis, search="mse", importance=weights
        )
        difference = np.moveaxis(quantized.dequantize() - weight, channel_axis, 0).astype(np.float64)
        weighted = np.square(difference) * importance
        starts = [0] if isinstance(granularity, PerChannel) else [0, 40, 80]
        errors[weights is None] = np.add.reduceat(weighted, starts, axis=1)
    assert (errors[False] <= errors[True] * (1 + 1e-6)).mean() > 0.9  # the search is a grid, refined around its best
    assert errors[False].sum() < 0.97 * errors[True].sum()


def test_a_number_alone_has_no_channels() -> None:
    with pytest.raises(DataError, match=r"the weight of shape \(\) has no channels to quantize"):
        quantize_weight(np.array(1.0, np.float32), Scheme("int8", PerTensor()), channel_axis=0)


def test_weights_of_errors_need_scales_of_channels() -> None:
    weight = np.ones((4, 8), np.float32)
    with pytest.raises(SchemeError, match="per channel or group"):
        quantize_weight(weight, Scheme("int8", PerTensor()), channel_axis=0, search="mse", importance=np.ones(8))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_convolution_weights_of_rank_four(granularity: Granularity, channel_axis: int) -> None:
    weight = np.random.default_rng(7).standard_normal((6, 4, 3, 3)).astype(np.float32)
    quantized = quantize_weight(weight, Scheme("int8", granularity), channel_axis=channel_axis)
    others = tuple(i for i in range(4) if i != channel_axis)
    absmax = abs(weight).max() if isinstance(granularity, PerTensor) else abs(weight).max(others)
    np.testing.assert_allclose(quantized.scale, absmax / 127, rtol=1e-6)
    np.testing.assert_array_equal(
        quantized.dequantize(), dequantize(quantized.codes, quantized.scale, None, quantized.axis)
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_weights_of_any_float_type_and_float16_scales_that_the_codes_match(dtype: Any) -> None:
    weight = (np.random.default_rng(8).standard_normal((5, 20)) * 1e-3).astype(dtype)
    weight[2] *= np.asarray(1e-3, dtype)  # its scale is a subnormal float16
    quantized = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0, scale_dtype=np.float16)
    assert quantized.scale.dtype == np.float16
    error = abs(quantized.dequantize() - weight.astype(np.float32))
    assert (error <= quantized.scale.astype(np.float32)[:, None] * 0.5001).all()


def test_a_block_shares_one_scale_among_its_rows() -> None:
    weight = np.arange(1, 61, dtype=np.float32).reshape(6, 10)
    quantized = quantize_weight(weight, Scheme("int8", PerBlock(4, 5)), channel_axis=0)
    expected = np.array([[35, 40], [35, 40], [35, 40], [35, 40], [55, 60], [55, 60]], np.float32) / 127
    np.testing.assert_allclose(quantized.scale, expected, rtol=1e-6)


def test_slices_of_channels_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(9).standard_normal((23, 50)).astype(np.float32)
    schemes = [Scheme("int4", g) for g in (PerTensor(), PerChannel(), PerGroup(16), PerBlock(4, 16))]
    whole = [quantize_weight(weight, s, channel_axis=1, search="mse") for s in schemes]
    monkeypatch.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 100)
    for scheme, expected in zip(schemes, whole, strict=True):
        sliced = quantize_weight(weight, scheme, channel_axis=1, search="mse")
        np.testing.assert_array_equal(sliced.codes, expected.codes)
        np.testing.assert_array_equal(sliced.scale, expected.scale)


def test_the_memory_that_a_large_matrix_needs_besides_its_codes() -> None:
    weight = np.random.default_rng(10).standard_normal((1024, 11008), dtype=np.float32)
    tracemalloc.start()
    quantized = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - quantized.codes.nbytes < 24e6  # the whole matrix in float32 is 45 MB


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = value
    with pytest.raises(DataError, match=r"^layers\.0\.weight contains NaN or infinity"):
        quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0, name="layers.0.weight")


@pytest.mark.parametrize(
    ("weight", "scheme", "arguments", "error"),
    [
        (np.ones((2, 2, 2), np.float32), Scheme("int4", PerGroup(2)), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerToken(), dynamic=True), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerTensor(), dynamic=True), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerChannel()), {"search": "best"}, SchemeError),
        (np.ones((2, 2), np.int8), Scheme("int8", PerChannel()), {}, DataError),
        (np.ones((0, 2), np.float32), Scheme("int8", PerChannel()), {}, DataError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerChannel()), {"channel_axis": 2}, DataError),
        (np.ones((2, 2, 1), np.float32), Scheme("int8", PerChannel()), {"importance": np.ones(2)}, SchemeError),
    ],
)
def test_weights_and_schemes_that_do_not_go_together(
    weight: Any, scheme: Scheme, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        quantize_weight(weight, scheme, **{"channel_axis": 0, **arguments})


@pytest.mark.parametrize("target", [0.16, 0.17, 0.2, 0.33, 0.5, 0.94, 0.95, 0.96, 0.99, 1.0])
def test_the_search_for_a_range_tries_every_percent_around_its_best(target: float) -> None:
    def error(lo: Any, hi: Any) -> Any:
        return np.abs(hi - target)

    lo, hi = least_error_range(np.array([-2.0]), np.array([1.0]), error)
    np.testing.assert_allclose([lo[0], hi[0]], [-2 * target, target], rtol=1e-9)


@pytest.mark.parametrize("percent", [-4, -3, -2, -1, 1, 2, 3, 4])
def test_the_search_for_a_range_goes_four_percent_from_its_best_of_the_coarse_grid(percent: int) -> None:
    def error(lo: Any, hi: Any) -> Any:
        return np.where(np.isclose(hi, 0.55 + percent / 100), 0, np.where(np.isclose(hi, 0.55), 1, 2))

    _, hi = least_error_range(np.zeros(1), np.ones(1), error)
    assert hi[0] == pytest.approx(0.55 + percent / 100)


def test_the_search_for_a_range_shrinks_none_by_more_than_to_16_percent_and_none_without_need() -> None:
    _, hi = least_error_range(np.zeros(2), np.ones(2), lambda lo, hi: np.stack([hi[0], 0 * hi[1]]))
    np.testing.assert_allclose(hi, [0.16, 1.0])


def test_binary_weights_need_no_search_and_inputs_without_importance_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.formats.search.least_error_range", None)
    weight, importance = np.array([[1, -3, 5, 7]], np.float32), np.array([3, 1, 0, 0], np.float32)
    scheme = Scheme("binary", PerGroup(2))
    found = quantize_weight(weight, scheme, channel_axis=0, search="mse", importance=importance)
    np.testing.assert_array_equal(found.scale, [[1.5, 0]])
    each = quantize_weight(weight, Scheme("binary", PerGroup(1)), channel_axis=0, search="mse")
    np.testing.assert_array_equal(each.scale, np.abs(weight))


def test_a_tensor_in_two_slices_has_the_scale_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(11).standard_normal((8, 50)).astype(np.float32)
    searches: tuple[Search, ...] = ("minmax", "mse")
    for search in searches:
        whole = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
        with monkeypatch.context() as patched:
            patched.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 200)
            halves = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
            patched.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 1)  # less than a channel
            rows = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
        assert halves.scale == rows.scale == whole.scale
