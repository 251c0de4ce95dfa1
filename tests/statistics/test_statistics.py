"""Statistics: near to float64 oracles, the same however the data is cut, rescalable where they say so, and storable."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompiler.statistics as package
from qcompiler.errors import DataError, OutputError, SchemeError
from qcompiler.statistics import (
    MSE,
    ChannelAbsMax,
    ChannelFolds,
    ChannelMoments,
    ChannelRange,
    Entropy,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    Range,
    SecondMoment,
    Statistic,
    StatisticsStore,
    finite,
)
from tests.oracles import statistics as oracle

ALL: list[Statistic] = [
    MinMax(), MovingAverageMinMax(), Percentile(), Percentile(percent=99.0), Entropy(), MSE(),
    MSE("int4", symmetric=True), ChannelAbsMax(), ChannelAbsMax(axis=1), ChannelRange(), ChannelRange(axis=1),
    ChannelMoments(), SecondMoment(), SecondMoment(precision="float64"),
]  # fmt: skip
RESCALABLE: list[Statistic] = [ChannelAbsMax(), ChannelRange(), ChannelMoments(), SecondMoment("float64")]


def keys(statistics: list[Statistic]) -> list[str]:
    return [s.key for s in statistics]


def ragged_batches(seed: int = 0, channels: int = 6, count: int = 5) -> list[np.ndarray]:
    """[1, length, channels] of different lengths, with outlier channels, an exact zero and a shift."""
    random = np.random.default_rng(seed)
    gains = np.exp(random.uniform(-2, 3, channels))
    batches = [random.standard_normal((1, n, channels)) * gains + 0.3 for n in random.integers(1, 60, count)]
    batches[0][0, 0, 0] = 0
    return [b.astype(np.float32) for b in batches]


def measured(statistic: Statistic, batches: list[np.ndarray]) -> Any:
    fresh = statistic.fresh()
    for batch in batches:
        fresh.update(batch)
    return fresh


def flat(result: Any) -> np.ndarray:
    if isinstance(result, Range):
        return np.array([result.lo, result.hi])
    return np.concatenate([np.ravel(part) for part in result]) if isinstance(result, tuple) else np.asarray(result)


# -- against the oracle ----------------------------------------------------------------------------------------------


def test_minmax_and_moving_average() -> None:
    batches = ragged_batches()
    everything = np.concatenate([b.ravel() for b in batches])
    assert measured(MinMax(), batches).result() == Range(float(everything.min()), float(everything.max()))
    average = measured(MovingAverageMinMax(momentum=0.7), batches).result()
    assert flat(average) == pytest.approx(oracle.moving_average(batches, 0.7), rel=1e-12)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_percentile(percent: float) -> None:
    batches = [np.random.default_rng(i).standard_t(3, (40, 50)).astype(np.float32) for i in range(5)]
    everything = np.concatenate([b.ravel() for b in batches])
    result = measured(Percentile(percent=percent), batches).result()
    width = abs(everything).max() / 4096
    for end, (least, most) in zip(flat(result), oracle.percentile_brackets(everything, percent), strict=True):
        assert least - width <= end <= most + width


def test_percentile_of_one_sided_values_begins_at_zero() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal(10000), 0).astype(np.float32)
    result = measured(Percentile(percent=99.0), [values]).result()
    assert result.lo == pytest.approx(0, abs=1e-3)
    assert result.hi == pytest.approx(np.percentile(values, 99.5), rel=0.02)


def test_a_percentile_lies_within_the_values() -> None:
    """A bin of the histogram is wider than what is in it; nothing beyond the values is ever needed."""
    for values in ([0.3, 0.7], [-5.01, 2.03], [1e-3, 1e-3], [-0.9]):
        array = np.array(values, np.float32)
        assert measured(Percentile(percent=100.0), [array]).result() == Range(float(array.min()), float(array.max()))


def heavy_tailed(seed: int, size: int = 20000) -> np.ndarray:
    """A Laplace bulk with a few values 15 times as far out."""
    random = np.random.default_rng(seed)
    values = random.laplace(0, 1, size)
    values[:4] = [-60, 60, 55, -58]
    return values.astype(np.float32)


def test_entropy_is_the_pseudocode_of_the_paper_and_not_minmax() -> None:
    values = heavy_tailed(0, 3000)
    statistic = measured(Entropy(bits=4, bins=256), [values])
    width = 2.0**statistic.exponent
    expected = oracle.entropy_threshold(values, 8, 256, width)
    assert statistic.result() == Range(-expected, expected)
    assert expected < 30  # minmax: 60

    default = measured(Entropy(), [heavy_tailed(1)]).result()
    assert 4 < default.hi < 30
    assert default.lo == -default.hi


def test_entropy_keeps_a_uniform_distribution_whole_and_ignores_exact_zeros() -> None:
    values = np.random.default_rng(2).uniform(0, 1, 200_000).astype(np.float32)
    assert measured(Entropy(), [values]).result().hi > 0.97
    zeros = np.zeros(500_000, np.float32)
    assert measured(Entropy(), [values, zeros]).result() == measured(Entropy(), [values]).result()
    assert measured(Entropy(), [values]).result().lo == 0
    assert measured(Entropy(), [zeros]).result() == Range(0.0, 0.0)
    shards = measured(Entropy(), [values]), measured(Entropy(), [zeros])
    shards[0].merge(shards[1])
    assert shards[0].result() == measured(Entropy(), [values]).result(), "zeros of another shard are zeros, too"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_mse_range_is_about_the_best_of_a_dense_grid(bits: int, symmetric: bool, shift: float) -> None:
    values = heavy_tailed(3, 4000) + np.float32(shift)
    result = measured(MSE(f"uint{bits}", symmetric), [values]).result()
    error = oracle.rounding_error(values, result.lo, result.hi, bits, symmetric)
    assert error <= 1.03 * oracle.least_rounding_error(values, bits, symmetric)
    assert error <= oracle.rounding_error(values, float(values.min()), float(values.max()), bits, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_of_four_bits_is_far_better_than_minmax(symmetric: bool) -> None:
    values = np.random.default_rng(0).laplace(0, 1, 20000).astype(np.float32)
    result = measured(MSE("uint4", symmetric), [values]).result()
    error = oracle.rounding_error(values, result.lo, result.hi, 4, symmetric)
    assert error < 0.5 * oracle.rounding_error(values, float(values.min()), float(values.max()), 4, symmetric)


def test_channel_statistics() -> None:
    batches = ragged_batches()
    rows = np.concatenate([b.reshape(-1, 6) for b in batches]).astype(np.float64)
    np.testing.assert_array_equal(measured(ChannelAbsMax(), batches).result(), abs(rows).max(0))
    lo, hi = measured(ChannelRange(), batches).result()
    np.testing.assert_array_equal((lo, hi), (rows.min(0), rows.max(0)))
    assert measured(ChannelRange(), batches).tensor_range() == Range(float(rows.min()), float(rows.max()))
    moments = measured(ChannelMoments(), batches)
    np.testing.assert_allclose(moments.result(), (rows**2).mean(0), rtol=1e-12)
    assert moments.count == rows.shape[0]
    for precision, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        second = measured(SecondMoment(precision=precision), batches)
        expected = rows.T @ rows / rows.shape[0]
        assert abs(second.result() - expected).max() <= tolerance * abs(expected).max()
        assert second.count == rows.shape[0]


def test_channels_along_another_axis_of_an_image() -> None:
    images = np.random.default_rng(4).standard_normal((2, 3, 5, 7)).astype(np.float32)
    np.testing.assert_array_equal(measured(ChannelAbsMax(axis=1), [images]).result(), abs(images).max((0, 2, 3)))
    lo, hi = measured(ChannelRange(axis=-3), [images]).result()
    np.testing.assert_array_equal((lo, hi), (images.min((0, 2, 3)), images.max((0, 2, 3))))


def test_second_moment_of_more_channels_than_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.statistics.channels._COLUMNS_AT_ONCE", 4)
    monkeypatch.setattr("qcompiler.statistics.channels._ROWS_AT_ONCE", 7)
    X = np.random.default_rng(5).standard_normal((3, 11, 10))
    rows = X.astype(np.float32).astype(np.float64).reshape(-1, 10)
    result = measured(SecondMoment(precision="float64"), [X]).result()
    np.testing.assert_allclose(result, rows.T @ rows / 33, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_accumulated_in_more(dtype: Any) -> None:
    batch = np.full((5000, 2), 200.0).astype(dtype)  # the sum of squares is far outside of float16
    assert measured(ChannelMoments(), [batch]).result().tolist() == [40000.0, 40000.0]
    np.testing.assert_allclose(measured(SecondMoment(), [batch]).result(), np.full((2, 2), 40000.0), rtol=1e-6)
    assert measured(MinMax(), [batch]).result() == Range(200.0, 200.0)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ALL, ids=keys(ALL))
@given(seed=st.integers(0, 2**16), cut=st.integers(0, 5), scale=st.sampled_from([1e-30, 1.0, 1e20]))
@settings(max_examples=12, deadline=None)
def test_merged_shards_are_one_pass_over_all(statistic: Statistic, seed: int, cut: int, scale: float) -> None:
    if scale > 1 and isinstance(statistic, SecondMoment) and statistic.precision == "float32":
        scale = 1e15
    channels = 6
    batches = [(b * np.float32(scale)) for b in ragged_batches(seed, channels)]
    if getattr(statistic, "axis", -1) == 1:
        batches = [np.swapaxes(b, 1, 2) for b in batches]
    whole = measured(statistic, batches)
    first, second = measured(statistic, batches[:cut]), measured(statistic, batches[cut:])
    first.merge(second)
    expected = flat(whole.result())
    exact = not isinstance(statistic, MovingAverageMinMax | ChannelMoments | SecondMoment)
    tolerance = 0.0 if exact else 1e-5 * float(abs(expected).max())
    assert abs(flat(first.result()) - expected).max() <= tolerance
    if isinstance(statistic, Percentile | Entropy | MSE):  # whatever the order
        second.merge(measured(statistic, batches[:cut]))
        np.testing.assert_array_equal(second.counts, whole.counts)


def test_a_merge_leaves_the_other_statistic_as_it_was() -> None:
    for statistic in ALL:
        batches = ragged_batches(channels=4)
        other = measured(statistic, batches[:1])
        before = {name: array.copy() for name, array in other.state().items()}
        mine = statistic.fresh()
        mine.merge(other)
        mine.update(100 * batches[0])
        for name, array in other.state().items():
            np.testing.assert_array_equal(array, before[name], err_msg=f"{statistic.key}.{name}")


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_histograms_hold_every_value_whatever_comes(values: list[float]) -> None:
    statistic = Percentile(percent=100.0, bins=16)
    for value in values:
        statistic.update(np.array([value]))
    assert statistic.counts is not None
    assert int(statistic.counts.sum()) == len(values)
    width = 2.0**statistic.exponent
    result = statistic.result()
    assert result.lo == pytest.approx(min(values), abs=width)
    assert result.hi == pytest.approx(max(values), abs=width)
    assert statistic.counts.nbytes == 2 * 16 * 8


# -- rescaling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", RESCALABLE, ids=keys(RESCALABLE))
@given(seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_rescaled_is_what_the_divided_values_measure(statistic: Statistic, seed: int) -> None:
    random = np.random.default_rng(seed)
    batches = ragged_batches(seed)
    divisor = (2.0 ** random.integers(-6, 7, 6)) * random.choice([-1, 1], 6)  # exact in float32
    rescaled = measured(statistic, batches).rescaled(divisor)
    assert rescaled is not None
    assert rescaled.key == statistic.key
    expected = measured(statistic, [(b / divisor).astype(np.float32) for b in batches])
    np.testing.assert_allclose(flat(rescaled.result()), flat(expected.result()), rtol=1e-9)
    assert getattr(rescaled, "count", None) == getattr(expected, "count", None)


@pytest.mark.parametrize("statistic", ALL, ids=keys(ALL))
def test_what_cannot_be_rescaled_says_so(statistic: Statistic) -> None:
    batch = ragged_batches()[0]
    rescaled = measured(statistic, [batch]).rescaled(np.ones(6))
    follows = isinstance(statistic, ChannelAbsMax | ChannelRange | ChannelMoments | SecondMoment)
    assert (rescaled is not None) == (follows and getattr(statistic, "axis", -1) == -1)


@pytest.mark.parametrize("divisor", [np.ones(5), np.array([1, 1, 0, 1, 1, 1.0]), np.array([1, 1, np.nan, 1, 1, 1])])
def test_divisors_that_do_not_fit_are_refused(divisor: np.ndarray) -> None:
    for statistic in RESCALABLE:
        with pytest.raises(DataError, match="divisors"):
            measured(statistic, ragged_batches()).rescaled(divisor)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("statistic", ALL, ids=keys(ALL))
def test_every_statistic_refuses_values_that_are_not_finite(statistic: Statistic, value: float) -> None:
    batch = np.ones((2, 3, 4), np.float16)
    batch[1, 0, 2] = value
    with pytest.raises(
        DataError, match=r"^contains NaN or infinity \(1 of 24 values, the first at index \(1, 0, 2\)\)"
    ):
        statistic.fresh().update(batch)


@pytest.mark.parametrize("statistic", ALL, ids=keys(ALL))
def test_no_data_is_an_error_and_an_empty_batch_is_no_data(statistic: Statistic) -> None:
    fresh = statistic.fresh()
    fresh.update(np.zeros((2, 0, 4), np.float32))
    fresh.merge(statistic.fresh())
    with pytest.raises(DataError, match="has seen no data"):
        fresh.result()


@pytest.mark.parametrize("statistic", [ChannelAbsMax(), ChannelRange(), ChannelMoments(), SecondMoment()])
def test_channels_may_not_change_and_scalars_have_none(statistic: Statistic) -> None:
    fresh = measured(statistic, [np.ones((2, 4), np.float32)])
    with pytest.raises(DataError, match="5 channels where earlier ones had 4"):
        fresh.update(np.ones((2, 5), np.float32))
    with pytest.raises(DataError, match="no axis"):
        fresh.update(np.float32(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Percentile(percent=0), lambda: Percentile(percent=101), lambda: Percentile(bins=1000),
        lambda: Entropy(bits=9), lambda: Entropy(bins=512), lambda: MSE("int5"),
        lambda: MSE("fp8_e4m3", symmetric=False), lambda: MovingAverageMinMax(1.0), lambda: SecondMoment("float16"),
    ],
)  # fmt: skip
def test_options_without_meaning_are_refused(make: Any) -> None:
    with pytest.raises(SchemeError):
        make()


def test_options_have_a_meaning_up_to_their_bounds() -> None:
    """The last that has one, and the first that has none."""
    for statistic in (Percentile, MSE):
        assert statistic(bins=16).bins == 16
        for bins in (0, 8, 24):
            with pytest.raises(SchemeError, match=f"a power of two of at least 16 for bins, not {bins}"):
                statistic(bins=bins)
    for bits, bins in ((2, 16), (4, 64), (8, 1024)):
        assert Entropy(bits=bits, bins=bins).bits == bits
        if bins > 16:
            with pytest.raises(SchemeError, match=f"at least {bins} bins for {bits} bits, not {bins // 2}"):
                Entropy(bits=bits, bins=bins // 2)
    for bits in (1, 9):
        with pytest.raises(SchemeError, match=f"2 to 8 bits and at least {4 * 2**bits} bins for {bits} bits, not 4096"):
            Entropy(bits=bits, bins=4096)
    assert [Percentile(percent=percent).percent for percent in (0.5, 100)] == [0.5, 100]
    assert MovingAverageMinMax(0.0).momentum == 0
    for momentum in (-0.1, 1.0):
        with pytest.raises(SchemeError, match="a momentum from 0 to below 1"):
            MovingAverageMinMax(momentum)


def test_without_momentum_the_last_batch_is_all_that_counts() -> None:
    batches = [np.array(values, np.float32) for values in ([1, 2], [], [-3, 5], [4])]
    assert measured(MovingAverageMinMax(0.0), batches).result() == Range(4, 4)
    first = measured(MovingAverageMinMax(0.5), batches[:1])
    first.merge(MovingAverageMinMax(0.5))
    assert (first.result(), first.batches) == (Range(1, 2), 1)
    first.merge(measured(MovingAverageMinMax(0.5), batches[2:]))
    assert (first.result(), first.batches) == (Range(1.5, 3.75), 3)


def test_keys_name_the_class_and_its_options() -> None:
    assert Percentile(percent=99.9).key == "Percentile(bins=8192, percent=99.9)"
    assert SecondMoment().key == "SecondMoment(precision='float32', per_token=False)"
    assert MSE("uint4").key != MSE().key
    assert measured(MinMax(), [np.ones(3)]).key == MinMax().key == "MinMax()"
    assert Percentile(percent=99.9).fresh().key == Percentile(percent=99.9).key


# -- one of the user's own, and the store ----------------------------------------------------------------------------


@dataclass(eq=False)
class Count(Statistic):
    """A user's own: how many values lie above a threshold."""

    threshold: float = 0.0
    above: int = field(default=0, init=False)

    def update(self, batch: np.ndarray) -> None:
        self.above += int((finite(batch) > self.threshold).sum())

    def merge(self, other: "Count") -> None:
        self.above += other.above

    def result(self) -> int:
        return self.above


