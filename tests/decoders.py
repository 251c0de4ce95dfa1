"""Tiny decoders with a cache, in the forms in which exporters write it, and what reads a text through their caches."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tests import tiny
from tests.oracles import kv_cache as oracle
from tests.there import dims, held, numpy_type, there

HEADS, CHANNELS, WIDTH = 2, 8, 16  # of keys and values; of the residual stream
NUMPY = {"float": np.float32, "float16": np.float16}

NAMES = {
    "optimum": ("past_key_values.{}.{}", "present.{}.{}"),
    "transformers": ("input.past_key_values.layers.{}.{}s", "output.past_key_values.layers.{}.{}s"),
}


def build(
    form: str = "concat", *, layers: int = 1, repeat: int = 2, dtype: str = "float", opset: int = 21,
    names: str = "optimum", room: int = 0,
) -> ir.Model:  # fmt: skip
    """x [batch, new, WIDTH], cos and sin [batch, 1, new, CHANNELS], bias [batch, 1, new, all] → y, and the caches.

    `form` is concat, attention (ai.onnx, fed by Concat), attention-past (its own cache), fused (GroupQueryAttention,
    which also reads `last`, the last position of each row, and `all`, their number) or scatter (a cache of `room`
    positions, written at `at`). `repeat` query heads share a head of keys and values.
    """
    past, present = NAMES[names]
    total = room or "T"
    inputs = [f"{dtype}[B,S,{WIDTH}] x", f"{dtype}[B,1,S,{CHANNELS}] cos", f"{dtype}[B,1,S,{CHANNELS}] sin",
              f"{dtype}[B,1,S,{total}] bias"]  # fmt: skip
    inputs += {"scatter": ["int64[B] at"], "fused": ["int32[B] last", "int32 all"]}.get(form, [])
    outputs, body, constants = [f"{dtype}[B,S,{WIDTH}] y"], [], {}
    rng = np.random.default_rng(1)
    queries = HEADS * repeat
    for name, numbers in {
        "kv_shape": [0, 0, HEADS, CHANNELS], "q_shape": [0, 0, queries, CHANNELS], "flat": [0, 0, -1],
        "zero": [0], "one": [1], "two": [2], "four": [4], "minus_one": [-1], "repeats": [1, 1, repeat, 1, 1],
    }.items():  # fmt: skip
        constants[name] = np.array(numbers, np.int64)
    constants["root"] = np.array(1 / np.sqrt(CHANNELS), NUMPY[dtype])
    stream = "x"
    for layer in range(layers):
        names_in = [past.format(layer, role) for role in ("key", "value")]
        names_out = [present.format(layer, role) for role in ("key", "value")]
        positions = room or "P"
        inputs += [f'{dtype}[B,{HEADS},{positions},{CHANNELS}] "{name}"' for name in names_in]
        outputs += [f'{dtype}[B,{HEADS},{room or "T"},{CHANNELS}] "{name}"' for name in names_out]
        shapes = {"q": (WIDTH, queries * CHANNELS), "k": (WIDTH, HEADS * CHANNELS), "v": (WIDTH, HEADS * CHANNELS),
                  "o": (queries * CHANNELS, WIDTH)}  # fmt: skip
        for letter, shape in shapes.items():
            weight = rng.normal(size=shape) / np.sqrt(shape[0])
            if letter == "k":
                weight[:, [3, 11]] *= 6  # a channel of each head that is always large
            constants[f"W{letter}{layer}"] = weight.astype(NUMPY[dtype])
        body.append(_layer(form, layer, stream, names_in, names_out, repeat))
        stream = f"stream{layer}"
    code = " ".join([*body, f"y = Neg({stream})"])
    constants = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", code)}
    inputs += [f"{_type(array)}{list(array.shape)} {name}" for name, array in constants.items()]
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {code} }}"
    return tiny.build(text, opset=opset, **constants)


def calibration(model: ir.Model, length: int = 24, count: int = 2) -> list[dict[str, np.ndarray]]:
    """Windows of text that are read at once, with an empty past."""
    return [_feed(text(seed, length), model) for seed in range(count)]


def text(seed: int, length: int, batch: int = 2) -> np.ndarray:
    """[batch, length, WIDTH]"""
    return np.random.default_rng(100 + seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def _feed(x: np.ndarray, model: ir.Model) -> dict[str, np.ndarray]:
    types = {there(value.name): value for value in model.graph.inputs}
    given = inputs(x, whole(x)) | fused(model, x.shape[1], len(x))
    feed = {name: array.astype(numpy_type(types[name])) for name, array in given.items()}
    pasts = [value for name, value in types.items() if name not in feed]
    return feed | {there(value.name): empty(value, len(x)) for value in pasts}


def whole(x: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(x.shape[1]), (len(x), 1))


def inputs(x: np.ndarray, positions: np.ndarray, bias: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a step reads beside its caches; without `bias` each position sees those up to its own."""
    count = CHANNELS // 2
    angles = positions[:, None, :, None] * 100.0 ** -(np.arange(count) / count)
    if bias is None:
        bias = causal(positions[0])
    bias = np.broadcast_to(bias, (len(x), *bias.shape[-3:]))
    return {"x": x, "cos": np.tile(np.cos(angles), 2), "sin": np.tile(np.sin(angles), 2), "bias": bias}


