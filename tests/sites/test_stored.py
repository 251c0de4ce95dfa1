"""What is read off a stored weight: its numbers, against those that ONNX Runtime computes, its form, and its memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.quantize_weights import QuantizeWeights
from qcompiler.inspection import inspect
from qcompiler.model_diff.layers import read_layers
from qcompiler.model_diff.weights import phrase
from qcompiler.sites.embeddings import find_quantized_embeddings
from qcompiler.sites.stored import StoredWeight, float_weight, quantized_weight, table_weight
from qcompiler.sites.stored import layout as layouts
from qcompiler.sites.stored.constants import constants_behind
from tests import tiny
from tests.there import tensor_of, tensors, there

RNG = np.random.default_rng(0)


def told(text: str) -> str:
    """A scheme as it is told: symmetric integers go by the signed format's name, others by the unsigned one's."""
    name, _, rest = text.partition(" ")
    if "int" not in name:
        return text
    return f"{'u' if 'asymmetric' in rest else ''}{name.removeprefix('u')} {rest}"


SCHEMES = {
    "int8": "int8", "uint8": "uint8", "int4": "int4", "uint4": "uint4", "float8e4m3fn": "fp8_e4m3",
    "float8e5m2": "fp8_e5m2",
}  # fmt: skip


def codes_of(type: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = ir.DataType[type.upper()]
    if dtype.is_floating_point():
        return RNG.normal(size=shape).astype(dtype.numpy())
    bits = dtype.bitwidth
    low = -(1 << (bits - 1)) if dtype.is_signed() else 0
    return RNG.integers(low, low + (1 << bits), shape).astype(dtype.numpy())


def scales_of(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def weight_of(model: ir.Model) -> StoredWeight:
    (weight,) = (found for node in model.graph if (found := quantized_weight(node)) is not None)
    return weight


def in_pieces(weight: StoredWeight) -> np.ndarray:
    parts = weight.pieces()
    assert parts is not None
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(weight.shape)


@pytest.fixture(params=[1 << 20, 100])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in one piece, and in many: 100 numbers are a row or two of the weights below."""
    monkeypatch.setattr(layouts, "PIECE", request.param)


# ---------------------------------------------------------------------------------------------------- DequantizeLinear