def test_the_example_of_the_documentation_works() -> None:
    assert package.__doc__ is not None
    example = re.search(r"\n\n((?:    .*\n|\n)+)", package.__doc__)
    assert example is not None
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile("\n".join(line[4:] for line in example[1].splitlines()), "docs", "exec"), names)
    statistic = names["LargestL1"](threshold=1.0)
    statistic.update(np.array([[1.0, -3.0], [2.0, 0.5]]))
    other = statistic.fresh()
    other.update(np.array([[5.0, 5.0]], np.float16))
    statistic.merge(other)
    assert statistic.result() == 10.0
    assert statistic.key == "example:LargestL1(threshold=1.0)"


def test_the_store_finds_by_value_and_key() -> None:
    store = StatisticsStore()
    store.put("x", measured(MinMax(), [np.arange(3)]))
    assert store.get("x", MinMax()).result() == Range(0.0, 2.0)
    wanted = [("x", MinMax()), ("y", MinMax()), ("x", Percentile()), ("y", MinMax())]
    assert [(v, s.key) for v, s in store.missing(wanted)] == [("y", MinMax().key), ("x", Percentile().key)]
    with pytest.raises(DataError, match=r"Percentile\(.*value 'x'"):
        store.get("x", Percentile())


def test_the_store_rescales_what_it_can_and_forgets_the_rest() -> None:
    store = StatisticsStore()
    batches = ragged_batches()
    for value in ("x", "y"):
        for statistic in ALL:
            if getattr(statistic, "axis", -1) == -1:
                store.put(value, measured(statistic, batches))
    divisor = np.array([1, 2, 4, 8, 16, 32.0])
    untouched = sum(1 for value, _ in store if value == "y")
    store.rescale("x", divisor)
    assert sum(1 for value, _ in store if value == "y") == untouched
    kept = {s.key for value, s in store if value == "x"}
    assert kept == {s.key for s in (*RESCALABLE, SecondMoment())}
    expected = measured(ChannelAbsMax(), [b / divisor for b in batches]).result()
    np.testing.assert_allclose(store.get("x", ChannelAbsMax()).result(), expected, rtol=1e-6)
    store.drop("x")
    assert {value for value, _ in store} == {"y"}


