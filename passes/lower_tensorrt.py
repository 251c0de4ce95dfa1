"""Writes quantized layers in the form of Q/DQ pairs that TensorRT multiplies in few bits.

8 bits on both sides
    **Before**  y = DQ(Q(x)) · DQ(Q_w)      int8 or uint8 codes; a scale for x, and one for each output of W
    **After**   y = DQ(Q(x)) · DQ(Q_w)      int8 with zero point 0, W as [K, N] with scales along N (Gemm: as it was)
4-bit weights
    **Before**  y = x · DQ(Q_w, s)          codes of up to 4 bits about one zero point, in groups or with one scale
    **After**   y = x · DQ(Q_w, s)          int4 with zero point 0, blocks of 128 or 64 inputs (scales repeated)
fp8
    y = DQ(Q(x)) · DQ(Q_w) with one scale for x and one for W, both E4M3, stays as it is

TensorRT fuses the pairs with the layer between them; it knows no other operators on codes. Its rules, and where they
are from, are in `qcompiler/lowering/tensorrt_rules.py`; the result is checked against them, and refused where it breaks
one.

Numbers stay those of the portable graph: codes are moved together with their zero point, and a negative scale changes
its sign together with its codes, where none of them is the least code, which has no counterpart.

Skipped: weights of 8 bits whose activations are float, as TensorRT has weight-only kernels for 4 bits alone;
embeddings, as it gathers no codes; and layers in another form than those above, each with its reason. They are float
again, in rounded numbers. Where nothing else is left of a recipe, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import TargetError
from qcompiler.functions.library import DOMAIN, remove_unused_functions
from qcompiler.graph.edit import (
    add_constant,
    array,
    constant,
    insert_before,
    node_graph,
    remove_node_if_unused,
    replace_output,
)
from qcompiler.graph.lazy import derived, read
from qcompiler.graph.metadata import BITS
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.float_constants import FloatConstants
from qcompiler.lowering.integer_weights import zero_point
from qcompiler.lowering.layer_inputs import static_obstacle
from qcompiler.lowering.tensorrt_rules import BLOCKS, violations
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Activation, Dynamic, Float, Static
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.embeddings import QuantizedEmbedding, find_quantized_embeddings
from qcompiler.sites.find import Convolution, Linear
from qcompiler.statistics import StatisticsStore

Layer = Linear | Convolution
INT4, INT8, E4M3 = ir.DataType.INT4, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN
KERNELS = {INT8: "TensorRT int8", INT4: "TensorRT int4 weights", E4M3: "TensorRT fp8"}
FLOAT_AGAIN = "its weight is float again, in rounded numbers"
INSTEAD = "take --recipe gptq-w4 (4-bit weights), smoothquant (8 bits on both sides) or fp8-tensor"


@options(frozen=True, config=OPTIONS)
class LowerTensorrt(Pass):
    name: ClassVar[str] = "lower-tensorrt"
    kind: ClassVar[Kind] = "lowering"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        floats, weights = FloatConstants(rw), _Weights(rw)
        for embedding in self.selected(find_quantized_embeddings(model)):
            _gather_floats(embedding, floats, rw)
            reason = f"TensorRT gathers no codes, so {FLOAT_AGAIN}"
            changes.skipped.append(Skipped(embedding.name, reason, undone="layer"))
        sites = sites_of(model)
        replaced: list[ir.Node] = []
        layers: list[Layer] = [*sites.linears, *sites.convolutions]
        for site in self.selected(layers):
            if site.dequantize is None or site.dequantize.domain == DOMAIN:
                continue  # what is float, and what the check below refuses by name
            form = _form(site, site.activation)
            if isinstance(form, str):
                replaced += _read_floats(site, floats)
                changes.skipped.append(Skipped(site.name, f"{form}, so {FLOAT_AGAIN}", undone="layer"))
                continue
            replaced += weights.give(site, form)
            changes.changed.append(Changed(site.name, kernel=KERNELS[form.dtype], detail=form.detail))
        for node in replaced:
            if node.graph is not None:
                remove_node_if_unused(node)
        remove_unused_functions(model)
        _refuse(changes, violations(model))
        return changes


def _refuse(changes: Changes, broken: list[str]) -> None:
    """Raise TargetError where TensorRT would not take the graph, or nothing in it is quantized any more."""
    if broken:
        raise TargetError(f"TensorRT does not take the quantized graph: {broken[0]}; {INSTEAD}")
    if changes.skipped and not changes.changed:
        first = changes.skipped[-1]
        raise TargetError(
            f"nothing that the recipe quantizes is in a form that TensorRT multiplies ({first.site}: "
            f"{first.reason.removesuffix(f', so {FLOAT_AGAIN}')}); {INSTEAD}"
        )


# ------------------------------------------------------------------------------------------------- what TensorRT takes


@dataclass(frozen=True, eq=False)
class _Form:
    """How a layer's weight is to be written."""

    dtype: ir.DataType
    shift: int
    """What is taken from the codes, so that their zero point is 0."""
    scale: np.ndarray
    """As it will be stored, but for the order of axes, and not yet with blocks repeated."""
    signs: np.ndarray | None = None
    """-1 where the scale was negative, in the shape of `scale`."""
    group: int = 0
    """Inputs that share a scale where the weight has groups, or one scale for all inputs."""
    block: int = 0

    @property
    def detail(self) -> str:
        return f"blocks of {self.block}" if self.block else ""


