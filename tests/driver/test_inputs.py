"""What a caller gives becomes what the compiler works on: which samples are calibrated on, and which are kept apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.samples import Samples
from qcompiler.driver import inputs
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