def test_a_store_comes_back_from_its_file_and_goes_on(tmp_path: Path) -> None:
    store, batches = StatisticsStore(), ragged_batches()
    statistics = [s for s in ALL if getattr(s, "axis", -1) == -1] + [Count(threshold=0.5)]
    for statistic in statistics:
        store.put("model.layers.0/out", measured(statistic, batches[:3]))
    store.put("empty", MinMax())
    path = tmp_path / "stats.safetensors"
    store.save(path, {"model": "abc", "data": "déf"})
    assert list(tmp_path.iterdir()) == [path]
    loaded, header = StatisticsStore.load(path)
    assert header == {"model": "abc", "data": "déf"}
    assert len(loaded) == len(store)
    for statistic in statistics:
        again, rest = loaded.get("model.layers.0/out", statistic), measured(statistic, batches[3:])
        mine = store.get("model.layers.0/out", statistic)
        np.testing.assert_array_equal(flat(again.result()), flat(mine.result()))
        again.update(batches[4])
        again.merge(rest)
        mine.update(batches[4])
        mine.merge(rest)
        np.testing.assert_array_equal(flat(again.result()), flat(mine.result()))


def test_classes_that_nobody_imported_are_left_out_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from qcompiler.statistics import MinMax\nclass Mine(MinMax):\n    pass\n", encoding="utf-8"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import elsewhere  # type: ignore[import-not-found]

        store = StatisticsStore()
        store.put("x", measured(elsewhere.Mine(), [np.ones(2)]))
        store.put("y", measured(MinMax(), [np.ones(2)]))
        store.save(tmp_path / "s", {})
        assert len(StatisticsStore.load(tmp_path / "s")[0]) == 2
        del sys.modules["elsewhere"]
        loaded, _ = StatisticsStore.load(tmp_path / "s")
        assert [value for value, _ in loaded] == ["y"]
        assert "elsewhere" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