def fused(model: ir.Model, length: int, batch: int) -> dict[str, np.ndarray]:
    """What GroupQueryAttention wants to know of the positions so far."""
    if "last" not in {value.name for value in model.graph.inputs}:
        return {}
    return {"last": np.full(batch, length - 1, np.int32), "all": np.array(length, np.int32)}


def causal(rows: np.ndarray, total: int | None = None) -> np.ndarray:
    """[1, 1, rows, total]"""
    return np.where(np.arange(total or rows[-1] + 1) <= rows[:, None], 0.0, -1e4)[None, None]


def empty(value: ir.Value, batch: int) -> np.ndarray:
    sizes = [size if isinstance(size, int) else (batch if axis == 0 else 0) for axis, size in enumerate(dims(value))]
    return np.zeros(sizes, numpy_type(value))


class Reader:
    """Reads a text in steps; what a step puts out for a cache, the next one reads."""

    def __init__(self, model: ir.Model, batch: int, *, optimized: bool = True) -> None:
        self._session = tiny.session(model, optimized=optimized)
        self._types = {there(value.name): numpy_type(value) for value in model.graph.inputs}
        self._outputs = [value.name for value in model.graph.outputs]
        pasts = [value for value in model.graph.inputs if re.match("(input.)?past", there(value.name))]
        self.caches = {there(value.name): empty(value, batch) for value in pasts}
        self._model, self._steps = model, 0

    def read(
        self, x: np.ndarray, positions: np.ndarray | None = None, bias: np.ndarray | None = None, **more: np.ndarray
    ) -> np.ndarray:
        """The stream behind the last layer, [batch, new, WIDTH]."""
        if positions is None:
            positions = self._steps + whole(x)
        self._steps += x.shape[1]
        given = inputs(x, positions, bias) | fused(self._model, self._steps, len(x)) | more
        feed = {name: array.astype(self._types[name]) for name, array in given.items()}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feed | self.caches), strict=True))
        self.caches = {name: found[_present(name)] for name in self.caches}
        return np.asarray(-found["y"], np.float64)


def _present(past: str) -> str:
    return (
        past.replace("input.", "output.") if past.startswith("input.") else past.replace("past_key_values", "present")
    )


