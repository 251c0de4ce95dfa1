"""Statistics at taps, hooks, and the file that keeps what was measured."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calibrator import Calibrator, Hook, load_statistics, model_hash, save_statistics
from qcompiler.calibration.samples import Samples, from_python
from qcompiler.errors import DataError, ModelError, RecipeError
from qcompiler.rewriting.contract import Tap
from qcompiler.sessions import segments
from qcompiler.statistics import ChannelAbsMax, MinMax, Statistic, StatisticsStore

WEIGHT = np.array([[1, 2, 0], [0, -1, 3]], np.float32)


def linear_model() -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[b, 2] x, float[2, 3] weight) => (float[b, 3] y) {
            "block.0/h" = MatMul (x, weight)
            "block.0/root" = Sqrt ("block.0/h")
            y = Relu ("block.0/root")
        }"""
    )
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(WEIGHT, name="weight")
    model.graph.register_initializer(value)
    return model


BATCHES = [np.array([[1, 1]], np.float32), np.array([[2, -0.5], [0, 4]], np.float32)]


def calibrator(batches: list[np.ndarray] = BATCHES, **options: Any) -> Calibrator:
    return Calibrator(from_python([{"x": batch} for batch in batches], model=linear_model()), **options)


@dataclass(eq=False)
class RowCount(Statistic):
    """What a user may write: it knows nothing of the library's own statistics."""

    at_least: int = 0
    rows: int = field(default=0, init=False)

    def update(self, batch: np.ndarray) -> None:
        self.rows += batch.shape[0]

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, RowCount)
        self.rows += other.rows

    def result(self) -> int:
        return max(self.rows, self.at_least)


@pytest.mark.parametrize("memory_limit", [None, 1])
def test_taps_are_measured_on_all_samples(memory_limit: int | None) -> None:
    store = StatisticsStore()
    taps = [Tap("x", MinMax()), Tap("block.0/h", ChannelAbsMax()), Tap("block.0/h", RowCount()), Tap("x", RowCount(9))]
    calibrator(memory_limit=memory_limit).collect(linear_model(), taps, store)
    values = np.concatenate([batch @ WEIGHT for batch in BATCHES])
    assert (store.get("x", MinMax()).result().lo, store.get("x", MinMax()).result().hi) == (-0.5, 4)
    np.testing.assert_array_equal(store.get("block.0/h", ChannelAbsMax()).result(), np.abs(values).max(0))
    assert store.get("block.0/h", RowCount()).result() == 3
    assert store.get("x", RowCount(9)).result() == 9


def test_prototypes_stay_empty_and_only_what_is_missing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    store, prototype, sweeps = StatisticsStore(), RowCount(), []
    original = segments.run

    def run(model: ir.Model, samples: Samples, wanted: Collection[str], *a: Any, **o: Any) -> None:
        sweeps.append(set(wanted))
        original(model, samples, wanted, *a, **o)

    monkeypatch.setattr(segments, "run", run)
    measuring = calibrator()
    measuring.collect(linear_model(), [Tap("x", prototype), Tap("block.0/h", MinMax())], store)
    assert prototype.rows == 0
    measuring.collect(linear_model(), [Tap("x", RowCount()), Tap("x", MinMax())], store)
    measuring.collect(linear_model(), [Tap("x", RowCount()), Tap("x", MinMax())], store)
    assert sweeps == [{"x", "block.0/h"}, {"x"}]
    assert store.get("x", RowCount()).result() == 3


def test_values_that_are_not_finite_are_named_and_the_store_stays_as_it_was() -> None:
    store = StatisticsStore()
    taps = [Tap("x", RowCount()), Tap("block.0/root", RowCount())]
    message = (
        r"the value 'block\.0/root' of node 'block\.0/root/Sqrt' \(Sqrt\) holds NaN or infinity on sample 1 "
        r"\(2 of 6 numbers\)"
    )
    with pytest.raises(DataError, match=message):
        calibrator().collect(linear_model(), taps, store)
    assert len(store) == 0


def test_what_a_statistic_refuses_is_placed() -> None:
    class Picky(RowCount):
        def update(self, batch: np.ndarray) -> None:
            raise DataError("this is no good")

    with pytest.raises(DataError, match="the input 'x' on sample 0: this is no good"):
        calibrator().collect(linear_model(), [Tap("x", Picky())], StatisticsStore())


