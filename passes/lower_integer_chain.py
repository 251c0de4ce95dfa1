"""Runs linear layers with 8-bit activations and weights as an integer product on ONNX Runtime's CUDA provider.

**Before**  y = DQ(Q(x)) · DQ(Q_w) (+ b)        **After**  y = s_x ⊙ float(MatMulInteger(Q(x), Q_w)) ⊙ s_w (+ b)

The provider has one integer product, int8 × int8 → int32, and nothing that fuses with it, so each step is a node of its
own: x as rows [M, K]; for each row its largest magnitude, and s_x = max |x| / 127; QuantizeLinear along the rows;
MatMulInteger; the sums as float32 (float16 cannot hold them) times s_x [M, 1] times s_w [N]; the model's own type; the
shape of x again; the bias. Layers that read the same value share its codes.

With one scale for the whole value (static, or found while the model runs) s_x · s_w is multiplied first, and the zero
point z of x is taken out of the integer sums exactly: Σ_k (q_k - z) w_kn = Σ_k q_k w_kn - z Σ_k w_kn. Codes are the
same as in the portable graph; uint8 ones are shifted to int8 together with their zero point.

``cudnn: false`` takes the largest of a row by TopK, because ReduceMax is the only node of the chain that needs cuDNN.

Left to `lower-weight-only`: layers whose weights have blocked scales; static activations of these are float again.
Skipped: weights with scales along the inputs or with different zero points, and codes of more than 8 bits; they stay as
they are, in standard operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.functions.binary import channel_scales, is_binary, unpacked_signs
from qcompiler.functions.library import remove_unused_functions
from qcompiler.functions.per_token import SMALLEST_SCALE
from qcompiler.graph.edit import (
    array,
    constant,
    node_graph,
    replace_output,
)
from qcompiler.graph.flatten import Rows, rows_of
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.integer_weights import (
    EIGHT_BITS,
    FLOAT_INPUT,
    IntegerWeights,
    is_blocked,
    weight_obstacle,
    zero_point,
)
from qcompiler.lowering.layer_inputs import is_the_models_own, read_float, static_obstacle
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Dynamic, Float, Static
from qcompiler.sites.analyses import quantized_linears_of
from qcompiler.sites.find import Linear
from qcompiler.statistics import StatisticsStore
from qcompiler.targets.conditions import UNPADDED, Call, Operand, unmet

KERNEL = "MatMulInteger"
TAKES = "the integer product takes 8 bits"
FLOAT, INT8, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """A quantized activation as the product takes it."""

    rows: Rows
    codes: ir.Value
    """int8 [M, K]"""
    scale: ir.Value
    """float32 [M, 1], or [] for all rows."""
    zero_point: ir.Value | int
    """A number, or an int32 [] that is found while the model runs."""


@options(frozen=True, config=OPTIONS)
class LowerIntegerChain(Pass):
    name: ClassVar[str] = "lower-integer-chain"
    kind: ClassVar[Kind] = "lowering"

    cudnn: bool = True
    """Find the largest of a row by ReduceMax, which needs cuDNN when it runs; false: by TopK, which does not."""

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        activations = _Activations(rw, self.cudnn)
        weights = IntegerWeights(rw, signed=True)
        for site in self.selected(quantized_linears_of(model)):
            pair = _codes(site)
            if site.dequantize is None or pair is None or (isinstance(pair, Dynamic) and is_blocked(site)):
                continue  # float layers, and what lower-weight-only takes
            obstacle = _activation_obstacle(pair) or weight_obstacle(site) or _zero_point_obstacle(site)
            if obstacle is None:
                chain = activations.chain(site.node, site.name)
                _lower(site, activations.of(pair, site.in_features), weights.codes(site), chain)
                changes.changed.append(Changed(site.name, kernel=KERNEL, detail=_padding(site)))
                continue
            if is_blocked(site) and isinstance(pair, Static):
                if is_the_models_own(pair):
                    continue  # its weight alone is lowered, by lower-weight-only
                read_float(site.node, pair)
                changes.skipped.append(Skipped(site.name, f"{obstacle}, {FLOAT_INPUT}", undone="activation"))
                continue
            changes.skipped.append(Skipped(site.name, obstacle))
        remove_unused_functions(model)
        return changes


# ------------------------------------------------------------------------------------------------- what can be lowered


def _codes(site: Linear) -> Static | Dynamic | None:
    """The layer's activation where it is integer codes."""
    activation = site.activation
    if isinstance(activation, Float) or (isinstance(activation, Static) and activation.quantize is None):
        return None
    return activation if activation.scheme.number_format.kind == "integer" else None


