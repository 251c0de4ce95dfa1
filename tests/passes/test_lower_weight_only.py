"""lower-weight-only: MatMulNBits multiplies by the weights that the portable graph dequantizes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.lower_weight_only import LowerWeightOnly
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import PassError
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.embeddings import find_quantized_embeddings
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.oracles import quantized_linear as oracle
from tests.there import held, operand, tensor_of, tensors, there

MATMUL = "g (float[B,S,K] x, float[K,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
ADD = "g (float[M,K] x, float[K,6] W, float[6] b) => (float[M,6] y) { [fc] p = MatMul(x, W)  y = Add(p, b) }"
GEMM = "g (float[M,K] x, float[6,K] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
TIED = """g (int64[B,S] ids, float[12,K] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
TIED_GEMM = """g (int64[M] ids, float[12,K] E, float[12] b) => (float[M,12] logits) {
    [embed] x = Gather(E, ids)  [lm_head] logits = Gemm<transB=1>(x, E, b) }"""
ALL = {"matmul": MATMUL, "add": ADD, "gemm": GEMM, "tied": TIED, "tied-gemm": TIED_GEMM}


def model_of(text: str, features: int = 32, half: bool = False, opset: int = 21) -> ir.Model:
    text = text.replace("K]", f"{features}]").replace("[K,", f"[{features},")
    names = [name for name in ("W", "E", "b") if f"] {name}," in text or f"] {name})" in text]
    text = text.replace("float[", "float16[") if half else text
    return tiny.build(text, opset=opset, **dict.fromkeys(names, "normal"))


def lower(model: ir.Model, weights: dict[str, Any] | None = None, **options: Any) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes)."""
    portable = model.clone()
    tiny.compile(portable, [QuantizeWeights(**(weights or {"format": "uint8"}))], [])
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerWeightOnly(**options)], [])
    return portable, lowered, changes


def assert_same(portable: ir.Model, lowered: ir.Model, samples: list[Any], tolerance: float) -> None:
    for sample in samples:
        for got, wanted in zip(tiny.run(lowered, sample, optimized=True), tiny.run(portable, sample), strict=True):
            assert got.dtype == wanted.dtype
            assert tiny.relative_error(got, wanted) <= tolerance


@pytest.mark.parametrize(
    "weights", [{"format": "uint8"}, {"format": "int8"}, {"granularity": "tensor"}], ids=["u8", "s8", "tensor"]
)
@pytest.mark.parametrize(("features", "block"), [(32, 16), (32, 32), (40, 16), (20, 32), (130, 128)])
@pytest.mark.parametrize("layer", ALL)
def test_the_kernel_gives_what_the_graph_means(layer: str, features: int, block: int, weights: dict[str, Any]) -> None:
    model = model_of(ALL[layer], features)
    portable, lowered, changes = lower(model, weights, block_size=block, accuracy_level=0)
    assert not changes.skipped
    assert {c.kernel for c in changes.changed if c.site != "embed"} == {"MatMulNBits"}
    assert {c.kernel for c in changes.changed if c.site == "embed"} <= {"GatherBlockQuantized"}
    assert not {"MatMul", "Gemm", "DequantizeLinear", "Transpose"} & set(tiny.operators(lowered))
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


GROUPS = [{}, {"granularity": "tensor"}, *({"granularity": "group", "group_size": g} for g in (16, 32, 48, 256, 512))]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: "-".join(map(str, groups.values())) or "channel")
@pytest.mark.parametrize(
    ("format", "opset"),
    [("int2", 25), ("uint2", 25), ("int2", 21), ("uint2", 21), ("int3", 21), ("uint3", 21), ("int4", 21),
     ("uint4", 21), ("int8", 21), ("uint8", 21)],
)  # fmt: skip
def test_codes_of_all_kinds(format: str, opset: int, groups: dict[str, Any], symmetric: bool) -> None:
    """Groups that the operator has and has not, whole ones and a shorter last one, stored by row and by column."""
    for layer, features in product((MATMUL, GEMM), (96, 200, 520)):
        model = model_of(layer, features, opset=opset)
        weights = {"format": format, "symmetric": symmetric, **groups}
        portable, lowered, changes = lower(model, weights, accuracy_level=0)
        assert not changes.skipped
        assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(tiny.operators(lowered))
        (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
        assert kernel.attributes.get_int("bits") == {"2": 2, "3": 4, "4": 4, "8": 8}[format[-1]]
        movable = "3" in format and groups.get("granularity") == "tensor"  # one zero point, and room to move it
        assert len(kernel.inputs) == (3 if symmetric or movable else 4)
        assert_same(portable, lowered, tiny.feeds(model), 1e-5)


@pytest.mark.parametrize(("group", "block"), [(16, 16), (32, 32), (48, 16), (96, 32), (256, 256), (512, 256)])
def test_blocks_are_the_groups_or_the_widest_that_divide_them(group: int, block: int) -> None:
    weights = {"format": "int4", "granularity": "group", "group_size": group}
    _, lowered, _ = lower(model_of(MATMUL, 1024), weights, block_size=64)
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
    assert kernel.attributes.get_int("block_size") == block


def test_what_the_operator_reads() -> None:
    """Low nibble first, rows of outputs; zero points in pairs of blocks; what pads the last block is a zero point."""
    codes = np.random.default_rng(0).integers(0, 16, (24, 3)).astype(np.uint8)
    points = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    model = blocked(ir.Tensor(codes, dtype=ir.DataType.UINT4), np.ones((2, 3), np.float32),
                    ir.Tensor(points, dtype=ir.DataType.UINT4), block_size=16)  # fmt: skip
    tiny.compile(model, [LowerWeightOnly()], [])
    packed = tiny.data(model, "Q.blocks")
    assert packed.shape == (3, 2, 8)
    full = np.concatenate([codes, np.repeat(points[1:], 8, axis=0)]).T.reshape(3, 2, 16)
    np.testing.assert_array_equal(packed & 15, full[..., 0::2])
    np.testing.assert_array_equal(packed >> 4, full[..., 1::2])
    np.testing.assert_array_equal(tiny.data(model, "Q.block_zero_points"), [[1 | 4 << 4], [2 | 5 << 4], [3 | 6 << 4]])


def test_unsigned_codes_without_zero_point_start_at_zero() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (32, 3)).astype(np.uint8)
    model = blocked(ir.Tensor(codes, dtype=ir.DataType.UINT4), np.full((2, 3), 0.1, np.float32), None, block_size=16)
    lowered = model.clone()
    tiny.compile(lowered, [LowerWeightOnly(accuracy_level=0)], [])
    assert_same(model, lowered, tiny.feeds(model), 1e-5)


def test_codes_wider_than_noted_are_refused() -> None:
    codes = np.full((32, 3), 5, np.int8)
    model = blocked(ir.Tensor(codes, dtype=ir.DataType.INT4), np.ones((2, 3), np.float32), None, block_size=16)
    next(node for node in model.graph if node.op_type == "DequantizeLinear").metadata_props["qcompiler.bits"] = "2"
    with pytest.raises(PassError, match="2 bits"):
        tiny.compile(model, [LowerWeightOnly()], [])


def blocked(codes: ir.Tensor[Any], scale: np.ndarray, zero_point: ir.Tensor[Any] | None, block_size: int) -> ir.Model:
    """y = x DequantizeLinear(Q, s[, z]) in blocks along the inputs."""
    features, outputs = codes.shape.numpy()
    model = tiny.build(
        f"""g (float[M,{features}] x, float[{features},{outputs}] W) => (float[M,{outputs}] y) {{
        [fc] y = MatMul(x, W) }}""",
        W="zeros",
    )
    values = []
    for name, tensor in (("Q", codes), ("s", ir.tensor(scale)), ("z", zero_point)):
        if tensor is not None:
            shape = ir.Shape(tensor.shape.numpy())
            values.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor))
            model.graph.register_initializer(values[-1])
    attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", block_size)]
    node = ir.Node("", "DequantizeLinear", values, attributes, name="decoded")
    (layer,) = model.graph
    node.outputs[0].name, node.outputs[0].type = "decoded", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = codes.shape
    model.graph.insert_before(layer, [node])
    layer.replace_input_with(1, node.outputs[0])
    del model.graph.initializers["W"]
    return model


@pytest.mark.parametrize("level", [0, 1, 4])
def test_accuracy_levels(level: int) -> None:
    """4 rounds the activation to 8 bits in blocks: about half a percent."""
    model = model_of(MATMUL, 128)
    for weights in ({"format": "uint8"}, {"format": "int4", "granularity": "group", "group_size": 32},
                    {"format": "uint4", "symmetric": False}):  # fmt: skip
        portable, lowered, _ = lower(model, weights, accuracy_level=level)
        assert_same(portable, lowered, tiny.feeds(model), 0.01 if level == 4 else 1e-5)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("layer", ALL)
def test_half_precision(layer: str, level: int) -> None:
    model = model_of(ALL[layer], half=True)
    portable, lowered, changes = lower(model, accuracy_level=level)
    assert not changes.skipped
    assert_same(portable, lowered, tiny.feeds(model), 0.012 if level == 4 else 2e-3)


@pytest.mark.parametrize("weights", [{"format": "int8"}, {"format": "uint4", "symmetric": False}])
@pytest.mark.parametrize("layer", ALL)
def test_half_precision_in_the_operator(layer: str, weights: dict[str, Any]) -> None:
    model = model_of(ALL[layer], half=True)
    portable, lowered, _ = lower(model, weights, accuracy_level=0, half_precision=True)
    assert "Cast" not in tiny.operators(lowered)
    kernels = [node for node in lowered.graph if node.op_type == "MatMulNBits"]
    assert {operand(node, 2).dtype for node in kernels} == {ir.DataType.FLOAT16}
    assert_same(portable, lowered, tiny.feeds(model), 2e-3)


@pytest.mark.parametrize("optimized", [False, True])
def test_half_precision_between_nodes_that_run_in_float(optimized: bool) -> None:
    """ONNX Runtime would turn half precision scales by a Cast that hides them from the kernel: silent garbage."""
    model = tiny.build(
        "g (float16[M,32] x, float16[32,6] W) => (float16[M,6] y) { h = Tanh(x) [fc] p = MatMul(h, W)  y = Tanh(p) }",
        W="normal",
    )
    portable, lowered, _ = lower(model, accuracy_level=4)
    for sample in tiny.feeds(model):
        (got,), (wanted,) = tiny.run(lowered, sample, optimized=optimized), tiny.run(portable, sample)
        assert tiny.relative_error(got, wanted) <= 0.012


@pytest.mark.parametrize("first", ["Gemm<transB=1>(x, V, b)", "MatMul(x, W)"], ids=["gemm", "matmul"])
def test_a_layer_that_reads_another_layer(first: str) -> None:
    """The first one is lowered, and gone, when the second one's turn comes."""
    model = tiny.build(
        f"""g (float[M,32] x, float[32,6] W, float[6,32] V, float[6] b, float[6,5] U) => (float[M,6] y, float[M,5] z) {{
        [first] y = {first}  [second] z = MatMul(y, U) }}""",
        W="normal", V="normal", b="normal", U="normal",
    )  # fmt: skip
    portable, lowered, changes = lower(model, accuracy_level=0)
    assert {changed.site for changed in changes.changed} == {"first", "second"}
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


