"""Weights in NF4 and FP4 as com.microsoft.MatMulBnb4 stores them.

The codes of [outputs, inputs] in one row, two in a byte, the first in the *high* half (MatMulNBits has it in the low
one), and the largest magnitude of each block of that row; a block may reach from one output into the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.lazy import derived

KERNEL = "MatMulBnb4"
QUANT_TYPES = {"fp4_bnb": 0, "nf4": 1}
"""The operator's attribute quant_type for each format."""
LEAST_BLOCK = 16


def obstacle(format: str, block: int) -> str | None:
    """Why the operator cannot decode such a format in such blocks, or None."""
    if format not in QUANT_TYPES:
        return f"the operator's tables are those of nf4 and fp4, and none is that of {format}"
    if block < LEAST_BLOCK or block & (block - 1):
        return f"blocks of {block} weights are no power of two from {LEAST_BLOCK} on, as the operator's are"
    return None


def packed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """uint8 [⌈outputs · inputs / 2⌉] of a constant [outputs, inputs] of codes 0 … 15."""
    count = int(np.prod(tensor.shape.numpy()))

    def arrange(data: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        codes = np.zeros(count + count % 2, np.uint8)
        codes[:count] = data.reshape(-1)
        joined: npt.NDArray[np.uint8] = codes[0::2] << np.uint8(4) | codes[1::2]
        return joined

    return derived(tensor, arrange, ir.DataType.UINT8, ((count + 1) // 2,), name)
