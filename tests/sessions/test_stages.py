"""A model that is rewritten stage by stage is measured on what the earlier stages made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.edit import Names, set_constant
from qcompiler.sessions import segments
from qcompiler.sessions.stages import plan_stages, run_stages
from tests.sessions.test_segments import LAYERS, tokens, transformer

WANTED = [{f"n_{i}", f"om_{i}"} for i in range(LAYERS)] + [{"last"}]


def halve(model: ir.Model, layer: int, names: Names) -> None:
    """Change the weights of one layer, as quantization would."""
    for node in model.graph:
        if node.outputs[0].name in (f"q_{layer}", f"k_{layer}", f"h_{layer + 1}"):
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            set_constant(node, 1, np.round(weight.const_value.numpy() * 4) / 8, names)


def measured_by_hand(samples: list[dict[str, np.ndarray]]) -> dict[tuple[str, int], np.ndarray]:
    model, found = transformer(), {}
    names = Names(model.graph)
    for layer, wanted in enumerate(WANTED):
        segments.run(model, samples, wanted, lambda name, index, array: found.update({(name, index): array}))
        if layer < LAYERS:
            halve(model, layer, names)
    return found


@pytest.mark.parametrize("memory_limit", [None, 1 << 14])
def test_each_stage_reads_what_the_earlier_ones_answer(memory_limit: int | None) -> None:
    samples, model = tokens(), transformer()
    names, seen = Names(model.graph), {}
    order: list[int] = []

    def rewrite(members: Sequence[int]) -> None:
        order.extend(members)
        for member in members:
            if member < LAYERS:
                halve(model, member, names)

    def consume(name: str, index: int, array: np.ndarray) -> None:
        assert (name, index) not in seen
        seen[name, index] = array

    run_stages(model, samples, WANTED, consume, rewrite, memory_limit=memory_limit)
    expected = measured_by_hand(samples)
    assert order == list(range(LAYERS + 1))
    assert seen.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(seen[key], array)
    unchanged = {}
    segments.run(transformer(), samples, {"last"}, lambda name, index, array: unchanged.update({index: array}))
    assert not np.allclose(seen["last", 0], unchanged[0])


def test_a_stage_is_a_block() -> None:
    stages = plan_stages(transformer().graph, WANTED)
    assert [stage.members for stage in stages] == [(i,) for i in range(LAYERS + 1)]
    assert [stage.measured.outputs for stage in stages[:2]] == [("n_0", "om_0"), ("n_1", "om_1")]
    assert all(not stage.known for stage in stages)
    assert stages[-1].forward is None
    # what passes on: the two halves of the residual stream, and the mask
    assert stages[0].forward is not None
    assert stages[0].forward.outputs == ("h_1", "wide", "zero_1")


def test_finished_stages_are_run_once_and_not_measured() -> None:
    samples, model, seen = tokens(), transformer(), set()
    names = Names(model.graph)

    def answer(members: Sequence[int]) -> None:
        for member in members:
            if member < LAYERS:
                halve(model, member, names)

    run_stages(
        model, samples, WANTED, lambda name, index, array: seen.add(name), answer,
        done=lambda members: max(members) < 2,
    )  # fmt: skip
    assert seen == set().union(*WANTED[2:])


def test_what_no_cut_divides_is_one_stage() -> None:
    """The second stage measures a value that the first one's reader needs, too."""
    stages = plan_stages(transformer().graph, [{"n_0", "om_1"}, {"n_1"}, {"n_3"}])
    assert [stage.members for stage in stages] == [(0, 1), (2,)]


def test_inputs_of_the_graph_can_be_measured() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y)
        { a = Add (x, x) b = Mul (a, x) y = Sub (b, a) }"""
    )
    seen = []
    run_stages(
        model, [{"x": np.ones(2, np.float32)}], [{"x"}, {"a"}, {"b"}],
        lambda name, index, array: seen.append((name, array[0])), lambda members: None,
    )  # fmt: skip
    assert sorted(seen) == [("a", 2.0), ("b", 2.0), ("x", 1.0)]
