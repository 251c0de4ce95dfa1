"""lower-weight-only for CUDA: the blocks that the fused kernel takes, and what is said of layers that it does not."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from passes.lower_weight_only import fused_obstacle
from tests import tiny
from tests.passes.test_lower_weight_only import MATMUL, assert_same, lower, model_of


@pytest.mark.parametrize(
    ("format", "outputs", "features", "group", "half", "symmetric", "says"),
    [
        ("int4", 64, 64, 32, True, True, "32, fpA_intB"),
        ("int4", 64, 256, 128, True, True, "32, fpA_intB"),
        ("int8", 32, 64, 64, True, True, "32, fpA_intB"),
        ("int2", 128, 128, 128, True, True, "64, fpA_intB"),
        ("int4", 96, 64, 32, True, True, "dequantized from 17 tokens on: N = 96 is no multiple of 64"),
        ("int8", 48, 64, 32, True, True, "dequantized from 6 tokens on: N = 48 is no multiple of 32"),
        ("int2", 64, 64, 64, True, True, "dequantized from 9 tokens on: N = 64 is no multiple of 128"),
        ("int4", 64, 80, 32, True, True, "K = 80 is no multiple of 64"),
        ("int8", 64, 96, 64, True, True, "K = 96 is no multiple of 64"),
        ("int4", 64, 64, 16, True, True, "its blocks are 16 wide, not 32"),
        ("uint4", 64, 64, 32, True, False, "its codes have zero points"),
        ("int4", 64, 64, 32, False, True, "the model computes in float, not in 16 bits"),
    ],
)
def test_which_layers_the_fused_kernel_takes(
    format: str, outputs: int, features: int, group: int, half: bool, symmetric: bool, says: str
) -> None:
    model = model_of(MATMUL.replace("6]", f"{outputs}]"), features, half=half)
    weights = {"format": format, "granularity": "group", "group_size": group, "symmetric": symmetric}
    portable, lowered, changes = lower(model, weights, fused_kernel=True, half_precision=True, accuracy_level=0)
    assert changes.changed[0].detail.endswith(says)
    assert_same(portable, lowered, tiny.feeds(model), 2e-3)


def test_a_scale_for_each_channel_goes_into_the_blocks_of_the_fused_kernel() -> None:
    for format, block in (("int2", 64), ("int4", 32), ("int8", 32)):
        model = model_of(MATMUL.replace("6]", "128]"), 128, half=True)
        _, lowered, changes = lower(model, {"format": format}, fused_kernel=True, half_precision=True, block_size=32)
        (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
        assert kernel.attributes.get_int("block_size") == block
        assert changes.changed[0].detail.endswith("fpA_intB")


@pytest.mark.parametrize("weights", [{}, {"granularity": "group", "group_size": 32}], ids=["channel", "group"])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_layers_on_which_the_fused_kernel_would_fail_get_other_blocks(format: str, weights: dict[str, Any]) -> None:
    """ONNX Runtime would choose it for 96 inputs in blocks of 32, and find no tactic when it runs."""
    model = model_of(MATMUL.replace("6]", "64]"), 96, half=True)
    options = {"fused_kernel": True, "half_precision": True, "block_size": 32, "accuracy_level": 0}
    portable, lowered, _ = lower(model, {"format": format, **weights}, **options)
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
    assert kernel.attributes.get_int("block_size") == 16
    assert_same(portable, lowered, tiny.feeds(model), 2e-3)


def test_bfloat16_is_taken_by_the_fused_kernel() -> None:
    assert fused_obstacle(4, 32, 64, 64, ir.DataType.BFLOAT16, zero_points=False) == ""