def test_a_tap_on_nothing() -> None:
    with pytest.raises(ModelError, match="has no value 'z'"):
        calibrator().collect(linear_model(), [Tap("z", MinMax())], StatisticsStore())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("y", {"y"}), ("block.*", {"block.0/h", "block.0/root"}), (r"re:/h$|^x", {"block.0/h", "x"})],
)
def test_hooks_receive_every_batch(pattern: str, names: set[str]) -> None:
    seen = []
    hook = Hook(pattern, lambda name, batch: seen.append((name, batch.shape)))
    measuring = calibrator(hooks=[hook])
    store = StatisticsStore()
    measuring.collect(linear_model(), [Tap("x", MinMax())], store)
    assert {name for name, _ in seen} == names
    for name in names:
        assert [shape[0] for found, shape in seen if found == name] == [1, 2]
    measuring.collect(linear_model(), [Tap("x", RowCount())], store)
    measuring.run_hooks(linear_model())
    assert len(seen) == 2 * len(names), "hooks see the first model only"


def test_hooks_run_without_taps_and_see_what_is_not_finite() -> None:
    seen = []
    calibrator(hooks=[Hook("block.0/root", lambda _, batch: seen.append(batch.copy()))]).run_hooks(linear_model())
    assert np.isnan(seen[1]).any()


def test_hook_patterns_that_match_nothing() -> None:
    for pattern, message in (
        ("block.0/g", "'block.0/g' matches no value; did you mean 'block.0/h'"),
        ("re:(", "is no valid regular expression"),
    ):
        with pytest.raises(RecipeError, match=message):
            calibrator(hooks=[Hook(pattern, print)]).run_hooks(linear_model())


def test_statistics_file(tmp_path: Path) -> None:
    store, path = StatisticsStore(), tmp_path / "s.safetensors"
    calibrator().collect(linear_model(), [Tap("x", MinMax()), Tap("block.0/h", ChannelAbsMax())], store)
    save_statistics(path, store, model_hash(linear_model()), "data")
    loaded = load_statistics(path, model_hash(linear_model()))
    assert loaded.get("x", MinMax()).result() == store.get("x", MinMax()).result()
    with pytest.raises(DataError, match="were measured on another model"):
        load_statistics(path, "0" * 64)
    with pytest.raises(DataError, match="no statistics file"):
        load_statistics(tmp_path / "absent", "")


def test_model_hash_sees_every_change(tmp_path: Path) -> None:
    def other_weight(model: ir.Model) -> None:
        array = WEIGHT.copy()
        array[1, 2] = np.nextafter(array[1, 2], 4)
        model.graph.initializers["weight"].const_value = ir.tensor(array, name="weight")

    def other_node(model: ir.Model) -> None:
        list(model.graph)[2].op_type = "Abs"

    def other_name(model: ir.Model) -> None:
        model.graph.inputs[0].name = "input"

    def other_opset(model: ir.Model) -> None:
        model.opset_imports[""] = 20

    hashes = {model_hash(linear_model())}
    assert model_hash(linear_model()) in hashes
    assert model_hash(linear_model().clone()) in hashes
    for change in (other_weight, other_node, other_name, other_opset):
        model = linear_model()
        change(model)
        hashes.add(model_hash(model))
    assert len(hashes) == 5


def test_model_hash_is_that_of_the_bytes_wherever_they_lie(tmp_path: Path) -> None:
    ir.save(linear_model(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    stored = ir.load(tmp_path / "m.onnx")
    assert isinstance(stored.graph.initializers["weight"].const_value, ir.ExternalTensor)
    assert model_hash(stored) == model_hash(linear_model())


def test_hooks_name_modules_too() -> None:
    seen: list[str] = []
    model = linear_model()
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.layers.0', 'model.layers.0.q_proj', 'op']"
    calibrator(hooks=[Hook("model.layers.*.q_proj", lambda name, _: seen.append(name))]).run_hooks(model)
    assert set(seen) == {str(node.outputs[0].name)}


@dataclass(eq=False)
class Failing(RowCount):
    def update(self, batch: np.ndarray) -> None:
        raise ValueError("boom")


def test_a_users_statistic_that_fails_is_named_with_the_place() -> None:
    with pytest.raises(DataError, match=r"'block\.0/h'.*sample 0.*Failing.*ValueError: boom"):
        calibrator().collect(linear_model(), [Tap("block.0/h", Failing())], StatisticsStore())
