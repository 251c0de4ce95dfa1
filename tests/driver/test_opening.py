"""What onnxruntime does not open is no result: neither the model that comes in nor the one that goes out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import qcompiler
from qcompiler.driver import inputs, opening
from qcompiler.errors import ModelError, PassError
from qcompiler.recipes import Recipe
from tests import tiny


def refused(folder: Path) -> Path:
    """A model that is well-formed but for an axis that its input does not have."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        helper.make_node("Softmax", ["h"], ["y"], name="norm", axis=7),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def linear() -> ir.Model:
    return tiny.build("m (float[n, 8] x, float[8, 8] w) => (float[n, 8] y) { y = MatMul (x, w) }", w="normal")


@pytest.mark.parametrize("kind", ["file", "folder", "model"])
def test_a_model_that_does_not_open_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = refused(tmp_path)
    monkeypatch.setattr("qcompiler.driver.pipeline.run", lambda *_: pytest.fail("work was done"))
    model: Path | ir.Model = {"file": path, "folder": tmp_path}.get(kind) or ir.load(path)
    with pytest.raises(ModelError, match=r"the model does not run as it comes: .*; repair or export it again"):
        qcompiler.compile(model, "rtn-w4")


def broken(change: Callable[[ir.Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last step of a compilation break the graph."""
    finish = inputs.finish

    def finished(graph: ir.Model, recipe: Recipe) -> None:
        finish(graph, recipe)
        change(graph)

    monkeypatch.setattr(inputs, "finish", finished)


def unknown_axis(model: ir.Model) -> None:
    last = model.graph.node(len(model.graph) - 1)
    value = last.outputs[0]
    node = ir.Node("", "Softmax", [last.inputs[0]], [ir.AttrInt64("axis", 9)], num_outputs=1, name="extra")
    model.graph.insert_before(last, node)
    value.shape = None
    last.replace_input_with(0, node.outputs[0])


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_result_that_does_not_open_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool) -> None:
    broken(unknown_axis, monkeypatch)
    data = [{"x": np.ones((3, 8), np.float32)}] * 3
    with pytest.raises(PassError, match="does not open, though the float model does"):
        qcompiler.compile(linear(), "rtn-w4", calibration=data if calibrated else None, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_copy_is_gone_afterwards_and_one_of_a_killed_run_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "work" / "written"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    with opening.written(qcompiler.compile(linear(), "rtn-w4").model, tmp_path / "work", lean=False) as opened:
        assert opened is not None
        assert opened().run(None, {"x": np.ones((1, 8), np.float32)})[0].shape == (1, 8)
        assert left.exists()
    assert not (tmp_path / "work").exists()


def test_what_only_the_optimizer_refuses_is_no_defect_of_ours(tmp_path: Path) -> None:
    bodies = [
        helper.make_graph(
            [helper.make_node("Identity", ["h"], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
        )
        for name in ("a", "b")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    constants = [onnx.numpy_helper.from_array(array, name)
                 for name, array in (("w", np.eye(4, dtype=np.float32)), ("c", np.zeros(0, bool)))]  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"does not run as it comes: .*single boolean element; repair"):
        qcompiler.compile(tmp_path / "m.onnx", "rtn-w4")


def test_a_kernel_that_only_the_older_opset_has(tmp_path: Path) -> None:
    """LeakyRelu in double is a function of ONNX's, which onnxruntime has no body of in opset 21."""
    w = onnx.numpy_helper.from_array(np.eye(4), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("LeakyRelu", ["h"], ["y"], name="act")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [w])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    assert opening.check_input(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"though the float model does: .*LeakyRelu.* of opset 21 now; export"):
        qcompiler.compile(tmp_path / "m.onnx", "rtn-w4")
    assert qcompiler.compile(tmp_path / "m.onnx", "rtn-w4", target="ort-cuda").report.exit_code == 0


def test_a_model_without_a_kernel_here_is_no_broken_one() -> None:
    model = tiny.build("m (float8e4m3fn[n, 8] x) => (float8e4m3fn[n, 8] y) { y = Add (x, x) }")
    with pytest.raises(ModelError):
        opening.check_input(model)
    wide = tiny.build("m (double[n, 8] x) => (double[n, 8] y) { y = HardSwish (x) }")
    assert not opening.check_input(wide)  # CPUs have it for float
    with opening.written(wide, None, lean=True) as opened:
        assert opened is None