def _form(site: Layer, activation: Activation) -> _Form | str:
    """The form that TensorRT takes a layer in, or why there is none, one clause."""
    if isinstance(activation, Dynamic):
        return "its activation has scales found at run time, and TensorRT's are constants"
    node, kind = site.dequantize, site.weight.dtype
    assert node is not None
    assert node.inputs[1] is not None
    assert kind is not None
    if constant(node.inputs[1]) is None:
        return "the scales of its weight are computed, and TensorRT's are constants"
    scale = array(node.inputs[1])
    if kind.is_floating_point():
        return _float8(site, scale, activation)
    if isinstance(activation, Static):
        obstacle = _activation_obstacle(activation, INT8)
        return obstacle if obstacle is not None else _int8(site, scale)
    if isinstance(site, Convolution) or _bits(node, kind) > 4:
        return "TensorRT has weight-only kernels for linear layers of 4 bits alone"
    return _int4(site, scale)


def _activation_obstacle(activation: Static, wanted: ir.DataType) -> str | None:
    obstacle = static_obstacle(activation, (wanted,), f"TensorRT multiplies {wanted} by this weight")
    if obstacle is not None or activation.quantize is None:
        return obstacle
    if np.any(zero_point(activation.quantize).astype(np.float32)):
        return "its activation has a zero point, and TensorRT quantizes symmetrically"
    return None


def _float8(site: Layer, scale: np.ndarray, activation: Activation) -> _Form | str:
    if site.weight.dtype != E4M3:
        return f"its weight is {site.weight.dtype}, and TensorRT's float8 is {E4M3}"
    if not isinstance(activation, Static):
        return "its activation is float, and TensorRT multiplies float8 by float8"
    if scale.size > 1:
        return "its float8 weight has several scales, and TensorRT's has one"
    obstacle = _activation_obstacle(activation, E4M3)
    return obstacle if obstacle is not None else _Form(E4M3, 0, scale)


def _int8(site: Layer, scale: np.ndarray) -> _Form | str:
    node = site.dequantize
    assert node is not None
    rank = len(site.weight.shape or ())
    if node.attributes.get_int("block_size", 0):
        return "its weight has groups, and TensorRT's 8-bit weights have a scale for each output channel"
    if scale.size > 1 and node.attributes.get_int("axis", 1) % rank != site.channel_axis:
        return "its weight has scales along the inputs, and TensorRT's lie along the outputs"
    shift = _shift(node, site.weight.dtype, -128, 127)
    if isinstance(shift, str):
        return shift
    return _signed(site, _Form(INT8, shift, scale), -128)