def _activation_obstacle(activation: Static | Dynamic) -> str | None:
    return static_obstacle(activation, EIGHT_BITS, TAKES) if isinstance(activation, Static) else None


def _zero_point_obstacle(site: Linear) -> str | None:
    points = _weight_zero_points(site)
    if np.any(points != points[0]):
        return "its weight has different zero points, and the integer product takes one for all"
    return None


def _weight_zero_points(site: Linear) -> np.ndarray:
    """The zero points of the codes as they are stored, int32 [1] or [N]."""
    assert site.dequantize is not None
    if is_binary(site.dequantize):
        return np.zeros(1, np.int32)
    return zero_point(site.dequantize).reshape(-1).astype(np.int32)


def _padding(site: Linear) -> str:
    call = Call(inputs=[Operand(), Operand(shape=(site.in_features, site.out_features))])
    uneven = [f"{condition.subject} = {size}" for condition, size in unmet("unpadded-int8", call)]
    return f"{' and '.join(uneven)} not a multiple of {UNPADDED}: operands are padded on every run" if uneven else ""


# -------------------------------------------------------------------------------------------------------- activations


class Chain:
    """Nodes in the order in which they are made, named after a value or a layer."""

    def __init__(self, graph: ir.Graph, base: str, rw: Rewriter, numbers: dict[tuple[str, float], ir.Value]) -> None:
        self.graph, self.base, self.rw, self._numbers = graph, base, rw, numbers
        self.nodes: list[ir.Node] = []

    def add(
        self, op_type: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType,
        shape: ir.Shape | None = None, **attributes: object,
    ) -> ir.Value:  # fmt: skip
        """The output of a new node that is called after the base and `name`."""
        made = self.rw.node(op_type, inputs, f"{self.base}.{name}", dtype=dtype, shape=shape,
                            attributes=attributes)  # fmt: skip
        self.nodes.append(made)
        return made.outputs[0]

    def cast(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return self.add("Cast", [value], name, to, value.shape, to=int(to))

    def rows(self, value: ir.Value, features: int) -> Rows:
        rows = rows_of(value, features, self.graph, self.rw)
        self.nodes.extend(rows.nodes)
        return rows

    def constant(self, data: np.ndarray, name: str) -> ir.Value:
        return self.rw.constant(f"{self.base}.{name}", data, self.graph)

    def number(self, value: float, dtype: type, shape: tuple[int, ...] = ()) -> ir.Value:
        """A constant number, which all chains share."""
        data: np.ndarray = np.full(shape, value, dtype)
        key = f"{data.dtype}{shape}", float(value)
        if key not in self._numbers:
            self._numbers[key] = self.rw.constant(f"chain.{data.dtype}.{value:g}", data, self.graph)
        return self._numbers[key]


class _Activations:
    """Quantized activations as the product takes them, made once for all layers that read them."""

    def __init__(self, rw: Rewriter, cudnn: bool) -> None:
        self._rw, self._cudnn = rw, cudnn
        self._numbers: dict[tuple[str, float], ir.Value] = {}
        self._made: dict[ir.Node, QuantizedRows] = {}

    def chain(self, like: ir.Node, base: str) -> Chain:
        return Chain(node_graph(like), base, self._rw, self._numbers)

    def of(self, pair: Static | Dynamic, features: int) -> QuantizedRows:
        """The codes of a pair; made right before the node that makes them in the portable graph."""
        quantize = pair.quantize
        assert quantize is not None  # of what is lowered
        if quantize not in self._made:
            chain = self.chain(quantize, str(quantize.outputs[0].name))
            if isinstance(pair, Static):
                codes = _static(pair, features, chain)
            elif pair.per_token:
                codes = _per_token(pair, features, chain, self._cudnn)
            else:
                codes = _per_tensor(pair, features, chain, self._cudnn)
            self._rw.insert_before(quantize, chain.nodes)
            self._made[quantize] = codes
        return self._made[quantize]


def _static(pair: Static, features: int, chain: Chain) -> QuantizedRows:
    """The same codes as int8, with a constant scale and zero point."""
    quantize = pair.quantize
    assert quantize is not None
    rows, scale = chain.rows(pair.source, features), quantize.inputs[1]
    assert scale is not None
    single = array(scale).reshape(())
    middle = int(zero_point(quantize).reshape(())) - (128 if quantize.outputs[0].dtype != INT8 else 0)
    step = scale if scale.shape is not None and not len(scale.shape) else chain.constant(single, "step")
    codes = chain.add("QuantizeLinear", [rows.matrix, step, chain.number(middle, np.int8)], "int8", INT8,
                      rows.matrix.shape)  # fmt: skip
    return QuantizedRows(rows, codes, step, middle)


def _float_rows(pair: Dynamic, features: int, chain: Chain) -> tuple[Rows, ir.Value]:
    source = pair.quantize.inputs[0]
    assert source is not None
    rows = chain.rows(source, features)
    return rows, rows.matrix if source.dtype == FLOAT else chain.cast(rows.matrix, FLOAT, "float")


def _per_token(pair: Dynamic, features: int, chain: Chain, cudnn: bool) -> QuantizedRows:
    """codes = round(x / scale) with scale = max |row| / qmax."""
    rows, x = _float_rows(pair, features, chain)
    column = ir.Shape((None, 1))
    magnitude = chain.add("Abs", [x], "abs", FLOAT, x.shape)
    absmax = _end_of_rows(magnitude, "absmax", chain, cudnn)
    quotient = chain.add("Div", [absmax, chain.number(pair.qmax, np.float32)], "quotient", FLOAT, column)
    scale = chain.add("Max", [quotient, chain.number(SMALLEST_SCALE, np.float32)], "row_scale", FLOAT, column)
    vector = chain.add("Reshape", [scale, chain.number(-1, np.int64, (1,))], "scales", FLOAT, ir.Shape((None,)))
    codes = chain.add("QuantizeLinear", [x, vector], "int8", INT8, x.shape, axis=0, output_dtype=int(INT8))
    return QuantizedRows(rows, codes, scale, 0)


def _per_tensor(pair: Dynamic, features: int, chain: Chain, cudnn: bool) -> QuantizedRows:
    """What DynamicQuantizeLinear computes, step by step; its codes and zero point shifted from uint8 to int8."""
    rows, x = _float_rows(pair, features, chain)
    single, zero = ir.Shape(()), chain.number(0, np.float32)
    highest = chain.add("Max", [_end_of_all(x, True, chain, cudnn), zero], "hi", FLOAT, single)
    lowest = chain.add("Min", [_end_of_all(x, False, chain, cudnn), zero], "lo", FLOAT, single)
    span = chain.add("Sub", [highest, lowest], "span", FLOAT, single)
    quotient = chain.add("Div", [span, chain.number(255, np.float32)], "quotient", FLOAT, single)
    scale = chain.add("Max", [quotient, chain.number(SMALLEST_SCALE, np.float32)], "step", FLOAT, single)
    steps = chain.add("Div", [lowest, scale], "lo.steps", FLOAT, single)
    rounded = chain.add("Round", [steps], "lo.rounded", FLOAT, single)
    middle = chain.add("Sub", [chain.number(-128, np.float32), rounded], "middle", FLOAT, single)
    point = chain.cast(middle, INT8, "point")
    codes = chain.add("QuantizeLinear", [x, scale, point], "int8", INT8, x.shape)
    return QuantizedRows(rows, codes, scale, chain.cast(point, INT32, "point.int32"))


def _end_of_rows(x: ir.Value, name: str, chain: Chain, cudnn: bool, upper: bool = True) -> ir.Value:
    """[M, 1], the largest (or smallest) of each row."""
    shape = ir.Shape((None, 1))
    if cudnn:
        return chain.add("ReduceMax" if upper else "ReduceMin", [x, chain.number(-1, np.int64, (1,))], name, FLOAT,
                         shape, keepdims=1)  # fmt: skip
    name = chain.rw.fresh(f"{chain.base}.{name}")
    index = ir.Value(name=chain.rw.fresh(f"{name}.index"), type=ir.TensorType(INT64), shape=shape)
    found = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=shape)
    attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("largest", int(upper))]
    inputs = [x, chain.number(1, np.int64, (1,))]
    chain.nodes.append(ir.Node("", "TopK", inputs, attributes, outputs=[found, index], name=name))
    return found


