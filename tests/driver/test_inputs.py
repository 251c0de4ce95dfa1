"""What a caller gives becomes what the compiler works on: which samples are calibrated on, and which are kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calibrator import Hook
from qcompiler.calibration.samples import Samples
from qcompiler.driver import inputs
from qcompiler.errors import DataError
from qcompiler.recipes import Recipe
from tests import tiny


def model() -> ir.Model:
    return tiny.build("g (float[B,1] x) => (float[B,1] y) { y = Neg(x) }")


def numbered(samples: Samples | None) -> list[int]:
    return [] if samples is None else [int(sample["x"].item()) for sample in samples]


def split(count: int, held_out: int, samples: int = 100) -> tuple[list[int], list[int]]:
    """The numbers of the samples to calibrate on, and of those to compare on, of `count` samples 0, 1, …"""
    recipe = Recipe.from_dict({
        "name": "r", "passes": ["quantize-weights"], "calibration": {"held_out": held_out, "samples": samples},
    })  # fmt: skip
    data = [{"x": np.full((1, 1), number, np.float32)} for number in range(count)]
    measured_on, compared_on = inputs.samples(data, model(), recipe, None)
    return numbered(measured_on), numbered(compared_on)


@pytest.mark.parametrize(
    ("count", "held_out", "samples", "measured", "compared"),
    [
        (10, 3, 100, range(7), range(7, 10)),
        (10, 3, 4, range(4), range(4, 7)),  # more data than asked for is not read
        (10, 0, 100, range(10), []),
        (10, 9, 100, range(5), range(5, 10)),  # half of them at most are kept apart
        (3, 4, 100, range(2), range(2, 3)),
        (1, 4, 100, range(1), []),
    ],
)
def test_no_sample_is_both_calibrated_on_and_compared_on(
    count: int, held_out: int, samples: int, measured: range, compared: range
) -> None:
    assert split(count, held_out, samples) == (list(measured), list(compared))


def recipe(*passes: Any) -> Recipe:
    return Recipe.from_dict({"name": "r", "passes": list(passes), "calibration": {"held_out": 2}})


def test_samples_that_do_not_say_how_many_they_are_are_counted() -> None:
    def generated() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"x": np.full((1, 1), number, np.float32)} for number in range(7))

    measured_on, compared_on = inputs.samples(generated, model(), recipe("quantize-weights"), None)
    assert (numbered(measured_on), numbered(compared_on)) == (list(range(5)), [5, 6])


def test_without_data_nothing_is_measured_and_nobody_can_look_on() -> None:
    assert inputs.calibrator(None, [], None, progress=False) is None
    with pytest.raises(DataError, match="calibration hooks need data to look at"):
        inputs.calibrator(None, [Hook("*", lambda *_: None)], None, progress=False)


@pytest.mark.parametrize(
    ("passes", "given", "noted"),
    [
        (["hqq"], True, True),
        (["quantize-weights", "nf4"], True, True),  # one long pass is enough
        (["quantize-weights"], True, False),
        (["hqq"], False, False),
    ],
)
def test_only_long_passes_note_what_they_have_computed(
    tmp_path: Path, passes: list[str], given: bool, noted: bool
) -> None:
    plan = inputs.plan(recipe(*passes), None, (), (), None, None)
    found = inputs.checkpoint(plan, {}, tmp_path / "work" if given else None, resume=False)
    assert (found is not None) == noted


def test_what_is_excluded_is_not_quantized_and_lowered_all_the_same() -> None:
    """Also where the recipe lists a lowering pass itself; what a step ignores already stays ignored."""
    steps = ({"quantize-weights": {"ignore": ["lm_head"]}}, "lower-weight-only")
    plan = inputs.plan(recipe(*steps), None, (), ("*.0.*",), None, None)
    assert [step.ignore for step in plan.passes] == [("lm_head", "*.0.*"), ()]
    assert all(step.ignore == () for step in plan.lowering)