def test_files_that_are_not_statistics_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    good = tmp_path / "good"
    StatisticsStore().save(good, {})
    bad = {
        "missing": None,
        "empty": b"",
        "text": b"not a file of ours, though long enough to be one",
        "truncated": good.read_bytes()[:-3],
    }
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            StatisticsStore.load(tmp_path / name)
        assert name in str(caught.value)
    for name, metadata in {
        "foreign": None,
        "json": {"qcompiler.statistics": "{"},
        "future": {"qcompiler.statistics": '{"version": 99}'},
        "hollow": {"qcompiler.statistics": '{"version": 1, "header": {}, "entries": [{"value": "x"}]}'},
        "option": {
            "qcompiler.statistics": '{"version": 1, "header": {}, "entries": '
            '[{"value": "x", "class": "MinMax", "options": {"percent": 3}}]}'
        },
    }.items():
        save_file({"t": np.zeros(1)}, tmp_path / name, metadata=metadata)
        with pytest.raises(DataError, match=name):
            StatisticsStore.load(tmp_path / name)


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        StatisticsStore().save(tmp_path / "nowhere" / "s", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        StatisticsStore().save(tmp_path / "folder", {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_folds_are_stretches_of_the_data_in_order() -> None:
    batches = [np.full((4, 2), float(i)) for i in range(6)]
    statistic = measured(ChannelFolds(folds=4), batches)
    lo, hi = statistic.result()
    assert len(lo) <= 4
    assert np.all(np.diff(lo[:, 0]) >= 0)
    assert lo.min() == 0
    assert hi.max() == 5
    merged = measured(ChannelFolds(folds=4), batches[:3])
    merged.merge(measured(ChannelFolds(folds=4), batches[3:]))
    assert merged.result()[0].min() == 0
    assert merged.result()[1].max() == 5
    assert len(merged.result()[0]) <= 4


def test_folds_of_one_batch_and_of_one_row() -> None:
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    lo, hi = measured(ChannelFolds(), [rows]).result()
    assert lo.tolist() == [[0, 1], [4, 5]]
    assert hi.tolist() == [[2, 3], [8, 9]]
    assert len(measured(ChannelFolds(), [rows[:1]]).result()[0]) == 1
    with pytest.raises(SchemeError):
        ChannelFolds(folds=1)


def test_folds_follow_a_rescaling() -> None:
    batches = [np.random.default_rng(i).normal(size=(7, 3)).astype(np.float32) for i in range(3)]
    divisor = np.array([0.5, -2.0, 4.0], np.float32)
    rescaled = measured(ChannelFolds(), batches).rescaled(divisor)
    expected = measured(ChannelFolds(), [batch / divisor for batch in batches])
    assert rescaled is not None
    for got, want in zip(rescaled.result(), expected.result(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
