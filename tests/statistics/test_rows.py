"""What a token weighs in a search: loud ones the less, by what is usual in each channel."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.statistics import MSE, ChannelMoments, SecondMoment
from qcompiler.statistics.rows import FAINT, judged_as, token_weights
from tests.oracles.awq import weighed
from tests.there import there


def massive(tokens: int = 200, channels: int = 12) -> np.ndarray:
    """Channels of several loudnesses; at the first token one of the quiet ones holds 2,920 [tokens, channels]."""
    x = np.random.default_rng(0).normal(size=(tokens, channels)) * np.geomspace(0.1, 30, channels)
    x[0, 1] = 2920
    return x.astype(np.float32)


def test_moments_are_those_of_weighed_tokens() -> None:
    x = massive()
    first, second = ChannelMoments(per_token=True), SecondMoment(per_token=True, precision="float64")
    for statistic in (first, second):
        statistic.update(x[None])
    expected = weighed(x.astype(np.float64))
    np.testing.assert_allclose(first.result(), np.square(expected).mean(0), rtol=1e-6)
    np.testing.assert_allclose(second.result(), expected.T @ expected / len(x), rtol=1e-5, atol=1e-7)
    plain = ChannelMoments()
    plain.update(x)
    assert plain.result()[1] > 1e4 * first.result()[1], "which is the first token's alone"
    np.testing.assert_allclose(first.result()[2:], plain.result()[2:], rtol=0.5)


def test_a_rescaled_value_has_the_same_tokens() -> None:
    x, divisor = massive(), np.geomspace(0.01, 50, 12)
    for kind in (ChannelMoments(per_token=True), SecondMoment(per_token=True, precision="float64")):
        before, after = kind.fresh(), kind.fresh()
        for part in np.split(x, 4):
            before.update(part)
            after.update(part.astype(np.float64) / divisor)
        told = before.rescaled(divisor)
        assert told is not None
        np.testing.assert_allclose(told.result(), after.result(), rtol=1e-4, atol=1e-9)
        for statistic in (told, after):  # and goes on as one that has seen it so
            statistic.update((x[:50] / divisor).astype(np.float32))
        np.testing.assert_allclose(told.result(), after.result(), rtol=1e-4, atol=1e-9)


def test_shards_are_joined() -> None:
    x = massive()
    one, other = ChannelMoments(per_token=True), ChannelMoments(per_token=True)
    one.update(x[:80])
    other.update(x[80:])
    total, weight = there(one.total) + there(other.total), one.weight + other.weight
    one.merge(other)
    np.testing.assert_allclose(one.result(), total / weight, rtol=1e-6)
    np.testing.assert_allclose(there(one.roots), np.sqrt(np.abs(x)).sum(0), rtol=1e-5)
    assert one.count == len(x)
    again = one.fresh()
    again.load_state(one.state())
    np.testing.assert_array_equal(again.result(), one.result())


def test_tokens_of_zeros_weigh_nothing() -> None:
    x = massive()
    silent = np.concatenate([x, np.zeros((100, 12), np.float32)])
    one, other = ChannelMoments(per_token=True), ChannelMoments(per_token=True)
    one.update(x)
    other.update(silent)
    assert other.result() == pytest.approx(one.result(), rel=0.2)
    none = ChannelMoments(per_token=True)
    none.update(np.zeros((3, 12), np.float32))
    np.testing.assert_array_equal(none.result(), np.zeros(12))


def test_faint_rows_are_judged_by_the_median() -> None:
    energies = np.array([1.0, 2.0, 3.0, 1e-9, 0.0])
    np.testing.assert_allclose(judged_as(energies), [1, 2, 3, 1.5 * FAINT, 1.5 * FAINT])
    np.testing.assert_allclose(token_weights(np.sqrt(energies)[:, None])[-2:], [1 / (1.5 * FAINT), 0])
    np.testing.assert_array_equal(judged_as(np.zeros(2)), np.zeros(2))


def test_the_range_of_least_error_is_that_of_most_tokens() -> None:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    x[0, 1] = 2920
    plain, told = MSE(), MSE(per_token=True)
    for statistic in (plain, told):
        statistic.update(x)
    assert plain.result().hi > 1000
    assert told.result().hi < 100
    assert told.result().lo == pytest.approx(float(x.min())), "what one side shrinks by is not what the other does"
