"""Model-local functions, domain ``qcompiler``: what standard ONNX has no operator for, written in standard operators.

ONNX Runtime, and whatever reads ONNX, runs them as they are; a pass and a diff see one node.

    DequantizeNF4(codes, scale)                a float matrix from 4-bit indices into a table; DequantizeFP4 likewise
      codes          uint4 [N, K]              a row for each output; N · K codes in blocks, one after the other
      scale          float32 [⌈N · K / block_size⌉]
      block_size     weights that share a scale; the last block may be shorter
      output_dtype   the type of the result, as a number of onnx.TensorProto

`token_functions.py` has those that quantize activations, a scale for each token.

Blocks run over the ends of rows where `block_size` does not divide K, as in bitsandbytes and ONNX Runtime's MatMulBnb4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompiler.formats.arithmetic import dequantize
from qcompiler.formats.codebooks import CODEBOOKS
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import functions

DOMAIN, VERSION = functions.DOMAIN, 1
FORMATS = {codebook.function: format for format, codebook in CODEBOOKS.items()}
"""The number format that each function decodes."""


def codebook_format(node: ir.Node) -> str | None:
    """The number format that a node decodes, nf4 or fp4_bnb, or None where it is no such node."""
    return FORMATS.get(node.op_type) if node.domain == DOMAIN else None


def add_function(model: ir.Model, format: str) -> str:
    """Give the model the function that decodes a format, and return the function's name."""
    return register(model, CODEBOOKS[format].function, lambda: _function(format))


def register(model: ir.Model, name: str, script: Callable[[], Callable[..., Any]]) -> str:
    """Give the model the function of this name, unless it has it, and return the name.

    `script` gives the function as onnxscript reads it: operators of `onnxscript.opset21` on values, keyword attributes
    with their types. It is compiled for the opset of the model.
    """
    if (DOMAIN, name, "") not in model.functions:
        function = _compiled(name, script())
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION
    return name


def remove_unused_functions(model: ir.Model) -> None:
    """Drop the functions of this domain that no node calls any more."""
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key not in used]:
        del model.functions[identifier]
    if not any(domain == DOMAIN for domain, _, _ in model.functions):
        model.graph.opset_imports.pop(DOMAIN, None)


def _compiled(name: str, body: Callable[..., Any]) -> ir.Function:
    from onnxscript import script
    from onnxscript.values import Opset

    proto = script(Opset(DOMAIN, VERSION))(body).to_function_proto()
    proto.name = name
    function: ir.Function = ir.from_proto(proto)
    return function


def block_scales(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The scales [blocks] that a DequantizeNF4 or -FP4 reads; None where they depend on the model's inputs.

    They are a constant, or, quantized once more, DequantizeLinear(codes, scale) + offset of constants.
    """
    scale = node.inputs[1]
    tensor = constant(scale)
    if tensor is not None:
        return tensor.numpy().astype(np.float32)
    add = scale.producer() if scale is not None else None
    if add is None or add.op_type != "Add" or len(add.inputs) != 2 or add.inputs[0] is None:
        return None
    second, offset = add.inputs[0].producer(), constant(add.inputs[1])
    if second is None or second.op_type != "DequantizeLinear" or len(second.inputs) != 2 or offset is None:
        return None
    codes, of_codes = (constant(value) for value in second.inputs)
    if codes is None or of_codes is None:
        return None
    block_size = second.attributes.get_int("block_size")
    restored = dequantize(codes.numpy(), of_codes.numpy(), None, None if block_size is None else 0, block_size)
    return restored + offset.numpy().astype(np.float32)


def _function(format: str) -> Callable[..., Any]:
    """The function in onnxscript: codes → entries of the table → rows of `block_size` → times the scales."""
    from onnxscript import opset21 as op

    table = onnx.numpy_helper.from_array(CODEBOOKS[format].table, "table")

    # Few operators of ONNX Runtime read 4 bits, so the codes are cast before anything else.
    def Dequantize(codes, scale, block_size: int, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        indices = op.Cast(codes, to=onnx.TensorProto.INT32)
        flat = op.Reshape(op.Gather(op.Constant(value=table), indices), op.Constant(value_ints=[-1]))
        count = op.Reshape(op.Size(indices), op.Constant(value_ints=[1]))
        size = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
        missing = op.Sub(op.Mul(op.Size(scale), size), count)
        whole = op.Pad(flat, op.Concat(op.Constant(value_ints=[0]), missing, axis=0))
        blocks = op.Reshape(whole, op.Concat(op.Constant(value_ints=[-1]), size, axis=0))
        scaled = op.Mul(blocks, op.Unsqueeze(scale, op.Constant(value_ints=[1])))
        weights = op.Slice(op.Reshape(scaled, op.Constant(value_ints=[-1])), op.Constant(value_ints=[0]), count)
        return op.Cast(op.Reshape(weights, op.Shape(indices)), to=output_dtype)

    return Dequantize