class Simulation:
    """The same decoder in float64, its caches quantized as `oracles.kv_cache` does it (or not at all)."""

    def __init__(self, model: ir.Model, repeat: int = 2) -> None:
        self._weights = {
            name: held(value).astype(np.float64)
            for name, value in model.graph.initializers.items() if re.match(r"W[qkvo]\d", name)
        }  # fmt: skip
        self._repeat = repeat
        self.layers = len(self._weights) // 4

    def read(
        self, x: np.ndarray, caches: Mapping[str, oracle.Cache] | None = None, positions: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
        """The stream behind the last layer for a whole text, and its keys and values (0.key, 0.value, …) as floats."""
        positions = whole(x) if positions is None else positions
        bias = causal(np.arange(x.shape[1])) if bias is None else bias
        stream = x.astype(np.float64)
        floats: dict[str, np.ndarray] = {}
        for layer in range(self.layers):
            q, k, v = (self._heads(stream, letter, layer) for letter in "qkv")
            q, k = oracle.rotate(q, positions), oracle.rotate(k, positions)
            floats |= {f"{layer}.key": k, f"{layer}.value": v}
            if caches is not None:
                k, v = caches[f"{layer}.key"].stored(k), caches[f"{layer}.value"].stored(v)
            found = oracle.attention(q, k, v, bias)
            flat = found.swapaxes(1, 2).reshape(*x.shape[:2], -1)
            stream = stream + flat @ self._weights[f"Wo{layer}"]
        return stream, floats

    def _heads(self, stream: np.ndarray, letter: str, layer: int) -> np.ndarray:
        heads = HEADS * (self._repeat if letter == "q" else 1)
        flat = stream @ self._weights[f"W{letter}{layer}"]
        return flat.reshape(*flat.shape[:2], heads, CHANNELS).swapaxes(1, 2)


def _type(array: np.ndarray) -> str:
    return {"float32": "float"}.get(str(array.dtype), str(array.dtype))


def _layer(form: str, n: int, stream: str, past: list[str], present: list[str], repeat: int) -> str:
    lines = [f"{a}{n}_flat = MatMul({stream}, W{a}{n}) " for a in "qkv"]
    lines += [f"{a}{n}_split = Reshape({a}{n}_flat, {'q' if a == 'q' else 'kv'}_shape) "
              f"{a}{n}_heads = Transpose<perm=[0,2,1,3]>({a}{n}_split)" for a in "qkv"]  # fmt: skip
    for a in "qk":
        lines.append(f"""{a}{n}_first, {a}{n}_second = Split<axis=-1, num_outputs=2>({a}{n}_heads)
            {a}{n}_minus = Neg({a}{n}_second) {a}{n}_turned = Concat<axis=-1>({a}{n}_minus, {a}{n}_first)
            {a}{n}_cos = Mul({a}{n}_heads, cos) {a}{n}_sin = Mul({a}{n}_turned, sin)
            {a}{n}_rotated = Add({a}{n}_cos, {a}{n}_sin)""")
    new = [f"k{n}_rotated", f"v{n}_heads"]
    if form == "fused":
        for value in (f"q{n}_rotated", *new):
            lines.append(f"{value}_turned = Transpose<perm=[0,2,1,3]>({value})")
            lines.append(f"{value}_flat = Reshape({value}_turned, flat)")
        flat = ", ".join([f"q{n}_rotated_flat", *(f"{value}_flat" for value in new), *(f'"{name}"' for name in past)])
        lines.append(f"""a{n}_flat, "{present[0]}", "{present[1]}" = com.microsoft.GroupQueryAttention
            <num_heads={HEADS * repeat}, kv_num_heads={HEADS}>({flat}, last, all)
            o{n} = MatMul(a{n}_flat, Wo{n}) stream{n} = Add({stream}, o{n})""")
        return "\n".join(lines)
    if form == "attention-past":
        names = ", ".join(f'"{name}"' for name in (*new, "bias", *past))
        lines.append(f"""a{n}, "{present[0]}", "{present[1]}" = Attention(q{n}_rotated, {names})""")
    else:
        for old, fresh, joined in zip(past, new, present, strict=True):
            join = "TensorScatter" if form == "scatter" else "Concat<axis=-2>"
            lines.append(f'"{joined}" = {join}("{old}", {fresh}{", at" if form == "scatter" else ""})')
        if form == "concat":
            lines.append(_spelled_out(n, present))
        else:
            lines.append(f"""a{n} = Attention(q{n}_rotated, "{present[0]}", "{present[1]}", bias)""")
    lines.append(f"""a{n}_turned = Transpose<perm=[0,2,1,3]>(a{n}) a{n}_flat = Reshape(a{n}_turned, flat)
        o{n} = MatMul(a{n}_flat, Wo{n}) stream{n} = Add({stream}, o{n})""")
    return "\n".join(lines)


def _spelled_out(n: int, present: list[str]) -> str:
    lines = []
    for a, joined in zip("kv", present, strict=True):
        # The sizes of repeated heads come from Shape of the cache itself, as exporters write it.
        lines.append(f"""{a}{n}_sizes = Shape("{joined}") {a}{n}_batch = Slice({a}{n}_sizes, zero, one)
            {a}{n}_rest = Slice({a}{n}_sizes, two, four) {a}{n}_more = Unsqueeze("{joined}", two)
            {a}{n}_tiled = Tile({a}{n}_more, repeats)
            {a}{n}_to = Concat<axis=0>({a}{n}_batch, minus_one, {a}{n}_rest)
            {a}{n}_all = Reshape({a}{n}_tiled, {a}{n}_to)""")
    return (
        "\n".join(lines)
        + f"""
        k{n}_t = Transpose<perm=[0,1,3,2]>(k{n}_all) s{n} = MatMul(q{n}_rotated, k{n}_t) s{n}_scaled = Mul(s{n}, root)
        s{n}_biased = Add(s{n}_scaled, bias) p{n} = Softmax<axis=-1>(s{n}_biased) a{n} = MatMul(p{n}, v{n}_all)"""
    )