def _end_of_all(x: ir.Value, upper: bool, chain: Chain, cudnn: bool) -> ir.Value:
    """[], the largest (or smallest) of a matrix."""
    name, single = "largest" if upper else "smallest", ir.Shape(())
    if cudnn:
        return chain.add("ReduceMax" if upper else "ReduceMin", [x], name, FLOAT, single, keepdims=0)
    of_rows = _end_of_rows(x, f"{name}.rows", chain, cudnn, upper)
    as_row = chain.constant(np.array([1, -1], np.int64), f"{name}.row.shape")
    row = chain.add("Reshape", [of_rows, as_row], f"{name}.row", FLOAT, ir.Shape((1, None)))
    of_all = _end_of_rows(row, f"{name}.one", chain, cudnn, upper)
    return chain.add("Reshape", [of_all, chain.constant(np.array([], np.int64), f"{name}.shape")], name, FLOAT, single)


# ------------------------------------------------------------------------------------------------- in a layer's place


def _lower(site: Linear, activation: QuantizedRows, weight: ir.Value, chain: Chain) -> None:
    node, product = site.dequantize, site.node.outputs[0]
    assert node is not None
    size = ir.Shape((None, site.out_features))
    inputs: list[ir.Value | None] = [activation.codes, weight]
    moved = site.weight.dtype == ir.DataType.UINT8 and not is_binary(node)  # such codes become int8
    middle = int(_weight_zero_points(site)[0]) - (128 if moved else 0)
    if middle:
        inputs += [None, chain.number(middle, np.int8)]
    sums = chain.add(KERNEL, inputs, "sums", INT32, size)
    kernel = chain.nodes[-1]
    shift = _shift(site, activation.zero_point, chain)
    if shift is not None:
        sums = chain.add("Sub", [sums, shift], "sums.shifted", INT32, size)
    value = chain.cast(sums, FLOAT, "sums.float")
    for factor in _factors(site, activation, chain):
        value = chain.add("Mul", [value, factor], "scaled", FLOAT, size)
    # Shape inference stops at operators of ONNX Runtime, so the output's type may be unknown; the weight's is not.
    dtype = node.outputs[0].dtype
    if dtype is not None and dtype != FLOAT:
        value = chain.cast(value, dtype, "cast")
    chain.nodes += activation.rows.restore(value, product, site.out_features, chain.graph, chain.rw)
    value = chain.nodes[-1].outputs[0]
    if site.bias is not None and site.bias_node is None:  # Gemm's own bias
        value = chain.add("Add", [value, site.bias], "bias_added", dtype or FLOAT)
    value.shape = product.shape
    chain.rw.insert_before(site.node, chain.nodes)
    replace_output(site.node, value)
    kernel.name = site.name


