"""Where a layer of a quantized model rounds its input, and what the rounded input is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.diagnosis.regions import Region
from qcompiler.formats.scheme import PerTensor, Scheme
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import QuantizedOperand, has, multiplied
from qcompiler.sites.activations import activation_of, operand_activation, rounds_to
from qcompiler.sites.find import Linear


@dataclass(frozen=True, eq=False)
class Rounded:
    """The rounded input of a linear layer."""

    source: str
    """The value that is rounded, by its name in the float model."""
    values: tuple[ir.Value, ...]
    """The rounded input itself; or codes, scale and zero point where it is never dequantized."""
    constants: tuple[np.ndarray | None, ...] = ()
    """In the place of values: those of codes, scale and zero point that are constants."""

    block: int | None = None
    """Where the kernel itself rounds: along how many input features with one scale; 0: all of the tensor."""

    def dequantized(self, arrays: Sequence[np.ndarray], source: np.ndarray) -> np.ndarray:
        """The rounded input, float32, from what `values` and the input are."""
        if self.block is not None:
            return _in_blocks(source, self.block) if self.block else _in_whole(source)
        if not self.constants:
            return arrays[0].astype(np.float32)
        computed = iter(arrays)
        codes, scale, zero = (next(computed) if known is None else known for known in self.constants)
        return (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)


def rounded_input(region: Region) -> Rounded | None:
    """The rounded input of a linear layer; None where it stays float."""
    site = region.site
    if not isinstance(site, Linear) or str(site.input.name) not in region.inputs.values():
        return None
    inside = {value for node in region.nodes for value in node.outputs}
    products = [node for node in region.nodes if has(node, "product") and not has(node, "convolution")]
    if len(products) != 1:
        return None  # a layer that was split, say into columns of integers and of floats
    node = products[0]
    codes = multiplied(node)
    if codes is not None:
        return _codes(node, codes, str(site.input.name), inside)
    if has(node, "rounds"):
        block = _kernel_block(node)
        return None if block is None else Rounded(str(site.input.name), (), block=block)
    value = node.inputs[0]
    if value is None or value not in inside or activation_of(value).scheme is None:
        return None
    return Rounded(str(site.input.name), (value,))


def schemes(region: Region) -> tuple[Scheme, ...]:
    """How the inputs of a region's products are rounded, before a kernel or in it; none where they stay float."""
    found = [operand_activation(node).scheme for node in region.nodes if has(node, "product")]
    return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))


def _codes(node: ir.Node, read: QuantizedOperand, source: str, inside: set[ir.Value]) -> Rounded | None:
    if read.scale is None:
        return None  # sums, which nodes behind it scale
    values = [place.of(node) if place is not None else None for place in (read.codes, read.scale, read.zero_point)]
    codes = values[0]
    if codes is None or codes not in inside:
        return None
    computed, constants = [], []
    for value in values:
        tensor = constant(value)
        if tensor is None and value is not None:
            if value not in inside:
                return None
            computed.append(value)
        constants.append(np.zeros(()) if value is None else None if tensor is None else tensor.numpy())
    return Rounded(source, tuple(computed), tuple(constants))


# ---------------------------------------------------------------------------------------------------- inside of kernels


def _kernel_block(node: ir.Node) -> int | None:
    """Input features that share a scale, 0 for all of the tensor; None where the kernel takes inputs as they are."""
    scheme = rounds_to(node)
    if scheme is None:
        return None
    return 0 if isinstance(scheme.granularity, PerTensor) else node.attributes.get_int("block_size", 0)


def _in_whole(x: np.ndarray) -> np.ndarray:
    """As DynamicQuantizeLinear has it."""
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((hi - lo) / 255 or 1.0)
    zero = np.clip(np.rint(-lo / scale), 0, 255)
    codes = np.clip(np.rint(x.astype(np.float32) / scale) + zero, 0, 255)
    return np.asarray((codes - zero) * scale, np.float32)


def _in_blocks(x: np.ndarray, size: int) -> np.ndarray:
    """As MatMulNBits has it: codes of -127 … 127, by the largest magnitude of each block."""
    width = x.shape[-1]
    padded = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
    blocks = padded.reshape(*x.shape[:-1], -1, size)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scale > 0, scale, 1)) * scale
    return np.asarray(rounded.reshape(padded.shape)[..., :width], np.float32)
