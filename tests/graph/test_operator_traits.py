"""The traits of operators: what each promises about numbers is run, and what a runtime has is looked up."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest

from qcompiler.graph.operators import (
    OPERATORS,
    Operator,
    has,
    multiplies_floats,
    reads_codes,
)
from qcompiler.graph.operators.row import TRAITS
from qcompiler.graph.operators.runtime import DOMAIN as RUNTIME
from tests.graph.test_operators import TABLES, identity, node, rows

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5
MORE: dict[str, list[np.ndarray]] = {
    "Expand": [np.array([2, 2, 3, 4])], "Gather": [np.array([1, 1])], "GatherElements": [np.ones((2, 3, 4), np.int64)],
    "GatherND": [np.array([[1, 2]])], "Reshape": [np.array([4, 6])],
    "Slice": [np.array([1]), np.array([3]), np.array([1])],
    "Squeeze": [], "Tile": [np.array([1, 2, 1])], "Unsqueeze": [np.array([0])], "Trilu": [], "Split": [],
    "Concat": [X + 100], "Div": [X + 9], "Mul": [X + 3],
}  # fmt: skip
SETTINGS: dict[str, dict[str, object]] = {
    "Concat": {"axis": 1}, "DepthToSpace": {"blocksize": 2}, "SpaceToDepth": {"blocksize": 2},
    "Split": {"axis": 2, "num_outputs": 2}, "Cast": {"to": 1}, "MaxPool": {"kernel_shape": [2]},
}  # fmt: skip
RANKS = {"DepthToSpace": (1, 4, 2, 3), "SpaceToDepth": (1, 1, 4, 6), "Squeeze": (2, 1, 12)}


def run(name: str, x: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node(name, [f"i{index}" for index in range(1 + len(others))],
                                   ["y", "rest"] if name == "Split" else ["y"], **SETTINGS.get(name, {}))],
            "g",
            [onnx.helper.make_tensor_value_info(f"i{index}", onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
                                                array.shape) for index, array in enumerate((x, *others))],
            [onnx.helper.make_tensor_value_info("y", 1, None)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
    )  # fmt: skip
    feed = {f"i{index}": array for index, array in enumerate((x, *others))}
    found: np.ndarray = onnx.reference.ReferenceEvaluator(model).run(None, feed)[0]
    return found


def named(*traits: str) -> list[str]:
    return [row.name for row in rows("") if row.traits.issuperset(traits)]


@pytest.mark.parametrize("name", named("moves"))
def test_what_moves_gives_numbers_that_it_reads(name: str) -> None:
    x = X if name not in RANKS else np.arange(24, dtype=np.float32).reshape(RANKS[name]) + 1
    x = np.maximum(X, 1) if name == "Trilu" else x  # which also writes zeros
    others = MORE.get(name, [])
    y = run(name, x, others)
    assert set(y.reshape(-1)) <= {*x.reshape(-1), *(MORE["Concat"][0].reshape(-1) if name == "Concat" else ()), 0.0}
    if has(node(name, 1), "whole"):
        assert set(y.reshape(-1)) == set(x.reshape(-1))
    if has(node(name, 1), "ordered"):
        np.testing.assert_array_equal(y.reshape(-1), x.reshape(-1))
    if has(node(name, 1), "elementwise"):
        assert y.shape == x.shape


@pytest.mark.parametrize("name", named("homogeneous"))
def test_a_factor_of_the_first_input_is_one_of_the_output(name: str) -> None:
    x = X if name not in RANKS else np.arange(24, dtype=np.float32).reshape(RANKS[name]) + 1
    others = MORE.get(name, [])
    np.testing.assert_allclose(run(name, x * 4, others), run(name, x, others) * 4, rtol=1e-6)


@pytest.mark.parametrize("name", named("bilinear"))
def test_a_factor_of_the_second_input_is_one_of_the_output(name: str) -> None:
    x, other = X[0], X[1].T.copy() if name == "MatMul" else X[1]
    np.testing.assert_allclose(run(name, x, [other * 4]), run(name, x, [other]) * 4, rtol=1e-6)


MOVING = [
    "Cast", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
    "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
]  # fmt: skip


def changed_places(name: str, x: np.ndarray, others: list[np.ndarray]) -> set[int]:
    """Which numbers of the output another one at place 5 of the input changes."""
    other = x.copy()
    other.reshape(-1)[5] += 1
    return set(np.flatnonzero((run(name, x, others) != run(name, other, others)).reshape(-1)))


@pytest.mark.parametrize("name", [*MOVING, "Add", "CumSum", "Div", "Mul", "ReduceSum", "Relu", "Sub"])
def test_an_operator_has_the_traits_that_its_numbers_show(name: str) -> None:
    """Not only those that it has hold: it has all that do."""
    x = np.sqrt(np.arange(2, 26, dtype=np.float32)).reshape(RANKS.get(name, X.shape))
    x[..., 0] *= -1
    others = {"CumSum": [np.array(1)], "Add": [X + 9], "Sub": [X + 9]}.get(name, MORE.get(name, []))
    y = run(name, x, others)
    read = {*x.reshape(-1), *(others[0].reshape(-1) if name == "Concat" else ()), *((0.0,) if name == "Trilu" else ())}
    shown = {
        "moves": read.issuperset(y.reshape(-1)),
        "whole": set(y.reshape(-1)) == set(x.reshape(-1)),
        "ordered": y.size == x.size and bool(np.all(y.reshape(-1) == x.reshape(-1))),
        "homogeneous": np.allclose(run(name, x * 4, others), y * 4) and name != "Concat",  # all of it, from one input
        "elementwise": y.shape == x.shape and changed_places(name, x, others) == {5} and name != "Trilu",
    }
    if name not in ("CumSum", "ReduceSum"):  # sums are told by other traits
        assert {trait for trait, holds in shown.items() if holds} == OPERATORS["", name].traits & shown.keys()
    else:
        assert not shown["moves"]


@pytest.mark.parametrize("name", named("reduction"))
def test_reductions_take_an_axis_away(name: str) -> None:
    SETTINGS.setdefault(name, {"keepdims": 0})
    x = np.abs(X) + 1
    whole = run(name, x, [np.array([1])])
    assert whole.shape == (2, 4)
    extreme = np.isin(whole, x).all()
    assert extreme == (not has(node(name, 1), "accumulates"))


@pytest.mark.parametrize("name", named("measures"))
def test_what_measures_reads_no_numbers(name: str) -> None:
    np.testing.assert_array_equal(run(name, X, []), run(name, X * -3, []))


@pytest.mark.parametrize("name", named("random"))
def test_what_is_random_is_so_by_its_schema(name: str) -> None:
    """A seed is what tells operators that give other numbers in every run."""
    assert "seed" in onnx.defs.get_schema(name, 21, "").attributes


def test_all_of_onnx_that_is_random_has_a_row() -> None:
    seeded = {
        schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain and "seed" in schema.attributes
    }
    assert seeded - {"Dropout"} == set(named("random"))  # which gives what it reads, but in training


@pytest.mark.parametrize("name", named("picks"))
def test_what_picks_is_told_what(name: str) -> None:
    assert OPERATORS["", name].places("index")


@pytest.mark.parametrize("operator", [row for row in rows(RUNTIME) if "half" in row.traits], ids=identity)
def test_cuda_has_the_runtimes_operators_in_16_bits(operator: Operator) -> None:
    types = {kind for table in TABLES[1:] for kernel in table.kernels
             if (kernel.domain or RUNTIME, kernel.op) == (operator.domain, operator.name) for _, kinds in kernel.types
             for kind in kinds}  # fmt: skip
    assert "float16" in types


def test_what_computes_in_16_bits_and_what_is_moved_past() -> None:
    """Two traits that are choices of ONNX Runtime's, and of ours: which of its operators convert-float converts."""
    assert {row.name for row in OPERATORS.values() if "half" in row.traits} == {
        "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "GroupQueryAttention",
        "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding",
        "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    }  # fmt: skip
    assert set(named("propagates")) == {
        "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
    }  # fmt: skip


def test_every_trait_is_of_use() -> None:
    assert {trait for row in OPERATORS.values() for trait in row.traits} == TRAITS


@pytest.mark.parametrize(
    ("domain", "name", "floats", "codes"),
    [
        ("", "MatMul", True, False),
        ("", "Conv", True, False),
        (RUNTIME, "FusedMatMul", True, False),
        ("", "MatMulInteger", False, True),
        (RUNTIME, "MatMulNBits", False, True),
        (RUNTIME, "GroupQueryAttention", False, False),  # its cache may hold codes; it is not made for them
        ("", "QuantizeLinear", False, True),
        ("", "DynamicQuantizeLinear", False, True),
        ("", "Add", False, False),
        ("other", "MatMul", False, False),
    ],
)
def test_products_of_floats_and_of_codes(domain: str, name: str, floats: bool, codes: bool) -> None:
    one = node(name, 3, domain=domain)
    assert (multiplies_floats(one), reads_codes(one)) == (floats, codes)