@pytest.mark.parametrize("type", SCHEMES)
@pytest.mark.parametrize(
    ("axis", "block", "scales", "granularity"),
    [
        (0, 0, (), "per-tensor"), (0, 0, (48,), "per-channel"), (1, 0, (40,), "per-channel"),
        (-1, 0, (40,), "per-channel"), (0, 16, (3, 40), "group(16)"), (1, 16, (48, 3), "group(16)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_linear(
    piece: int, type: str, axis: int, block: int, scales: tuple[int, ...], granularity: str, asymmetric: bool
) -> None:
    if asymmetric and type.startswith("float"):
        pytest.skip("float8 has no zero point")
    sizes, blocks = ",".join(map(str, scales)), f", block_size={block}" if block else ""
    model = tiny.build(
        f"""g ({type}[48,40] q, float[{sizes}] s, {type}[{sizes}] z) => (float[48,40] y) {{
        y = DequantizeLinear<axis={axis}{blocks}>(q, s{", z" if asymmetric else ""}) }}""",
        q=codes_of(type, (48, 40)), s=scales_of(scales), z=codes_of(type, scales), opset=23,
    )  # fmt: skip
    weight = weight_of(model)
    (expected,) = tiny.run(model, {})
    np.testing.assert_array_equal(in_pieces(weight), expected)
    np.testing.assert_array_equal(weight.numbers(), expected)
    # Unsigned codes without a zero point count from 0, which is not their middle.
    symmetric = not asymmetric and not type.startswith("u")
    assert str(weight.scheme) == told(f"{SCHEMES[type]} {granularity} {'symmetric' if symmetric else 'asymmetric'}")


@pytest.mark.parametrize("type", ["int4", "uint4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_odd_rows_of_four_bits_in_a_file(piece: int, tmp_path: Path, type: str, axis: int) -> None:
    """Rows begin in the middle of a byte."""
    scales = (3, 33) if axis == 0 else (47, 3)
    model = tiny.build(
        f"""g ({type}[47,33] q, float[{scales[0]},{scales[1]}] s, float[B,47] x) => (float[B,33] y) {{
        w = DequantizeLinear<axis={axis}, block_size=16>(q, s)  y = MatMul(x, w) }}""",
        q=codes_of(type, (47, 33)), s=scales_of(scales), opset=23,
    )  # fmt: skip
    (expected,) = tiny.run(model, {"x": np.eye(47, dtype=np.float32)})
    model.graph.initializers["q"].const_value = in_file(tensors(model)["q"], tmp_path)
    weight = weight_of(model)
    np.testing.assert_array_equal(in_pieces(weight), expected)


def in_file(tensor: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
    (folder / "data").write_bytes(b"before" + tensor.tobytes())
    shape, name = ir.Shape(tensor.shape.numpy()), str(tensor.name)
    return ir.ExternalTensor("data", 6, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=folder)


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("points", ["none", "packed", "float", "middle"])
def test_mat_mul_nbits(piece: int, bits: int, points: str) -> None:
    if bits == 8 and points == "float":
        pytest.skip("MatMulNBits refuses it on the CPU")
    inputs, outputs, block = 80, 6, 32
    blocks = 3  # an odd number: the last byte of a row of zero points is not full
    codes = RNG.integers(0, 256, (outputs, blocks, block * bits // 8)).astype(np.uint8)
    given = {}
    if points in ("packed", "middle"):
        middle = np.full((outputs, blocks), 1 << (bits - 1))
        given["z"] = packed(RNG.integers(0, 1 << bits, middle.shape) if points == "packed" else middle, bits)
    elif points == "float":
        given["z"] = RNG.uniform(0, 1 << bits, (outputs, blocks)).astype(np.float32)
    text = f"{'float' if points == 'float' else 'uint8'}[{','.join(map(str, given['z'].shape)) if given else 1}] z"
    model = tiny.build(
        f"""g (float[B,{inputs}] x, uint8[{outputs},{blocks},{codes.shape[2]}] q, float[{outputs},{blocks}] s, {text})
        => (float[B,{outputs}] y) {{
        y = com.microsoft.MatMulNBits<K={inputs}, N={outputs}, bits={bits}, block_size={block}>
            (x, q, s{", z" if given else ""}) }}""",
        q=codes, s=scales_of((outputs, blocks)), z=given.get("z", np.zeros(1, np.uint8)),
    )  # fmt: skip
    weight = weight_of(model)
    (expected,) = tiny.run(model, {"x": np.eye(inputs, dtype=np.float32)})
    np.testing.assert_allclose(in_pieces(weight), expected.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(in_pieces(weight), weight.numbers())
    symmetric = points in ("none", "middle")
    assert str(weight.scheme) == told(f"uint{bits} group(32) {'symmetric' if symmetric else 'asymmetric'}")
    assert phrase(weight) == told(f"uint{bits} group(32) {'symmetric' if symmetric else 'asymmetric'}")


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis, the first in the lowest bits; what is left of the last byte is ones."""
    per = 8 // bits
    whole = np.full((*values.shape[:-1], -(-values.shape[-1] // per) * per), (1 << bits) - 1)
    whole[..., : values.shape[-1]] = values
    shifted = whole.reshape(*values.shape[:-1], -1, per) << (np.arange(per) * bits)
    return np.asarray(shifted.sum(-1), np.uint8)


@pytest.mark.parametrize(
    ("type", "bits", "asymmetric", "name"),
    [
        ("int4", 4, False, "int4 group(16) symmetric"), ("int4", 4, True, "int4 group(16) asymmetric"),
        ("uint4", 4, False, "uint4 group(16) asymmetric"), ("uint4", 4, True, "uint4 group(16) asymmetric"),
        ("uint8", 2, False, "uint2 group(16) symmetric"), ("uint8", 4, False, "uint4 group(16) symmetric"),
        ("uint8", 4, True, "uint4 group(16) asymmetric"), ("uint8", 8, False, "uint8 group(16) symmetric"),
        ("uint8", 8, True, "uint8 group(16) asymmetric"),
    ],
)  # fmt: skip
def test_gather_block_quantized(piece: int, type: str, bits: int, asymmetric: bool, name: str) -> None:
    rows, features, blocks = 11, 48, 3
    stored = features * bits // 8 if type == "uint8" else features
    points = codes_of(type, (rows, blocks))
    if type == "uint8":
        points = packed(RNG.integers(0, 1 << bits, (rows, blocks)), bits)
    model = tiny.build(
        f"""g (int64[N] ids, {type}[{rows},{stored}] q, float[{rows},{blocks}] s, {type}[{rows},{points.shape[1]}] z)
        => (float[N,{features}] y) {{
        y = com.microsoft.GatherBlockQuantized<bits={bits}, block_size=16, quantize_axis=1>
            (q, ids, s{", z" if asymmetric else ""}) }}""",
        q=codes_of(type, (rows, stored)), s=scales_of((rows, blocks)), z=points,
    )  # fmt: skip
    weight = weight_of(model)
    (expected,) = tiny.run(model, {"ids": np.arange(rows)})
    np.testing.assert_array_equal(in_pieces(weight), expected)
    assert str(weight.scheme) == told(name)
    (layer,) = read_layers(model)
    assert layer.weight.shape == (rows, features)
    np.testing.assert_array_equal(layer.weight.matrix(), expected)


@pytest.mark.parametrize("channels", [False, True])
def test_integer_products(piece: int, channels: bool) -> None:
    """Codes that a kernel multiplies, with the scale behind the sums."""
    many = "16" if channels else ""
    model = tiny.build(
        f"""g (uint8[B,24] x, int8[24,16] q, uint8 a, int8[{many}] z, float[{many}] s) => (float[B,16] y) {{
        i = MatMulInteger(x, q, a, z)  f = Cast<to=1>(i)  y = Mul(f, s) }}""",
        q=RNG.integers(-64, 64, (24, 16)).astype(np.int8), a=np.uint8(0), s=scales_of((16,) if channels else ()),
        z=RNG.integers(1, 9, (16,) if channels else ()).astype(np.int8),
    )  # fmt: skip
    (expected,) = tiny.run(model, {"x": np.eye(24, dtype=np.uint8)})
    weight = weight_of(model)
    np.testing.assert_allclose(in_pieces(weight), expected, rtol=1e-6)
    assert str(weight.scheme) == told(f"int8 {'per-channel' if channels else 'per-tensor'} asymmetric")
    (layer,) = read_layers(model)
    assert layer.weight.shape == (24, 16)
    np.testing.assert_allclose(there(layer.weight.matrix()), expected.T, rtol=1e-6)


def test_convolution_of_codes() -> None:
    model = tiny.build(
        """g (uint8[1,3,1,1] x, float one, uint8 a, int8[8,3,1,1] q, float[8] s, int8[8] z, float out, uint8 o)
        => (float[1,8,1,1] y) {
        c = QLinearConv(x, one, a, q, s, z, out, o)  y = DequantizeLinear(c, out, o) }""",
        one=np.float32(1), a=np.uint8(0), q=RNG.integers(-60, 60, (8, 3, 1, 1)).astype(np.int8), s=scales_of((8,)),
        z=np.zeros(8, np.int8), out=np.float32(0.05), o=np.uint8(128),
    )  # fmt: skip
    (layer,) = read_layers(model)
    matrix = there(layer.weight.matrix())
    assert (matrix.shape, layer.weight.form) == ((8, 3), "int8 per-channel symmetric")
    for place in range(3):
        x = np.zeros((1, 3, 1, 1), np.uint8)
        x[0, place] = 1
        np.testing.assert_allclose(tiny.run(model, {"x": x})[0].reshape(-1), matrix[:, place], atol=0.03)


def test_blocks_of_float8(piece: int) -> None:
    model = tiny.build(
        """g (float16[B,80] x, float8e4m3fn[16,80] q, float[16,3] s) => (float16[B,16] y) {
        y = com.microsoft.MatMulBlockQuantizedFp8Weight<block_size=32>(x, q, s) }""",
        q=codes_of("float8e4m3fn", (16, 80)), s=scales_of((16, 3)),
    )  # fmt: skip
    weight, (layer,) = weight_of(model), read_layers(model)
    (expected,) = tiny.run(model, {"x": np.eye(80, dtype=np.float16)})
    np.testing.assert_allclose(in_pieces(weight), expected.T, rtol=1e-3)
    np.testing.assert_allclose(there(layer.weight.matrix()), expected.T, rtol=1e-3)
    assert (str(weight.scheme), layer.weight.form) == ("fp8_e4m3 group(32) symmetric", "fp8_e4m3 group(32) symmetric")


# ------------------------------------------------------------------------------------------------------------- operands


@pytest.mark.parametrize("layer", ["MatMul", "Gemm<transB=1>", "turned"])
@pytest.mark.parametrize(
    ("attributes", "scales"),
    [("axis=0", (24,)), ("axis=1", (40,)), ("axis=0, block_size=8", (3, 40)), ("axis=1, block_size=8", (24, 5))],
)
def test_operands_as_outputs_by_inputs(layer: str, attributes: str, scales: tuple[int, ...]) -> None:
    inputs, outputs = (24, 40) if layer == "MatMul" else (40, 24)
    turn = "t = Transpose<perm=[1,0]>(w)" if layer == "turned" else "t = Identity(w)"
    model = tiny.build(
        f"""g (float[M,{inputs}] x, int8[24,40] q, float[{",".join(map(str, scales))}] s) => (float[M,{outputs}] y) {{
        w = DequantizeLinear<{attributes}>(q, s)  {turn}  y = {layer if layer != "turned" else "MatMul"}(x, t) }}""",
        q=codes_of("int8", (24, 40)), s=scales_of(scales),
    )  # fmt: skip
    (expected,) = tiny.run(model, {"x": np.eye(inputs, dtype=np.float32)})
    (found,) = read_layers(model)
    assert found.weight.shape == (inputs, outputs)
    np.testing.assert_array_equal(found.weight.matrix(), expected.T)
    size = 24 * 40 + 4 * int(np.prod(scales))
    assert sum(tensor_of(value).nbytes for value in found.weight.constants) == size


def test_weights_that_are_quantized_when_the_session_is_made() -> None:
    model = tiny.build(
        """g (float[M,24] x, float[24,40] w, float[40] s, int8[40] z) => (float[M,40] y) {
        q = QuantizeLinear<axis=1>(w, s, z)  d = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(x, d) }""",
        w="normal", s=scales_of((40,)), z=np.zeros(40, np.int8),
    )  # fmt: skip
    (expected,) = tiny.run(model, {"x": np.eye(24, dtype=np.float32)})
    (found,) = read_layers(model)
    assert found.weight.form == "int8 per-channel symmetric"
    np.testing.assert_array_equal(found.weight.matrix(), expected.T)


# ---------------------------------------------------------------------------------------------------------- our recipes


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize(
    ("recipe", "options", "form"),
    [
        ("rtn-w4", ["quantize-weights.group_size=16"], "int4 group(16) symmetric"),
        ("hqq-w4", ["hqq.group_size=16"], "uint4 group(16) asymmetric"),
        ("int8-weights", [], "int8"),
        ("w8", ["quantize-weights.group_size=16"], "int8 group(16)"),
        ("nf4", [], "nf4 group(64) symmetric"),
        ("nf4", ["nf4.table=fp4"], "fp4_bnb group(64) symmetric"),
        ("nf4", ["nf4.double_quantization=false"], "nf4 group(64) symmetric"),
        ("binary", [], "binary"),
    ],
)
def test_codes_stand_for_what_the_runtime_multiplies_by(
    recipe: str, options: list[Any], target: str, form: str
) -> None:
    """The numbers of a weight against the layer's answer to the rows of the identity."""
    one = tiny.build("g (float[40,40] x, float[40,48] w) => (float[40,48] y) { y = MatMul(x, w) }", w="normal")
    compiled = qcompiler.compile(one, recipe, target=target, options=options).model
    (layer,) = read_layers(compiled)
    weight = layer.weight.stored
    (expected,) = tiny.run(compiled, {"x": np.eye(40, dtype=np.float32)})
    stored = in_pieces(weight)
    stored = stored.T if stored.shape != expected.shape else stored
    # MatMulNBits rounds its input to 8 bits; rows of the identity lose a little in their block's scale.
    np.testing.assert_allclose(stored, expected, rtol=0.01, atol=1e-5)
    assert layer.weight.form.startswith(form)
    np.testing.assert_allclose(there(layer.weight.matrix()), expected.T, rtol=0.01, atol=1e-5)
    (told,) = inspect(compiled).layers
    assert told.statistics is not None
    assert told.statistics.std == pytest.approx(expected.std(), rel=0.02)
    assert told.scheme == str(weight.scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("turned", [False, True])
def test_tables_with_a_scale_for_each_row(piece: int, format: str, symmetric: bool, turned: bool) -> None:
    text = "T = Transpose<perm=[1,0]>(E)  y = Gather(T, ids)" if turned else "y = Gather(E, ids)"
    shape = "32,20" if turned else "20,32"
    model = tiny.build(f"g (int64[N] ids, float[{shape}] E) => (float[N,32] y) {{ {text} }}", E="normal")
    tiny.compile(model, [QuantizeWeights(format=format, symmetric=symmetric)], [])
    (expected,) = tiny.run(model, {"ids": np.arange(20)})
    (site,) = find_quantized_embeddings(model)
    weight, (layer,) = there(table_weight(site)), read_layers(model)
    np.testing.assert_array_equal(in_pieces(weight), expected.T if turned else expected)
    np.testing.assert_array_equal(layer.weight.matrix(), expected)
    assert layer.weight.shape == (20, 32)
    assert str(weight.scheme) == told(f"{format} per-channel {'symmetric' if symmetric else 'asymmetric'}")


@pytest.mark.parametrize(
    ("type", "text"),
    [
        ("uint8", """t = Gather(s, ids)  p = Gather(z, ids)  r = Gather(q, ids)
        y = DequantizeLinear<axis=1, block_size=16>(r, t, p)"""),
        ("uint4", "w = DequantizeLinear<axis=1, block_size=16>(q, s, z)  y = Gather(w, ids)"),
    ],
)  # fmt: skip
def test_tables_with_a_scale_for_each_group(piece: int, type: str, text: str) -> None:
    model = tiny.build(
        f"""g (int64[N] ids, {type}[20,40] q, float[20,3] s, {type}[20,3] z) => (float[N,40] y) {{ {text} }}""",
        q=codes_of(type, (20, 40)), s=scales_of((20, 3)), z=codes_of(type, (20, 3)),
    )  # fmt: skip
    (expected,) = tiny.run(model, {"ids": np.arange(20)})
    (layer,) = read_layers(model)
    np.testing.assert_array_equal(in_pieces(layer.weight.stored), expected)
    np.testing.assert_array_equal(layer.weight.matrix(), expected)
    assert layer.weight.form == f"uint{type[4:]} group(16) asymmetric"


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("form", ["float", "int4", "uint8"])
def test_a_weight_in_a_file_is_never_in_memory_whole(tmp_path: Path, form: str) -> None:
    size = 4096
    if form == "float":
        tensor: ir.TensorProtocol = ir.tensor(np.zeros((size // 2, size), np.float32), name="q")
    elif form == "int4":
        data = np.zeros(size * size // 2, np.uint8)
        tensor = ir.PackedTensor(data, ir.DataType.INT4, shape=ir.Shape([size, size]), name="q")
    else:
        tensor = ir.tensor(np.zeros((size, size // 32, 16), np.uint8), name="q")
    value = ir.Value(name="q", const_value=in_file(tensor, tmp_path), type=ir.TensorType(tensor.dtype))
    scale = ir.Value(name="s", const_value=ir.tensor(np.ones((size, size // 32), np.float32)))
    if form == "float":
        weight = float_weight(value)
    elif form == "int4":
        weight = quantized_weight(ir.node("DequantizeLinear", [value, scale], {"axis": 1, "block_size": 32}))
    else:
        settings = {"K": size, "N": size, "bits": 4, "block_size": 32}
        weight = quantized_weight(ir.node("MatMulNBits", [None, value, scale], settings, domain="com.microsoft"))
    tracemalloc.start()
    try:
        assert sum(part.size for part in there(there(weight).pieces())) in (size * size, size * size // 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20, "16 million numbers are 64 MiB"


def test_what_says_how_to_move_a_constant_is_no_part_of_the_weight() -> None:
    model = tiny.build(
        """g (float[M,6] x, uint8[48] q, float s, uint8 z, int64[2] shape) => (float[M,8] y) {
        d = DequantizeLinear (q, s, z)  r = Reshape (d, shape)  t = Transpose <perm = [1, 0]> (r)
        y = MatMul (x, t) }""",
        q=np.arange(48, dtype=np.uint8), s=np.float32(0.5), z=np.uint8(3), shape=np.array([8, 6]),
    )  # fmt: skip
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert [value.name for value in constants_behind(product.inputs[1])] == ["q", "s", "z"]
