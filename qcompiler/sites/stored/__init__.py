"""How weights are stored, in whatever form: of float constants, of what nodes decode, and of what kernels multiply by.

weight = quantized_weight(node)         of a DequantizeLinear, a function of ours that decodes, or a kernel
weight = operand_weight(value)          of what a plain operator reads
weight.scheme                           int4 group(32) symmetric
weight.bytes, weight.constants          what the file stores
weight.pieces()                         the numbers that the codes stand for, a bounded part at a time
"""

from qcompiler.sites.stored.readers import (
    coded_weight,
    float_weight,
    operand_weight,
    quantized_weight,
    table_weight,
)
from qcompiler.sites.stored.weight import StoredWeight, format_of

__all__ = [
    "StoredWeight", "coded_weight", "float_weight", "format_of", "operand_weight", "quantized_weight",
    "table_weight",
]  # fmt: skip
