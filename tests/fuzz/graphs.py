"""Random models that should run: what the recognisers know, what stands beside it in real graphs, and odd company.

Every part takes one value of the pool and gives another; shapes are known, but for the batch, which is often a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.growing import TYPES, Graph, Value

Part = Callable[[Graph, Value], Value]
WIDTHS = (4, 8, 16, 32, 33, 64)


def linear(g: Graph, x: Value, *, width: int | None = None) -> Value:
    """One of the spellings of x W + b."""
    inside, out = x.shape[-1], width or g.pick(WIDTHS)
    weight = g.numbers(inside, out)
    shape = (*x.shape[:-1], out)
    spelling = g.rng.random()
    if spelling < 0.2 and len(x.shape) == 1:
        transposed = g.maybe()
        bias = [g.constant(g.numbers(out), "bias")] if g.maybe() else []
        alpha: dict[str, Any] = {"alpha": 0.5} if g.maybe(0.1) else {}
        w = g.constant(weight.T if transposed else weight, "weight")
        return g.node("Gemm", [x.name, w, *bias], shape, transB=int(transposed), **alpha)
    if spelling < 0.35:
        w = g.node("Transpose", [g.constant(weight.T, "weight")], (), perm=[1, 0]).name
    elif spelling < 0.4:
        half = "float16" if g.dtype == "float32" else "float32"
        w = g.node("Cast", [g.constant(weight.astype(half), "weight")], (), to=TYPES[g.dtype]).name
    elif spelling < 0.45 and g.dtype == "float32":
        w = stored(g, weight)
    elif spelling < 0.48:
        w = g.node("Mul", [g.constant(weight, "weight"), g.scalar(0.5)], ()).name
    elif spelling < 0.51:
        w = g.node("Identity", [g.constant(weight, "weight")], ()).name
    else:
        w = shared(g, inside, out) if g.maybe(0.1) else g.constant(weight, "weight")
    y = g.node("MatMul", [x.name, w], shape)
    if g.maybe():
        order = [y.name, g.constant(g.numbers(out), "bias")]
        y = g.node("Add", order[:: g.pick([1, -1])], shape)
    return y


def shared(g: Graph, inside: int, out: int) -> str:
    """A weight that another node reads already, if there is one of the shape."""
    fitting = [
        item.name for item in g.constants if list(item.dims) == [inside, out] and item.data_type == TYPES[g.dtype]
    ]
    return fitting[0] if fitting else g.constant(g.numbers(inside, out), "weight")


def stored(g: Graph, weight: np.ndarray) -> str:
    """The weight as another quantizer left it."""
    per_channel = g.maybe()
    scale = np.maximum(np.abs(weight).max(0 if per_channel else None), 1e-9).astype(np.float32) / 127
    codes = np.clip(np.round(weight / scale), -128, 127).astype(np.int8)
    inputs = [g.constant(codes, "codes"), g.constant(np.asarray(scale), "scale")]
    if g.maybe():
        inputs.append(g.constant(np.zeros(np.shape(scale), np.int8), "zero"))
    return g.node("DequantizeLinear", inputs, (), axis=1).name


def convolution(g: Graph, x: Value) -> Value:
    if len(x.shape) < 2:
        x = reshape(g, x)
    axes, channels = len(x.shape) - 1, x.shape[0]
    groups = channels if g.maybe(0.2) else 1
    out = channels * g.pick([1, 2]) if groups > 1 else g.pick(WIDTHS)
    inputs = [x.name, g.constant(g.numbers(out, channels // groups, *[3] * axes), "kernel")]
    if g.maybe():
        inputs.append(g.constant(g.numbers(out), "bias"))
    y = g.node("Conv", inputs, (out, *x.shape[1:]), group=groups, pads=[1] * 2 * axes, kernel_shape=[3] * axes)
    if g.maybe(0.4) and g.dtype == "float32":
        parts = [np.abs(g.numbers(out)) + 0.1 for _ in range(4)]
        y = g.node("BatchNormalization", [y.name, *(g.constant(p.astype(g.dtype), "bn") for p in parts)], y.shape)
    return y


def reshape(g: Graph, x: Value) -> Value:
    size = int(np.prod(x.shape))
    first = next(n for n in (8, 4, 3, 2, 1) if size % n == 0)
    shape = (first, size // first) if len(x.shape) == 1 or g.maybe() else (size,)
    return g.node("Reshape", [x.name, g.ints(0, *shape)], shape)


def elementwise(g: Graph, x: Value) -> Value:
    op = str(g.rng.choice(["Relu", "Sigmoid", "Tanh", "Erf", "Softplus", "HardSwish", "LeakyRelu", "Neg", "Abs",
                           "Identity", "Dropout", "Clip", "Sqrt", "Elu"]))  # fmt: skip
    if op == "Sqrt":
        x = g.node("Abs", [x.name], x.shape)
    inputs = [x.name, g.scalar(-1.0), g.scalar(1.0)] if op == "Clip" else [x.name]
    return g.node(op, inputs, x.shape)


def scaled(g: Graph, x: Value) -> Value:
    op = str(g.rng.choice(["Mul", "Add", "Div", "Sub"]))
    other = np.abs(g.numbers(x.shape[-1])) + np.asarray(0.5, g.dtype)
    return g.node(op, [x.name, g.constant(other.astype(g.dtype), "factor")], x.shape)


def residual(g: Graph, x: Value) -> Value:
    others = [value for value in g.pool if value.shape == x.shape]
    other = others[g.pick(range(len(others)))] if others else x
    return g.node("Add" if g.maybe(0.8) else "Mul", [x.name, other.name], x.shape)


def norm(g: Graph, x: Value) -> Value:
    size = x.shape[-1]
    gain = g.constant(np.asarray(1 + g.rng.normal(size=size) / 10, g.dtype), "gain")
    if g.maybe(0.4):
        extra = [g.constant(g.numbers(size), "shift")] if g.maybe() else []
        return g.node("LayerNormalization", [x.name, gain, *extra], x.shape, axis=-1)
    square = g.node("Mul", [x.name, x.name], x.shape) if g.maybe() else g.node("Pow", [x.name, g.scalar(2.0)], x.shape)
    mean = g.node("ReduceMean", [square.name, g.ints(-1)], x.shape, keepdims=1)
    root = g.node("Sqrt", [g.node("Add", [mean.name, g.scalar(1e-5)], x.shape).name], x.shape)
    return g.node("Mul", [g.node("Div", [x.name, root.name], x.shape).name, gain], x.shape)


def attention(g: Graph, x: Value) -> Value:
    """Softmax attention with heads, from [B, S, C]."""
    if len(x.shape) != 2:
        x = linear(g, reshape(g, x) if len(x.shape) == 1 else x, width=16)
    if len(x.shape) != 2:
        return x
    length, heads, size = x.shape[0], g.pick([1, 2, 4]), 8
    q, k, v = (
        g.node("Transpose", [g.node("Reshape", [linear(g, x, width=heads * size).name,
                                                g.ints(0, length, heads, size)], ()).name], (), perm=perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )  # fmt: skip
    scores = g.node("Mul", [g.node("MatMul", [q.name, k.name], ()).name, g.scalar(size**-0.5)], ())
    mixed = g.node("MatMul", [g.node("Softmax", [scores.name], (), axis=-1).name, v.name], ())
    back = g.node("Transpose", [mixed.name], (), perm=[0, 2, 1, 3])
    joined = g.node("Reshape", [back.name, g.ints(0, length, heads * size)], (length, heads * size))
    return linear(g, joined)


def split(g: Graph, x: Value) -> Value:
    size = x.shape[-1]
    names = [g.name("split"), g.name("split")]
    sizes = [size // 2, size - size // 2]
    if sizes[0] == 0:
        return x
    g.nodes.append(helper.make_node("Split", [x.name, g.ints(*sizes)], names, axis=len(x.shape)))
    g.pool.append(Value(names[1], (*x.shape[:-1], sizes[1])))
    return Value(names[0], (*x.shape[:-1], sizes[0]))


def concat(g: Graph, x: Value) -> Value:
    others = [value for value in g.pool if value.shape[:-1] == x.shape[:-1] and len(value.shape) == len(x.shape)]
    if not others or x.shape[-1] > 256:
        return x
    other = others[g.pick(range(len(others)))]
    return g.node("Concat", [x.name, other.name], (*x.shape[:-1], x.shape[-1] + other.shape[-1]), axis=len(x.shape))


def transpose(g: Graph, x: Value) -> Value:
    if len(x.shape) != 2:
        return x
    return g.node("Transpose", [x.name], x.shape[::-1], perm=[0, 2, 1])


def through_half(g: Graph, x: Value) -> Value:
    y = g.node("Cast", [x.name], x.shape, to=TensorProto.FLOAT16)
    return g.node("Cast", [y.name], x.shape, to=TYPES[g.dtype])


def branch(g: Graph, x: Value) -> Value:
    """An If whose branches hold layers: weights of the body's own, or of the graph around it."""
    out, weight = x.shape[-1], g.numbers(x.shape[-1], x.shape[-1])
    outer = g.constant(weight, "weight")
    bodies = []
    for index in range(2):
        inner, y = g.name("inner"), g.name("branch")
        own = [numpy_helper.from_array(weight, inner)] if g.maybe() else []
        node = helper.make_node("MatMul", [x.name, inner if own else outer], [y], name=g.name("MatMul"))
        info = helper.make_tensor_value_info(y, TYPES[g.dtype], None)
        bodies.append(helper.make_graph([node], f"body{index}", [], [info], own))
    condition = g.constant(np.array(g.maybe()), "cond")
    return g.node("If", [condition], (*x.shape[:-1], out), then_branch=bodies[0], else_branch=bodies[1])