def _shift(site: Linear, point: ir.Value | int, chain: Chain) -> ir.Value | None:
    """z Σ_k w_kn as int32 [N], or None where z is 0."""
    if isinstance(point, ir.Value):
        return chain.add("Mul", [chain.constant(_column_sums(site), "column_sums"), point], "shift", INT32,
                         ir.Shape((site.out_features,)))  # fmt: skip
    return chain.constant(point * _column_sums(site), "shift") if point else None


def _column_sums(site: Linear) -> np.ndarray:
    """Σ_k w_kn in codes less their zero point, int32 [N]."""
    tensor, node = constant(site.weight), site.dequantize
    assert tensor is not None
    assert node is not None
    if is_binary(node):
        return read(tensor, lambda bits: unpacked_signs(bits, site.in_features).sum(1, dtype=np.int32))
    inputs = 1 - site.channel_axis
    stored = np.uint8 if tensor.dtype == ir.DataType.UINT8 else np.int8
    total = read(tensor, lambda data: data.astype(stored, copy=False).sum(inputs, dtype=np.int32))
    return np.asarray(total - site.in_features * _weight_zero_points(site)[0], np.int32)


def _factors(site: Linear, activation: QuantizedRows, chain: Chain) -> list[ir.Value]:
    """What the sums are multiplied by, in order, all float32: [M, 1] and [N], or with a single scale the product."""
    node, step = site.dequantize, activation.scale
    assert node is not None
    assert node.inputs[1] is not None
    scales = channel_scales(node) if is_binary(node) else array(node.inputs[1]).astype(np.float32).reshape(-1)
    assert scales is not None
    fixed = constant(step)
    if fixed is not None:
        return [chain.constant(fixed.numpy().astype(np.float32) * scales, "scale")]
    columns = chain.constant(scales, "weight_scale")
    if step.shape is not None and len(step.shape) == 2:
        return [step, columns]
    return [chain.add("Mul", [columns, step], "scale", FLOAT, columns.shape)]
