"""How fast a compiled model is beside its float model, by clocks that can be any."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from qcompiler.benchmarking import speedup as module
from qcompiler.benchmarking.runner import Runner
from qcompiler.benchmarking.speedup import Speedup, speedup
from qcompiler.benchmarking.timing import Limits, in_turns
from qcompiler.errors import DataError
from tests import tiny

LAYER = "g (float[M,16] x, float[16,16] W) => (float[M,16] y) { y = MatMul(x, W) }"


def test_both_run_in_turns_on_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def called(self: Runner, number: int) -> None:
        order.append((self.name, number))
        now[0] += 3.0 if "float" in self.name else 1.0 + number  # 2, 3, 4, …
        real(self, number)

    real = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", called)
    clocks = functools.partial(in_turns, cpu=lambda: now[0], wall=lambda: now[0])
    monkeypatch.setattr(module, "in_turns", clocks)
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=3, seconds=1e9, precision=0.0))
    model = tiny.build(LAYER, W="normal")
    samples = [{"x": np.ones((rows, 16), np.float32)} for rows in (5, 7)]
    found = speedup(tiny.session(model), tiny.session(model), samples, samples)
    assert (found.ratio, found.low, found.high) == (1.0, 0.875, 1.25)  # of 3/2, 3/3 and 3/4
    assert (found.float_seconds, found.seconds, found.rounds, found.threads) == (3.0, 3.0, 3, 1)
    assert found.inputs == "x [5, 16]"
    assert str(found) == "1 × (0.875 … 1.25)"
    assert order[2:4] == [("the compiled model", 1), ("the float model", 1)]


def test_what_does_not_run_is_one_sentence() -> None:
    model = tiny.build(LAYER, W="normal")
    right, wrong = {"x": np.ones((2, 16), np.float32)}, {"x": np.ones((2, 8), np.float32)}
    with pytest.raises(DataError, match="the sample does not go through the compiled model"):
        speedup(tiny.session(model), tiny.session(model), [right], [wrong])


@pytest.mark.parametrize(("ratio", "high", "rounds", "slower"), [
    (0.9, 0.95, 9, True), (0.99, 0.995, 9, True), (0.9, 1.0, 9, False), (1.0, 1.0, 9, False),
    (0.95, 0.95, 1, False), (0.85, 0.85, 1, True),
])  # fmt: skip
def test_slower_is_beyond_what_rounds_differ_by(ratio: float, high: float, rounds: int, slower: bool) -> None:
    assert Speedup(ratio, 0.5, high, 1.0, 1.0, rounds, 1, "", "").slower == slower