def loop(g: Graph, x: Value) -> Value:
    size = x.shape[-1]
    weight = g.constant(g.numbers(size, size), "weight")
    i, c, state, c_out, y = (g.name(n) for n in ("i", "c", "state", "cond", "y"))
    body = helper.make_graph(
        [helper.make_node("Identity", [c], [c_out]), helper.make_node("MatMul", [state, weight], [y])], "loop",
        [helper.make_tensor_value_info(i, TensorProto.INT64, []),
         helper.make_tensor_value_info(c, TensorProto.BOOL, []),
         helper.make_tensor_value_info(state, TYPES[g.dtype], None)],
        [helper.make_tensor_value_info(c_out, TensorProto.BOOL, []),
         helper.make_tensor_value_info(y, TYPES[g.dtype], None)],
    )  # fmt: skip
    trip = g.constant(np.array(2, np.int64), "trips")
    condition = g.constant(np.array(True), "cond") if g.maybe() else ""
    return g.node("Loop", [trip, condition, x.name], x.shape, body=body)


def function(g: Graph, x: Value) -> Value:
    """A call of a function of the model's own; its constants inside, or given."""
    size, name = x.shape[-1], g.name("Layer").replace("\n", "")
    weight = g.numbers(size, size)
    if g.maybe():
        nodes = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
                 helper.make_node("MatMul", ["x", "w"], ["y"])]  # fmt: skip
        inputs, given = ["x"], [x.name]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        inputs, given = ["x", "w"], [x.name, g.constant(weight, "weight")]
    imports = [helper.make_opsetid("", 21)]
    g.functions.append(helper.make_function("local", name, inputs, ["y"], nodes, imports))
    return g.node(name, given, x.shape, domain="local")