def test_a_layer_that_rounds_what_another_layer_gives() -> None:
    """The pair between them reads what the first one's kernel gives by then."""
    model = tiny.build(
        """g (float[M,32] x, float[32,64] W, float[64,32] V, float[32,16] U) => (float[M,16] y) {
        [first] a = MatMul(x, W) [second] b = MatMul(a, V) [third] y = MatMul(b, U) }""",
        W="normal", V="normal", U="normal",
    )  # fmt: skip
    compiled = qcompiler.compile(model, "w4a8", calibration=tiny.feeds(model, 6))
    assert {site.name: site.kernel for site in compiled.report.sites} == dict.fromkeys(
        ("first", "second", "third"), "MatMulNBits"
    )
    for sample in tiny.feeds(model):
        (got,), (wanted,) = tiny.run(compiled.model, sample), tiny.run(model, sample)
        assert tiny.relative_error(got, wanted) < 0.4


@pytest.mark.parametrize(("features", "block"), [(32, 32), (192, 64), (256, 128), (2880, 128)])
def test_blocks_are_not_padded_where_narrower_ones_store_less(features: int, block: int) -> None:
    _, lowered, _ = lower(model_of(MATMUL, features))
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
    assert kernel.attributes.get_int("block_size") == block


@pytest.mark.parametrize("code", [127, -127])
@pytest.mark.parametrize("tokens", [1, 16])
def test_extreme_codes_do_not_saturate(tokens: int, code: int) -> None:
    """The rounded activations are all ±127 and the weights, too."""
    W = np.full((256, 64), code / 127, np.float32)
    model = tiny.build("g (float[M,256] x, float[256,64] W) => (float[M,64] y) { [fc] y = MatMul(x, W) }", W=W)
    _, lowered, _ = lower(model, accuracy_level=4)
    got = tiny.run(lowered, {"x": np.ones((tokens, 256), np.float32)}, optimized=True)[0]
    np.testing.assert_allclose(got, np.full((tokens, 64), 256 * np.sign(code)), rtol=1e-5)


