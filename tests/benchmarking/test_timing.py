"""Runs are timed in turns, by clocks that can be any; medians and ratios are what the clocks say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from qcompiler.benchmarking.timing import LEAST_ROUNDS, Limits, Spread, Timed, in_turns, ratios


class FakeTime:
    """Clocks that go on only while something runs, `waiting` times as fast by the wall."""

    def __init__(self, waiting: float = 2.0) -> None:
        self.now, self.waiting = 0.0, waiting
        self.calls: list[str] = []

    def run(self, name: str, *seconds: float) -> Callable[[int], None]:
        """Takes one of the times after another."""
        rest: Iterator[float] = iter(())

        def called(number: int) -> None:
            nonlocal rest
            self.calls.append(f"{name}{number}")
            value = next(rest, None)
            if value is None:
                rest = iter(seconds)
                value = next(rest)
            self.now += value

        return called

    def time(self, runs: Sequence[Callable[[int], object]], limits: Limits) -> list[Timed]:
        return in_turns(runs, limits, cpu=lambda: self.now, wall=lambda: self.now * self.waiting)


def test_runs_take_turns_and_who_begins_changes() -> None:
    clock = FakeTime()
    clock.time([clock.run(name, 1.0) for name in "abc"], Limits(2, 1e9, 0.0, 0.0))
    assert clock.calls == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]


def test_the_first_round_warms_up_and_both_times_are_kept() -> None:
    clock = FakeTime()
    slow, fast = clock.time([clock.run("a", 99.0, 4.0, 6.0), clock.run("b", 99.0, 1.0, 2.0)], Limits(2, 1e9, 0.0, 0.0))
    assert slow == Timed((4.0, 6.0), (8.0, 12.0))
    assert fast == Timed((1.0, 2.0), (2.0, 4.0))
    assert Spread.of(slow.cpu) == Spread(5.0, 4.5, 5.5)
    assert ratios(slow.cpu, fast.cpu) == Spread(3.5, 3.25, 3.75)  # of the rounds, 4 and 3


def test_a_round_that_takes_all_the_time_counts() -> None:
    clock = FakeTime()
    found = clock.time([clock.run("a", 30.0), clock.run("b", 10.0)], Limits(20, 2.0, 0.0))
    assert [one.cpu for one in found] == [(30.0,), (10.0,)]
    assert ratios(found[0].cpu, found[1].cpu) == Spread(3.0, 3.0, 3.0)
    assert clock.calls == ["a0", "b0"]


def test_the_time_ends_it() -> None:
    clock = FakeTime(waiting=1.0)
    (found,) = clock.time([clock.run("a", 1.0)], Limits(1000, 3.5, 0.0, 0.0))
    assert len(found.cpu) == 3  # after a warm-up


def test_it_ends_when_the_medians_are_known() -> None:
    clock = FakeTime()
    (steady,) = clock.time([clock.run("a", 1.0)], Limits(1000, 1e9, 0.02, 0.0))
    assert len(steady.cpu) == LEAST_ROUNDS
    both = clock.time([clock.run("a", 1.0), clock.run("b", 0.8, 1.0, 1.2)], Limits(1000, 1e9, 0.02, 0.0))
    assert {len(one.cpu) for one in both} == {len(both[0].cpu)}
    assert LEAST_ROUNDS < len(both[0].cpu) < 1000


def test_short_runs_are_repeated_within_their_turn() -> None:
    clock = FakeTime(waiting=1.0)
    found = clock.time([clock.run("a", 0.001), clock.run("b", 0.004)], Limits(1, 1e9, 0.0, shortest=0.003))
    assert [one.cpu for one in found] == [pytest.approx((0.001,)), pytest.approx((0.004,))]
    assert clock.calls == ["a0", "b0", "b1", "a1", "a1", "a1"]


def test_progress_counts_rounds() -> None:
    said: list[tuple[int, int | None]] = []
    clock = FakeTime()
    in_turns([clock.run("a", 1.0)], Limits(3, 1e9, 0.0, 0.0), cpu=lambda: clock.now, wall=lambda: clock.now,
             progress=lambda done, total: said.append((done, total)))  # fmt: skip
    assert said == [(1, 3), (2, 3), (3, 3)]


def test_the_spread_of_one_number_is_the_number() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert not Spread(1.0, 1.0, 1.0).known(LEAST_ROUNDS - 1, 0.5)