def quantized(g: Graph, x: Value) -> Value:
    """What another quantizer does to activations."""
    if g.dtype != "float32":
        return x
    scale, zero = g.constant(np.array(0.05, np.float32), "scale"), g.constant(np.array(128, np.uint8), "zero")
    codes = g.node("QuantizeLinear", [x.name, scale, zero], x.shape)
    return g.node("DequantizeLinear", [codes.name, scale, zero], x.shape)


def lookup(g: Graph, x: Value) -> Value:
    """An embedding, read at ids that an input gives, added."""
    rows, size = g.pick([5, 16, 300]), x.shape[-1]
    ids = g.name("ids")
    batch = g.inputs[0].type.tensor_type.shape.dim[0]
    size_of_batch = batch.dim_param or batch.dim_value
    g.inputs.append(helper.make_tensor_value_info(ids, TensorProto.INT64, [size_of_batch]))
    remainder = g.node("Mod", [ids, g.ints(rows)], ())
    found = g.node("Gather", [g.constant(g.numbers(rows, size), "table"), remainder.name], ())
    for _ in range(len(x.shape) - 1):
        found = g.node("Unsqueeze", [found.name, g.ints(1)], ())
    return g.node("Add", [x.name, found.name], x.shape)


def recurrent(g: Graph, x: Value) -> Value:
    if len(x.shape) != 2:
        return x
    size, hidden = x.shape[-1], 8
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    op = str(g.rng.choice(list(gates)))
    order = g.node("Transpose", [x.name], (), perm=[1, 0, 2])
    w, r = (g.constant(g.numbers(1, gates[op] * hidden, n), "rnn") for n in (size, hidden))
    y = g.node(op, [order.name, w, r], (), hidden_size=hidden)
    flat = g.node("Squeeze", [y.name, g.ints(1)], ())
    return g.node("Transpose", [flat.name], (x.shape[0], hidden), perm=[1, 0, 2])


