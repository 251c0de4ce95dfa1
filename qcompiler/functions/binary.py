"""Binary weights: the sign of each weight in one bit, and the mean magnitude of its output channel or group.

W[n, k] ≈ α · sign(W[n, k]), α = mean |W| over what shares the scale: the nearest such matrix (Rastegari et al. 2016,
"XNOR-Net", eq. 6). ONNX has no type of one bit, so eight signs go into a byte, and a model-local function reads them:

    W = DequantizeBinary(bits, scale)       float [N, K]
      bits           uint8 [N, ⌈K / 8⌉], the first of eight in the lowest bit; a set bit stands for +1, another for -1
      scale          float32 [N], or [N, ⌈K / block_size⌉] where groups of inputs have their own
      in_features    K
      block_size     inputs that share a scale; K where the channel has one
      output_dtype   the type of W, as a number of onnx.TensorProto

    codes = UnpackBinary(bits)              int8 [8 · ⌈K / 8⌉, N], -1 and +1, which integer kernels multiply by

ONNX Runtime computes both once, when it opens the model: in memory, a weight takes the bytes of the unpacked form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompiler.formats.arithmetic import Array, slices
from qcompiler.functions.library import DOMAIN, register
from qcompiler.graph.edit import constant, node_graph
from qcompiler.graph.lazy import derived
from qcompiler.graph.rewriter import Rewriter

FORMAT = "binary"
DEQUANTIZE = "DequantizeBinary"
UNPACK = "UnpackBinary"
SMALLEST_BITS = 2
"""Of the codes that MatMulNBits takes."""


def is_binary(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether a node decodes a binary weight."""
    return node is not None and node.domain == DOMAIN and node.op_type == DEQUANTIZE


def weight_shape(node: ir.Node) -> tuple[int, int]:
    """[N, K] of the weight that a DequantizeBinary decodes."""
    bits = constant(node.inputs[0])
    assert bits is not None  # recognisers only report constants
    return int(bits.shape[0]), node.attributes.get_int("in_features", 0)  # type: ignore[arg-type]


def add_binary_function(model: ir.Model, name: str) -> str:
    """Give the model `DEQUANTIZE` or `UNPACK`, and return the name."""
    return register(model, name, _dequantize if name == DEQUANTIZE else _unpack)


def packed_signs(tensor: ir.TensorProtocol, channel_axis: int, name: str) -> ir.TensorProtocol:
    """The bits [N, ⌈K / 8⌉] of a float constant whose output channels lie along `channel_axis`; 0 counts as positive.

    They are computed when they are written.
    """
    shape = tuple(int(size) for size in tensor.shape.numpy())
    rows, features = shape[channel_axis], shape[1 - channel_axis]

    def pack(data: Array) -> npt.NDArray[np.uint8]:
        weight = data if channel_axis == 0 else data.T
        bits = np.empty((rows, -(-features // 8)), np.uint8)
        for part in slices(weight.shape):
            bits[part] = np.packbits(~(weight[part] < 0), axis=1, bitorder="little")
        return bits

    return derived(tensor, pack, ir.DataType.UINT8, (rows, -(-features // 8)), name)


def unpacked_signs(bits: Array, features: int) -> npt.NDArray[np.int8]:
    """-1 and +1 [N, features] of bits [N, ⌈features / 8⌉]."""
    ones = np.unpackbits(np.asarray(bits), axis=1, count=features, bitorder="little")
    signs: npt.NDArray[np.int8] = 2 * ones.view(np.int8) - np.int8(1)
    return signs


def channel_scales(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The scales [N] of a DequantizeBinary; None where groups have their own, or where they are computed."""
    scale = constant(node.inputs[1])
    if scale is None or len(scale.shape) != 1:
        return None
    return scale.numpy().astype(np.float32, copy=False)


def int8_codes(node: ir.Node, rw: Rewriter) -> ir.Value:
    """-1 and +1 as int8 [K, N], unpacked by nodes that stand before the DequantizeBinary `node`.

    No two codes add up to more than 2, so that every integer kernel is exact on them.
    """
    rows, features = weight_shape(node)
    graph, base, whole = node_graph(node), f"{node.inputs[0].name}.signs", -(-features // 8) * 8  # type: ignore[union-attr]
    unpack = rw.node(
        add_binary_function(rw.model, UNPACK), [node.inputs[0]], base, domain=DOMAIN, dtype=ir.DataType.INT8,
        shape=ir.Shape((whole, rows)),
    )  # fmt: skip
    new, codes = [unpack], unpack.outputs[0]
    if features < whole:
        start = rw.constant(f"{base}.start", np.array([0], np.int64), graph)
        end = rw.constant(f"{base}.end", np.array([features], np.int64), graph)
        shape = ir.Shape((features, rows))
        new.append(rw.node("Slice", [codes, start, end], f"{base}.cut", like=codes, shape=shape))
        codes = new[-1].outputs[0]
    rw.insert_before(node, new)
    return codes


# Both functions look bytes up in a table [256, 8] of signs: every step in the place of that would make another array as
# large as the weight, and ONNX Runtime keeps all of them until the session is made.


def _dequantize() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Dequantize(bits, scale, in_features: int, block_size: int, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        numbers = op.Range(op.Constant(value_int=0), op.Constant(value_int=256), op.Constant(value_int=1))
        byte = op.Unsqueeze(op.Cast(numbers, to=_UINT8), op.Constant(value_ints=[1]))
        is_set = op.Cast(op.BitwiseAnd(byte, op.Constant(value=_PLACES)), to=_BOOL)
        table = op.Cast(op.Where(is_set, op.Constant(value_float=1.0), op.Constant(value_float=-1.0)), to=_INT8)
        in_rows = op.Reshape(op.Gather(table, op.Cast(bits, to=_INT32)), op.Constant(value_ints=[0, -1]))
        features = op.Constant(value_int=in_features)
        end = op.Reshape(features, op.Constant(value_ints=[1]))
        signs = op.Slice(in_rows, op.Constant(value_ints=[0]), end, op.Constant(value_ints=[1]))
        inputs = op.Range(op.Constant(value_int=0), features, op.Constant(value_int=1))
        blocks = op.Div(inputs, op.Constant(value_int=block_size))
        magnitude = op.Gather(op.Reshape(scale, op.Constant(value_ints=[0, -1])), blocks, axis=1)
        return op.Cast(op.Mul(op.Cast(signs, to=_FLOAT), magnitude), to=output_dtype)

    return Dequantize


def _unpack() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Unpack(bits):  # type: ignore[no-untyped-def]  # noqa: N802
        numbers = op.Range(op.Constant(value_int=0), op.Constant(value_int=256), op.Constant(value_int=1))
        byte = op.Unsqueeze(op.Cast(numbers, to=_UINT8), op.Constant(value_ints=[1]))
        is_set = op.Cast(op.BitwiseAnd(byte, op.Constant(value=_PLACES)), to=_BOOL)
        table = op.Cast(op.Where(is_set, op.Constant(value_float=1.0), op.Constant(value_float=-1.0)), to=_INT8)
        in_rows = op.Reshape(op.Gather(table, op.Cast(bits, to=_INT32)), op.Constant(value_ints=[0, -1]))
        return op.Transpose(in_rows, perm=[1, 0])

    return Unpack


_BOOL, _FLOAT = onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
_INT8, _UINT8, _INT32 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32
_PLACES = onnx.numpy_helper.from_array(1 << np.arange(8, dtype=np.uint8), "places")