def _int4(site: Linear, scale: np.ndarray) -> _Form | str:
    node = site.dequantize
    assert node is not None
    features, block_size = site.in_features, node.attributes.get_int("block_size", 0)
    along_inputs = node.attributes.get_int("axis", 1) % 2 != site.channel_axis
    if scale.size > 1 and along_inputs != (block_size > 0):
        return "its weight has scales along the inputs alone, and TensorRT's lie along the outputs, too"
    group = min(block_size or features, features)
    block = next((size for size in BLOCKS if group % size == 0 and features % size == 0), 0)
    if not block:
        whole = group if features % group == 0 else features
        return f"TensorRT's blocks are {BLOCKS[1]} or {BLOCKS[0]} wide, which {whole} inputs are no multiple of"
    shift = _shift(node, site.weight.dtype, -8, 7)
    if isinstance(shift, str):
        return shift
    return _signed(site, _Form(INT4, shift, scale, group=group, block=block), -8)


def _bits(node: ir.Node, dtype: ir.DataType) -> int:
    noted = node.metadata_props.get(BITS)
    return int(dtype.bitwidth) if noted is None else int(noted)


def _shift(node: ir.Node, dtype: ir.DataType | None, least: int, largest: int) -> int | str:
    """What to take from the codes so that they count from 0 and lie in least … largest; or why there is no such."""
    assert dtype is not None
    points = zero_point(node).astype(np.int32)
    first, bits = int(points.flat[0]), _bits(node, dtype)
    if np.any(points != first):
        return "its weight has zero points, and TensorRT quantizes symmetrically (an option symmetric: true makes none)"
    low = -(1 << (bits - 1)) if dtype.is_signed() else 0
    if low - first < least or low + (1 << bits) - 1 - first > largest:
        return f"its weight has the zero point {first}, with which its codes are no symmetric integers"
    return first


def _signed(site: Layer, form: _Form, least: int) -> _Form | str:
    """The form with positive scales, or why there is none."""
    if np.any(form.scale == 0):
        return "its weight has a scale that is 0, and TensorRT's are positive"
    if np.all(form.scale > 0):
        return form
    signs = np.where(form.scale < 0, -1, 1).astype(np.int8)
    tensor, node = constant(site.weight), site.dequantize
    assert tensor is not None
    assert node is not None
    negative = read(tensor, lambda data: _widened(signs, node, data.shape) * (_counted(data, form.shift) == least))
    if np.any(negative < 0):
        return f"a scale of its weight is negative and meets the code {least} (an option positive_scales: true helps)"
    return _Form(form.dtype, form.shift, np.abs(form.scale), signs, form.group, form.block)


def _counted(data: np.ndarray, shift: int) -> np.ndarray:
    return data.astype(np.int16) - np.int16(shift)


def _widened(values: np.ndarray, node: ir.Node, shape: tuple[int, ...]) -> np.ndarray:
    """A number for each scale of a DequantizeLinear, as one that broadcasts against its codes."""
    axis, block = node.attributes.get_int("axis", 1) % len(shape), node.attributes.get_int("block_size", 0)
    if block:
        return np.take(values, np.arange(shape[axis]) // block, axis)
    if values.size == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * (len(shape) - axis - 1))


# ------------------------------------------------------------------------------------------------- writing it


