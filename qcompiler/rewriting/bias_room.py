"""Room for biases: onnxruntime makes int32 codes of a float bias, in steps of input scale × weight scale, unchecked.

Where the weights of an output channel are almost zero, as in channels that training has switched off, a common bias is
more than 2³¹ of these steps, and the smallest int32 takes its place. A larger weight scale costs nothing that counts:
with `BIAS_LIMIT` steps in the bias, one step of a weight moves the sum by a 4-millionth of the bias at most.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import Array
from qcompiler.graph.edit import constant
from qcompiler.graph.lazy import derived
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.activations import Static, activation_of
from qcompiler.sites.find import Convolution, Linear, weight_decoder

BIAS_LIMIT = 2**30
"""Steps; half of what int32 holds, as the scale may be rounded down and float32 is not exact there."""


def make_room(site: Linear | Convolution, rw: Rewriter) -> bool:
    """Raise scales of the site's weight until its bias fits, and lower the codes alike; whether any was raised.

    A layer that adds its bias outside of the operator, or whose scales are not constants, is left as it is.
    """
    bias, step, decoder = _own_bias(site), _input_scale(site), weight_decoder(site.node)
    if bias is None or step is None or decoder is None or decoder.op_type != "DequantizeLinear":
        return False
    tensor, scales = constant(decoder.inputs[0]), _array(decoder.inputs[1])
    point = decoder.inputs[2] if len(decoder.inputs) > 2 else None
    points = _array(point)
    if tensor is None or scales is None or (point is not None and points is None):
        return False
    if decoder.attributes.get_int("block_size", 0):
        return False
    needed = np.abs(bias.astype(np.float64).reshape(-1)) / (step * BIAS_LIMIT)
    needed = needed if scales.size > 1 else needed.max(initial=0.0)
    wanted = np.maximum(scales.astype(np.float64), np.reshape(needed, scales.shape))
    if not (wanted > scales).any():
        return False
    ratio = scales.astype(np.float64) / wanted
    rw.set_constant(decoder, 0, _lowered(tensor, ratio, points, site.channel_axis))
    rw.set_constant(decoder, 1, wanted.astype(scales.dtype))
    rw.mark(decoder)
    return True


def _own_bias(site: Linear | Convolution) -> Array | None:
    """The bias that the operator itself adds."""
    if isinstance(site, Linear) and site.bias_node is not None:
        return None
    return _array(site.bias)


def _input_scale(site: Linear | Convolution) -> float | None:
    """The only scale of a static input."""
    activation = activation_of(site.node.inputs[0])
    if not isinstance(activation, Static) or activation.dequantize is None:
        return None
    scale = _array(activation.dequantize.inputs[1])
    return float(scale.reshape(-1)[0]) if scale is not None and scale.size == 1 else None


def _array(value: ir.Value | None) -> Array | None:
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def _lowered(codes: ir.TensorProtocol, ratio: Array, points: Array | None, axis: int) -> ir.TensorProtocol:
    """Codes that times a scale 1 / ratio as large are the nearest to what they were."""
    shape = tuple(int(size) for size in codes.shape.numpy())
    lengthwise = [1] * len(shape)
    if ratio.size > 1:
        lengthwise[axis] = -1
    by, zero = ratio.reshape(lengthwise), np.reshape(0 if points is None else points, lengthwise).astype(np.float64)

    def lower(array: Array) -> Array:
        moved = np.rint((array.astype(np.float64) - zero) * by + zero)
        return np.where(np.broadcast_to(by < 1, shape), moved, array).astype(array.dtype)

    return derived(codes, lower, codes.dtype, shape, str(codes.name))