def test_random_codes_of_full_range_do_not_saturate() -> None:
    rng = np.random.default_rng(0)
    W = rng.choice([-1.0, 1.0, 0.9], size=(256, 64)).astype(np.float32)
    x = rng.choice([-1.0, 1.0, 0.97], size=(9, 256)).astype(np.float32)
    model = tiny.build("g (float[M,256] x, float[256,64] W) => (float[M,64] y) { [fc] y = MatMul(x, W) }", W=W)
    _, lowered, _ = lower(model, accuracy_level=4)
    s_w = np.abs(W).max(0) / np.float32(127)
    exact = oracle.product(
        oracle.codes(x, 1 / 127, 0, -127, 127), 1 / 127, 0, oracle.codes(W, s_w, 0, -127, 127), s_w, 0
    )
    assert tiny.relative_error(tiny.run(lowered, {"x": x}, optimized=True)[0], exact) < 1e-5


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("type", ["uint8", "uint4"])
def test_extreme_codes_with_zero_points_do_not_saturate(type: str, tokens: int) -> None:
    """The rounded activations are all ±127, and every code is the largest, next to zero points that are the least."""
    largest, blocks = {"uint8": 255, "uint4": 15}[type], np.full((4, 64), 2.0**-7, np.float32)
    dtype = ir.DataType[type.upper()]
    model = blocked(ir.Tensor(np.full((256, 64), largest, np.uint8), dtype=dtype), blocks,
                    ir.Tensor(np.zeros((4, 64), np.uint8), dtype=dtype), block_size=64)  # fmt: skip
    tiny.compile(model, [LowerWeightOnly(accuracy_level=4)], [])
    got = tiny.run(model, {"x": np.ones((tokens, 256), np.float32)}, optimized=True)[0]
    np.testing.assert_allclose(got, np.full((tokens, 64), 256 * largest / 128), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("features", [32, 40])
@pytest.mark.parametrize("text", [TIED, TIED_GEMM], ids=["transpose", "gemm"])
def test_a_tied_embedding_is_stored_once(text: str, features: int) -> None:
    model = model_of(text, features)
    _, lowered, _ = lower(model, block_size=16)
    (large,) = [constant for constant in tensors(lowered).values() if constant.size >= 12 * features]
    assert large.nbytes == 12 * -(-features // 16) * 16


def test_layers_that_share_a_weight_share_it_lowered() -> None:
    model = tiny.build(
        """g (float[B,S,32] x, float[32,32] W) => (float[B,S,32] z) {
        [first] y = MatMul(x, W)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        W="normal",
    )  # fmt: skip
    portable, lowered, changes = lower(model, accuracy_level=0, block_size=16)
    assert len(changes.changed) == 2
    assert sum(constant.size == 1024 for constant in tensors(lowered).values()) == 1
    assert_same(portable, lowered, tiny.feeds(model), 1e-5)


def test_one_square_constant_read_in_both_directions() -> None:
    portable = tiny.build(
        """g (float[M,32] x, uint8[32,32] Q, float s, uint8 z) => (float[M,32] y1, float[M,32] y2) {
        w = DequantizeLinear(Q, s, z)  [first] y1 = MatMul(x, w)  [second] y2 = Gemm<transB=1>(x, w) }""",
        Q=np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8), s=np.float32(0.02), z=np.uint8(128),
    )  # fmt: skip
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerWeightOnly(accuracy_level=0, block_size=16)], [])
    assert len(changes.changed) == 2
    assert_same(portable, lowered, tiny.feeds(portable), 1e-5)


@pytest.mark.parametrize(("format", "size"), [("int2", 4), ("int3", 2), ("uint4", 2), ("uint8", 1)])
def test_codes_take_the_bits_that_they_have(format: str, size: int) -> None:
    _, lowered, _ = lower(model_of(MATMUL, 64), {"format": format}, block_size=16)
    assert tensor_of(lowered.graph.initializers["W.codes.blocks"]).nbytes == 64 * 6 // size


def test_large_codes_are_computed_when_they_are_written() -> None:
    text = MATMUL.replace("6]", "2048]")
    portable, lowered, _ = lower(model_of(text, 2048), {"format": "int4", "granularity": "group", "group_size": 32})
    tensor = lowered.graph.initializers["W.codes.blocks"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert isinstance(portable.graph.initializers["W.codes"].const_value, ir.LazyTensor)
    assert tensor.nbytes == tensor.numpy().nbytes == 2048 * 1024


@pytest.mark.parametrize("weights", [{"format": "int8"}, {"format": "uint4"}], ids=["int8", "uint4"])
@pytest.mark.parametrize("layer", ALL)
def test_every_layer_is_the_operator_when_it_runs(layer: str, weights: dict[str, Any], tmp_path: Path) -> None:
    _, lowered, _ = lower(model_of(ALL[layer]), weights)
    found = [node.op_type for node in tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")]
    assert "MatMulNBits" in found
    assert not {"MatMul", "Gemm", "DequantizeLinear", "FusedMatMul", "Transpose"} & set(found)


# ------------------------------------------------------------------------------------------------- what is not done


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"format": "int16"}, "INT16 codes"),
        ({"granularity": "group", "group_size": 8}, "groups of 8 features are no multiple of 16"),
        ({"granularity": "group", "group_size": 24}, "groups of 24 features are no multiple of 16"),
    ],
)
def test_skipped_with_the_reason(weights: dict[str, Any], reason: str) -> None:
    portable, lowered, changes = lower(model_of(MATMUL), weights)
    assert reason in tiny.reasons(changes)["fc"]
    assert tiny.operators(lowered) == tiny.operators(portable)


def test_scales_along_the_inputs_are_skipped_with_the_reason() -> None:
    portable, _, _ = lower(
        tiny.build("g (float[M,32] x, float[32,32] W) => (float[M,32] y) { [fc] y = MatMul(x, W) }", W="normal")
    )
    (site,) = find_sites(portable).linears
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", 0)
    (changes,) = tiny.compile(portable, [LowerWeightOnly()], [])
    assert "along its inputs" in tiny.reasons(changes)["fc"]


def test_layers_with_quantized_activations_are_left_to_others() -> None:
    model = model_of(MATMUL)
    tiny.compile(model, [QuantizeWeights(), QuantizeActivations()], tiny.feeds(model))
    before = tiny.operators(model)
    (changes,) = tiny.compile(model, [LowerWeightOnly()], [])
    assert not changes.changed
    assert not changes.skipped
    assert tiny.operators(model) == before


def test_an_embedding_with_scales_of_its_own_keeps_them() -> None:
    """It gathers the codes of the layer, and means other numbers by them."""
    portable, _, _ = lower(model_of(TIED))
    (embedding,) = find_quantized_embeddings(portable)
    scale = embedding.scale
    own = ir.Value(name="own_scale", type=scale.type, shape=scale.shape,
                   const_value=ir.tensor(held(scale) * 3, name="own_scale"))  # fmt: skip
    portable.graph.register_initializer(own)
    for node, index in list(scale.uses()):
        if node.op_type == "Gather":
            node.replace_input_with(index, own)
    lowered = portable.clone()
    tiny.compile(lowered, [LowerWeightOnly()], [])
    assert_same(portable, lowered, tiny.feeds(portable, ids=12), 1e-5)


def test_a_tied_embedding_with_ids_of_unknown_rank_is_skipped() -> None:
    portable, _, _ = lower(model_of(TIED))
    portable.graph.inputs[0].shape = None
    changes = LowerWeightOnly().apply(portable, StatisticsStore())
    assert tiny.reasons(changes) == {"embed": "its ids have an unknown number of dimensions"}
    assert [changed.site for changed in changes.changed] == ["lm_head"]


def test_zero_points_in_another_shape_than_scales_are_skipped() -> None:
    portable, _, _ = lower(model_of(MATMUL), {"format": "uint8", "symmetric": False})
    (site,) = find_sites(portable).linears
    points = operand(site.dequantize, 2)
    points.const_value = ir.tensor(np.zeros(5, np.uint8), name=points.name)
    changes = LowerWeightOnly().apply(portable, StatisticsStore())
    assert tiny.reasons(changes) == {"fc": "the zero points of its weight do not have the shape of its scales"}


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_a_pair_that_came_with_the_model_stays(target: str) -> None:
    """What it rounds, and where it saturates, is part of what the model computes."""
    model = tiny.build(
        """g (float[B,32] x, float[32,16] W, float s, uint8 z) => (float[B,16] y) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            [fc] y = MatMul (d, W) }""",
        W="normal", s=np.float32(0.01), z=np.uint8(128),
    )  # fmt: skip
    feed = {"x": (3 * np.random.default_rng(0).normal(size=(4, 32))).astype(np.float32)}  # most of it saturates
    result = qcompiler.compile(model, "w8", target=target)
    (site,) = result.report.sites
    assert (site.status, site.kernel) == ("quantized", "MatMulNBits")
    assert [node.op_type for node in result.model.graph][:2] == ["QuantizeLinear", "DequantizeLinear"]
    expected, got = tiny.run(model, feed)[0], tiny.run(result.model, feed, optimized=True)[0]
    assert tiny.relative_error(got, expected) < 0.03
