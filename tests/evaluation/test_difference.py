"""Errors are told per token, so that one loud token hides nothing; feature maps are taken whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.samples import from_python
from qcompiler.diagnosis.channels import Rescaling
from qcompiler.evaluation import compare as comparing
from qcompiler.evaluation import difference
from qcompiler.evaluation.compare import Comparison, compare
from qcompiler.evaluation.difference import Difference, feature_maps
from qcompiler.progress import Progress
from qcompiler.sessions import segments
from tests import tiny
from tests.oracles.difference import sqnr_db


def massive(tokens: int = 64, channels: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A number of 2,920 at the first token, and what one range for all makes of it [2, tokens, channels]."""
    x = np.random.default_rng(0).normal(size=(2, tokens, channels)).astype(np.float32)
    x[:, 0, 5] = 2920
    step = 2920 / 255
    return x, (np.round(x / step) * step).astype(np.float32)


def test_a_loud_token_does_not_hide_the_others() -> None:
    x, rounded = massive()
    found = Difference()
    found.update(x, rounded)
    assert found.total_sqnr_db > 35
    assert found.sqnr_db == pytest.approx(sqnr_db(x, rounded), abs=1e-6)
    assert -1 < found.sqnr_db < 1
    assert found.share_of_strongest == pytest.approx((x[:, 0] ** 2).sum() / (x**2).sum() / 2, rel=1e-3)
    assert found.rows == 2 * 64


def test_pieces_and_samples_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rounded = massive()
    whole, pieces = Difference(), Difference()
    whole.update(x, rounded)
    monkeypatch.setattr(difference, "ELEMENTS_AT_ONCE", 100)
    pieces.update(x, rounded)
    for name in ("sqnr_db", "total_sqnr_db", "cosine", "largest", "share_of_strongest", "rows"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name)), name
    apart = Difference()
    for sample in range(2):
        apart.update(x[sample], rounded[sample])
    assert apart.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-3)


def test_a_faint_row_is_judged_as_30_db_below_the_usual() -> None:
    x = np.ones((5, 4), np.float32)
    x[4] = 1e-6
    found = Difference()
    found.update(x, x + np.float32(0.01))
    assert found.relative_noise == pytest.approx((4 * 1e-4 + 1e-4 / 1e-3) / 5, rel=1e-3)
    silent = Difference()
    silent.update(np.zeros((3, 4)), np.zeros((3, 4)))
    assert (silent.rows, silent.sqnr_db) == (0, math.inf)


def test_a_feature_map_is_one_row() -> None:
    x = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    x[:, 1] *= 1e-4  # a channel that training switched off
    noisy = x + np.float32(0.01)
    found = Difference()
    found.update(x, noisy, whole=True)
    assert found.rows == 1
    assert found.sqnr_db == pytest.approx(found.total_sqnr_db)


def test_feature_maps_are_those_of_convolutions_and_outputs_like_them() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 3, 8, 8] x, float[n, 4, 5, 6] past) => (float[n, 2, 8, 8] up, float[n, 4] scores, float[n, 4] z)
            <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}, float[4, 4] v = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}> {
            c = Conv (x, w)
            up = Relu (c)
            scores = ReduceMax <axes = [2, 3], keepdims = 0> (past)
            z = MatMul (scores, v)
        }"""
    )
    assert feature_maps(model) == {"x", "c", "up"}


def test_channels_of_a_rescaled_value_are_told_per_token() -> None:
    x, rounded = massive()
    factor = np.linspace(0.5, 4, 32).astype(np.float32)
    found = Rescaling()
    found.update(x, rounded * factor)
    assert found.difference().sqnr_db == pytest.approx(sqnr_db(x, rounded * factor / found.factor), abs=1e-3)


def scaled(factor: float) -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 8] x) => (float[n, 8] y) <float[1] f = {{{factor}}}> {{
            a = Mul (x, f)
            y = Neg (a)
        }}"""
    )


def compared(**more: object) -> Comparison:
    generator = np.random.default_rng(2)
    data = [{"x": generator.normal(size=(3, 8)).astype(np.float32)} for _ in range(5)]
    samples = from_python(data, model=scaled(1))
    return compare(scaled(1.0), scaled(1.1), samples, values={"a": "a"}, **more)  # type: ignore[arg-type]


def test_groups_of_samples_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared()
    seen: list[int] = []
    original = segments.run

    def counted(*args: Any, **more: Any) -> None:
        seen.append(more["first"])
        original(*args, **more)

    monkeypatch.setattr(segments, "run", counted)
    monkeypatch.setattr(comparing, "GROUP_BYTES", 300)  # two samples of 96 bytes an array, and one more
    parts = compared()
    assert seen == [0, 0, 2, 2, 4, 4]
    assert parts == whole


def test_outputs_are_those_of_the_opened_model_and_the_others_stand_beside() -> None:
    opened = 0

    def other() -> object:
        nonlocal opened
        opened += 1
        return tiny.session(scaled(1.01))

    found = compared(opened=other)
    assert opened == 1
    assert found.outputs["y"].sqnr_db == pytest.approx(40, abs=0.01)
    assert found.unoptimized["y"].sqnr_db == pytest.approx(20, abs=0.01)
    assert found.values["a"].sqnr_db == pytest.approx(20, abs=0.01)
    assert compared().unoptimized == {}


@pytest.mark.parametrize("large", [False, True])
def test_progress_ends_where_it_said(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Also where each sample goes through in pieces."""
    told: list[tuple[int, int | None]] = []

    @contextmanager
    def bar(title: str, shown: bool) -> Iterator[Progress]:
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr(comparing, "progress_bar", bar)
    if large:
        monkeypatch.setattr(comparing, "PIECE_BYTES", 1)
    compared(opened=lambda: tiny.session(scaled(1.01)))
    assert told[-1] == (15, 15)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