def reduced(g: Graph, x: Value) -> Value:
    if len(x.shape) < 2:
        return x
    return g.node("ReduceMean", [x.name, g.ints(1)], x.shape[1:], keepdims=0)


def contributed(g: Graph, x: Value) -> Value:
    """Operators of ONNX Runtime's own."""
    if g.dtype != "float32":
        return x
    kind, size = g.rng.random(), x.shape[-1]
    if kind < 0.3:
        return g.node("Gelu" if g.maybe() else "QuickGelu", [x.name], x.shape, domain="com.microsoft")
    if kind < 0.6 and len(x.shape) == 2:
        gain = g.constant(np.ones(size, np.float32), "gain")
        y = g.node("SkipSimplifiedLayerNormalization", [x.name, x.name, gain], x.shape, domain="com.microsoft")
        return y
    if kind < 0.8 and size >= 16:
        blocks = -(-size // 16)
        packed = g.rng.integers(0, 256, (8, blocks, 8), dtype=np.uint8)
        scales = np.abs(g.numbers(8, blocks)).reshape(-1).astype(np.float32) + np.float32(0.01)
        names = [x.name, g.constant(packed, "packed"), g.constant(scales, "scales")]
        return g.node(
            "MatMulNBits", names, (*x.shape[:-1], 8), domain="com.microsoft", K=size, N=8, bits=4, block_size=16
        )
    return g.node(
        "FusedMatMul", [x.name, g.constant(g.numbers(size, 8), "weight")], (*x.shape[:-1], 8), domain="com.microsoft"
    )


PARTS: tuple[tuple[Part, float], ...] = (
    (linear, 8), (convolution, 3), (elementwise, 5), (scaled, 2), (residual, 2), (norm, 3), (attention, 1.5),
    (split, 1), (concat, 1), (transpose, 1), (reshape, 1), (through_half, 0.4), (branch, 0.7), (loop, 0.5),
    (function, 0.8), (quantized, 0.5), (lookup, 1), (recurrent, 0.4), (reduced, 0.5), (contributed, 1),
)  # fmt: skip


def build(rng: np.random.Generator, *, most: int = 8, odd: bool | None = None) -> onnx.ModelProto:
    """A model of up to `most` parts, with one input `x` and perhaps ids."""
    odd = bool(rng.random() < 0.25) if odd is None else odd
    dtype = "float32" if rng.random() < 0.85 else str(rng.choice(["float16", "float64"]))
    g = Graph(rng, dtype, odd)
    shape = ((16,), (4, 8), (3, 6, 6))[g.pick([0, 0, 1, 1, 2])]
    batch = ["B", "B", "", 1, 2][g.pick(range(5))]
    g.inputs.append(helper.make_tensor_value_info("x", TYPES[dtype], [batch, *shape]))
    g.pool.append(Value("x", shape))
    weights = np.array([weight for _, weight in PARTS])
    value = g.pool[0]
    for _ in range(g.pick(range(1, most + 1))):
        part = PARTS[int(rng.choice(len(PARTS), p=weights / weights.sum()))][0]
        value = part(g, value if g.maybe(0.8) else g.pool[g.pick(range(len(g.pool)))])
        g.pool.append(value)
    return finish(g, value)


def finish(g: Graph, value: Value) -> onnx.ModelProto:
    """Outputs, and the graph around."""
    if value.name == "x":
        value = g.node("Identity", ["x"], value.shape)
    outputs = [value]
    if g.maybe(0.2):
        outputs += [other for other in g.pool[1:] if other.name != value.name and g.maybe(0.3)][:2]
    outputs = list({output.name: output for output in outputs if output.name != "x"}.values())
    declared = g.maybe(0.8)  # ONNX Runtime takes both
    infos = [
        helper.make_tensor_value_info(
            o.name, TYPES[g.dtype], [f"{o.name}_{axis}" for axis in range(len(o.shape) + 1)] if declared else None
        )
        for o in outputs
    ]
    if g.maybe(0.1) and g.constants:
        tensor = g.constants[0]
        g.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = helper.make_graph(g.nodes, "graph", g.inputs, infos, g.constants)
    imports = [helper.make_opsetid("", 21 if g.maybe(0.7) else g.pick([18, 19, 20, 22, 23]))]
    imports += [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=g.functions, ir_version=10)