class _Weights:
    """Writes weights in the form that TensorRT takes, once for all layers that read one in the same direction."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._made: dict[object, ir.Value] = {}

    def give(self, site: Layer, form: _Form) -> list[ir.Node]:
        """Let the layer read its weight in this form; returns the nodes that may be of no use any more."""
        old, transpose = site.dequantize, site.transpose if isinstance(site, Linear) else None
        assert old is not None
        if form.dtype == E4M3 or self._fits(site, form, transpose):
            return []
        key = site.weight, transpose is not None, site.channel_axis, form.dtype, *old.inputs[1:]
        if key not in self._made:
            self._made[key] = self._written(site, form, turn=transpose is not None)
        site.node.replace_input_with(1, self._made[key])
        return [node for node in (transpose, old) if node is not None]

    def _fits(self, site: Layer, form: _Form, transpose: ir.Node | None) -> bool:
        """Whether nothing has to be written."""
        old = site.dequantize
        assert old is not None
        same = site.weight.dtype == form.dtype and form.shift == 0 and form.signs is None and transpose is None
        return same and form.block == old.attributes.get_int("block_size", 0)

    def _written(self, site: Layer, form: _Form, turn: bool) -> ir.Value:
        old, tensor, graph, base = site.dequantize, constant(site.weight), node_graph(site.node), str(site.weight.name)
        assert old is not None
        assert tensor is not None
        axis = 1 if turn else site.channel_axis
        shape = tuple(int(size) for size in tensor.shape.numpy())
        name = self._rw.fresh(f"{base}.tensorrt")
        codes = add_constant(
            graph, name, derived(tensor, _arranged(form, old, turn), form.dtype, shape[::-1] if turn else shape, name)
        )
        scale = _in_blocks(form, site) if isinstance(site, Linear) and form.block else form.scale
        if form.block and axis == 1:
            scale = scale.T
        stored = self._rw.constant(f"{base}.tensorrt.scale", np.ascontiguousarray(scale), graph)
        settings: dict[str, object] = {"axis": 1 - axis, "block_size": form.block} if form.block else {"axis": axis}
        node = self._rw.node(
            "DequantizeLinear", [codes, stored], f"{base}.tensorrt.dequantized",
            dtype=old.outputs[0].dtype or stored.dtype, shape=codes.shape,
            attributes=settings if stored.const_value is not None and stored.const_value.size > 1 else {},
        )  # fmt: skip
        self._rw.inherit([node], old)
        node.metadata_props.pop(BITS, None)
        insert_before(old, [node])
        return node.outputs[0]


def _arranged(form: _Form, old: ir.Node, turn: bool) -> Callable[[np.ndarray], np.ndarray]:
    """From the stored codes to those that TensorRT takes."""
    shift, signs = form.shift, form.signs

    def arrange(data: np.ndarray) -> np.ndarray:
        codes = _counted(data, shift)
        if signs is not None:
            codes = codes * _widened(signs, old, data.shape)
        codes = codes.astype(np.int8)
        return np.ascontiguousarray(codes.T) if turn else codes

    return arrange


def _in_blocks(form: _Form, site: Linear) -> np.ndarray:
    """[N, blocks]: the scale of each block, which is that of the group it lies in."""
    node, scale = site.dequantize, form.scale
    assert node is not None
    if node.attributes.get_int("block_size", 0):
        by_row = scale if site.channel_axis == 0 else scale.T
    else:
        by_row = np.broadcast_to(scale.reshape(-1, 1), (site.out_features, 1))
    taken: np.ndarray = np.take(by_row, np.arange(0, site.in_features, form.block) // form.group, axis=1)
    return taken


# ------------------------------------------------------------------------------------------------- float again


def _read_floats(site: Layer, floats: FloatConstants) -> list[ir.Node]:
    """Let a layer read floats on both sides; returns the nodes that may be of no use any more."""
    node, graph, replaced = site.dequantize, node_graph(site.node), []
    assert node is not None
    scale, points = (*node.inputs, None)[1:3]
    assert scale is not None
    if constant(scale) is not None:  # else the check names the node
        dtype = node.outputs[0].dtype or scale.dtype or ir.DataType.FLOAT
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        value = floats.of(site.weight, scale, points, axis, block, dtype, graph)
        transpose = site.transpose if isinstance(site, Linear) else None
        if transpose is not None:
            transpose.replace_input_with(0, value)
        else:
            site.node.replace_input_with(1, value)
        replaced.append(node)
    activation = site.activation
    if not isinstance(activation, Float) and activation.quantize is not None:
        producer = site.input.producer()
        site.node.replace_input_with(0, activation.source)
        replaced += [producer] if producer is not None else []
    return replaced


def _gather_floats(site: QuantizedEmbedding, floats: FloatConstants, rw: Rewriter) -> None:
    """A Gather of floats in the place of an embedding of codes."""
    output = site.output
    dtype = output.dtype or site.scale.dtype or ir.DataType.FLOAT
    graph = node_graph(site.node)
    table = floats.of(
        site.codes, site.scale, site.zero_point, site.axis, site.block_size, dtype, graph, turn=site.row_axis == 1
    )
    gather = rw.node("Gather", [table, site.ids], f"{site.name}.gathered", like=output)
    rw.insert_before(site.node, [gather])
    replace_output(site.node, gather.outputs[0])
    gather.name = site.name
