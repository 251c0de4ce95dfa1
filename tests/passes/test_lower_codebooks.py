"""lower-weight-only on NF4 and FP4: MatMulBnb4 multiplies by weights that a function of the portable graph decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.lower_embedding import LowerEmbedding
from passes.lower_weight_only import LowerWeightOnly
from passes.nf4 import Nf4
from qcompiler.formats.codebooks import CODEBOOKS
from qcompiler.lowering.bnb4 import obstacle, packed
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.passes.test_lower_weight_only import ADD, ALL, GEMM, MATMUL, assert_same, model_of
from tests.there import operand, tensors, there


def lower(model: ir.Model, half_precision: bool = False, **options: Any) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes)."""
    portable = model.clone()
    tiny.compile(portable, [Nf4(**options)], [])
    lowered = portable.clone()
    changes, _ = tiny.compile(lowered, [LowerWeightOnly(half_precision=half_precision), LowerEmbedding()], [])
    return portable, lowered, changes


@pytest.mark.parametrize("double_quantization", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize(("features", "block"), [(64, 64), (128, 32), (40, 16), (37, 64)])
@pytest.mark.parametrize("layer", [MATMUL, ADD, GEMM], ids=["matmul", "add", "gemm"])
def test_the_operator_gives_what_the_graph_means(
    layer: str, features: int, block: int, table: str, double_quantization: bool
) -> None:
    """Blocks within rows and over their ends."""
    model = model_of(layer, features)
    options: dict[str, Any] = {"table": table, "block_size": block, "double_quantization": double_quantization}
    portable, lowered, changes = lower(model, **options)
    assert [(changed.kernel, changed.site) for changed in changes.changed] == [("MatMulBnb4", "fc")]
    assert set(tiny.operators(lowered)) <= {"MatMulBnb4", "Add"}
    assert not lowered.functions
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


@pytest.mark.parametrize("half_precision", [False, True])
def test_half_precision(half_precision: bool) -> None:
    """CUDA's operator takes the model's own type; the CPU's takes float32, between Casts."""
    model = model_of(ALL["matmul"], 64, half=True)
    portable, lowered, _ = lower(model, half_precision)
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulBnb4")
    assert operand(kernel, 2).dtype == (ir.DataType.FLOAT16 if half_precision else ir.DataType.FLOAT)
    assert ("Cast" in tiny.operators(lowered)) != half_precision
    if not half_precision:
        assert_same(portable, lowered, tiny.feeds(model), 2e-3)


@pytest.mark.parametrize("half_precision", [False, True])
def test_double_precision_runs_in_float(half_precision: bool) -> None:
    """No operator takes double."""
    model = tiny.build("g (double[M,64] x, double[64,6] W) => (double[M,6] y) { y = MatMul(x, W) }", W="normal")
    portable, lowered, _ = lower(model, half_precision)
    assert tiny.operators(lowered) == ["Cast", "MatMulBnb4", "Cast"]
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


def test_the_first_code_is_in_the_high_half() -> None:
    codes = ir.Tensor(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8), dtype=ir.DataType.UINT4)
    np.testing.assert_array_equal(packed(codes, "pairs").numpy(), [0x12, 0x34, 0x56, 0x78, 0x90])


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_what_the_operator_takes_codes_for(table: str) -> None:
    """Every code once, multiplied by the columns of a unit matrix."""
    model = model_of(GEMM.replace("6]", "1]").replace("[6,", "[1,"), 16)
    _, lowered, _ = lower(model, table=table, block_size=16, double_quantization=False)
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulBnb4")
    operand(kernel, 1).const_value = packed(ir.Tensor(codes, dtype=ir.DataType.UINT4), "pairs")
    operand(kernel, 2).const_value = ir.tensor(np.array([3], np.float32))
    lowered.graph.initializers["b"].const_value = ir.tensor(np.zeros(1, np.float32))
    got = tiny.run(lowered, {"x": np.eye(16, dtype=np.float32)})[0]
    format = {"nf4": "nf4", "fp4": "fp4_bnb"}[table]
    np.testing.assert_allclose(got[:, 0], 3 * CODEBOOKS[format].table, rtol=1e-6)


def test_layers_that_share_a_weight_share_it_lowered() -> None:
    model = tiny.build(
        """g (float[B,S,32] x, float[32,32] W) => (float[B,S,32] z) {
        [first] y = MatMul(x, W)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        W="normal",
    )
    portable, lowered, changes = lower(model)
    assert len(changes.changed) == 2
    assert sum(constant.nbytes == 512 for constant in tensors(lowered).values()) == 1
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


def test_functions_stay_while_a_layer_needs_them() -> None:
    model = model_of(MATMUL, 64)
    portable, lowered, changes = lower(model, block_size=48)
    assert "power of two" in tiny.reasons(changes)["fc"]
    assert lowered.functions
    assert_same(portable, lowered, tiny.feeds(model), 1e-6)


def test_blocks_along_the_outputs_are_skipped_with_the_reason() -> None:
    """As a model from elsewhere may have it: the matrix of codes is [K, N]."""
    model = tiny.build("g (float[M,64] x, float[64,64] W) => (float[M,64] y) { [fc] y = MatMul(x, W) }", W="normal")
    tiny.compile(model, [Nf4(double_quantization=False)], [])
    (site,) = find_sites(model).linears
    site.node.replace_input_with(1, there(site.dequantize).outputs[0])
    changes = LowerWeightOnly().apply(model, StatisticsStore())
    assert tiny.reasons(changes) == {
        "fc": "the blocks of its weight run along its outputs, and the operator's along the inputs"
    }


def test_tables_that_the_operator_does_not_have() -> None:
    assert obstacle("nf4", 64) is None
    assert obstacle("own", 64) == "the operator's tables are those of nf4 and fp4, and none is that of own"
