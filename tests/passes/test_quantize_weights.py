"""quantize-weights: codes and scales against a float64 oracle, in every layout, each constant once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import QCompilerError
from qcompiler.formats.scheme import PerGroup
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from qcompiler.targets import Target
from tests import tiny
from tests.oracles import quantized_linear as oracle
from tests.there import held, operand, tensors

MATMUL = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
GEMM = "g (float[M,8] x, float[6,8] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
CONV = "g (float[B,3,9,9] x, float[4,3,3,3] W, float[4] b) => (float[B,4,7,7] y) { [conv] y = Conv(x, W, b) }"
EMBEDDING = "g (int64[B,S] ids, float[4,8] E) => (float[B,S,8] y) { [embed] y = Gather(E, ids) }"

BITS = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int3": (-4, 3),
    "int16": (-32768, 32767),
}


def quantize(model: ir.Model, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    (changes,) = tiny.compile(after, [QuantizeWeights(**options)], [])
    return after, changes


def effective_weight(model: ir.Model) -> np.ndarray:
    """The float matrix [K, N] that the only linear layer really multiplies by."""
    (site,) = find_sites(model).linears
    bias = 0.0 if site.bias is None else held(site.bias)
    return np.asarray(tiny.multiplied(model) - bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 4), ("group", 3)])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
def test_linear(text: str, granularity: str, size: int | None, format: str, symmetric: bool) -> None:
    model = tiny.build(text, W="normal", b="zeros") if text is GEMM else tiny.build(text, W="normal")
    after, changes = quantize(model, format=format, granularity=granularity, group_size=size, symmetric=symmetric)
    (site,) = find_sites(after).linears
    assert not changes.skipped
    assert [c.site for c in changes.changed] == ["fc"]
    assert site.dequantize is not None
    assert "W" not in after.graph.initializers
    W = tiny.data(model, "W") if text is GEMM else tiny.data(model, "W").T  # channels first
    if granularity == "tensor":
        expected = oracle.rounded_rows(W.reshape(1, -1), BITS[format], symmetric, None).reshape(W.shape)
    else:
        expected = oracle.rounded_rows(W, BITS[format], symmetric, size)
    np.testing.assert_allclose(effective_weight(after), expected.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "uint8", "int4"])
def test_convolution(format: str, symmetric: bool) -> None:
    model = tiny.build(CONV, W="normal", b="normal")
    after, changes = quantize(model, format=format, symmetric=symmetric)
    (site,) = find_sites(after).convolutions
    assert not changes.skipped
    expected = oracle.rounded_rows(tiny.data(model, "W").reshape(4, -1), BITS[format], symmetric, None).reshape(
        4, 3, 3, 3
    )
    reference = tiny.build(CONV, W=expected.astype(np.float32), b="normal")
    sample = tiny.feeds(model)[0]
    np.testing.assert_allclose(tiny.run(after, sample)[0], tiny.run(reference, sample)[0], rtol=1e-4, atol=1e-5)
    assert site.dequantize is not None
    assert site.dequantize.attributes.get_int("axis") == 0


def test_a_convolution_has_no_groups() -> None:
    _, changes = quantize(tiny.build(CONV, W="normal", b="normal"), granularity="group", group_size=4)
    assert tiny.reasons(changes)["conv"] == ("convolutions have no groups of input features: use granularity channel")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "uint8", "int16"])
def test_embedding_rows_have_scales_of_their_own(format: str, symmetric: bool, granularity: str) -> None:
    model = tiny.build(EMBEDDING, E="normal")
    size = 4 if granularity == "group" else None
    after, changes = quantize(model, format=format, symmetric=symmetric, granularity=granularity, group_size=size)
    assert not changes.skipped
    expected = oracle.rounded_rows(tiny.data(model, "E"), BITS[format], symmetric, None)
    ids = np.arange(4)[None]
    np.testing.assert_allclose(tiny.run(after, {"ids": ids})[0][0], expected, rtol=1e-5, atol=1e-7)
    assert "E" not in after.graph.initializers


@pytest.mark.parametrize("format", ["int4", "uint4", "int3", "fp8_e4m3"])
def test_an_embedding_of_codes_that_gather_does_not_take(format: str) -> None:
    """Gather knows neither 4-bit integers nor float8: the table stays float, and the reason says so."""
    after, changes = quantize(tiny.build(EMBEDDING, E="normal"), format=format)
    assert "Gather" in tiny.reasons(changes)["embed"]
    assert tiny.operators(after) == ["Gather"]


# ------------------------------------------------------------------------------------------------------ tied weights

TIED = """g (int64[B,S] ids, float[12,8] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
TIED_GEMM = """g (int64[M] ids, float[12,8] E, float[12] b) => (float[M,12] logits) {
    [embed] x = Gather(E, ids)  [lm_head] logits = Gemm<transB=1>(x, E, b) }"""
TIED_TURNED = """g (int64[M] ids, float[8,12] E) => (float[M,12] logits) {
    T = Transpose<perm=[1,0]>(E)  [embed] x = Gather(T, ids)  [lm_head] logits = MatMul(x, E) }"""


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("text", [TIED, TIED_GEMM, TIED_TURNED], ids=["transpose", "gemm", "turned"])
def test_a_tied_embedding_is_stored_once(text: str, format: str, symmetric: bool) -> None:
    model = tiny.build(text, E="normal", b="zeros") if text is TIED_GEMM else tiny.build(text, E="normal")
    after, changes = quantize(model, format=format, symmetric=symmetric)
    assert not changes.skipped
    assert sorted(c.site for c in changes.changed) == ["embed", "lm_head"]
    assert [constant.nbytes for constant in tensors(after).values() if constant.size == 96] == [96]
    E = tiny.data(model, "E") if text is not TIED_TURNED else tiny.data(model, "E").T
    rounded = oracle.rounded_rows(E, BITS[format], symmetric, None)
    ids = np.arange(12)
    logits = tiny.run(after, {"ids": ids[None] if text is TIED else ids})[0].reshape(12, 12)
    np.testing.assert_allclose(logits, rounded @ rounded.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("excluded", ["embed", "lm_head"])
@pytest.mark.parametrize("text", [TIED, TIED_GEMM, TIED_TURNED], ids=["transpose", "gemm", "turned"])
def test_an_excluded_reader_keeps_the_float_constant(text: str, excluded: str) -> None:
    model = tiny.build(text, E="normal", b="zeros") if text is TIED_GEMM else tiny.build(text, E="normal")
    after, changes = quantize(model, ignore=(excluded,))
    assert [c.site for c in changes.changed] == [{"embed": "lm_head", "lm_head": "embed"}[excluded]]
    E = tiny.data(model, "E") if text is not TIED_TURNED else tiny.data(model, "E").T
    rounded = oracle.rounded_rows(E, BITS["int8"], True, None)
    ids = np.arange(12)
    logits = tiny.run(after, {"ids": ids[None] if text is TIED else ids})[0].reshape(12, 12)
    expected = E @ rounded.T if excluded == "embed" else rounded @ E.T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


TWO_READERS = """g (float[B,S,8] x, float[8,8] W) => (float[B,S,8] y, float[B,S,8] z) {
    T = Transpose<perm=[1,0]>(W)  [first] y = MatMul(x, T)  h = Relu(y)  [second] z = MatMul(h, T) }"""


@pytest.mark.parametrize("excluded", ["first", "second"])
def test_an_excluded_reader_of_a_shared_transpose_stays_float(excluded: str) -> None:
    model = tiny.build(TWO_READERS, W="normal")
    after, changes = quantize(model, ignore=(excluded,), format="int4")
    W = tiny.data(model, "W")
    rounded = oracle.rounded_rows(W, BITS["int4"], True, None)
    first, second = (W.T, rounded.T) if excluded == "first" else (rounded.T, W.T)
    sample = tiny.feeds(model)[0]
    y = sample["x"] @ first
    for got, expected in zip(tiny.run(after, sample), (y, np.maximum(y, 0) @ second), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert len(changes.changed) == 1


def test_a_transpose_that_stands_before_the_first_layer() -> None:
    """The Gemm comes first among the layers, and the Transpose of the other one stands before it."""
    model = tiny.build(
        """g (float[M,8] x, float[8,8] W) => (float[M,8] y, float[M,8] z) {
        T = Transpose<perm=[1,0]>(W)  [gemm] y = Gemm<transB=1>(x, W)  h = Relu(y)  [matmul] z = MatMul(h, T) }""",
        W="normal",
    )  # fmt: skip
    after, changes = quantize(model)  # compile() checks the order of the nodes
    assert len(changes.changed) == 2
    assert tiny.operators(after).count("DequantizeLinear") == 1


def test_layers_that_share_a_weight_share_its_codes() -> None:
    model = tiny.build(
        """g (float[B,S,8] x, float[8,8] W) => (float[B,S,8] z) {
        [first] y = MatMul(x, W)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        W="normal",
    )  # fmt: skip
    after, changes = quantize(model)
    assert len(changes.changed) == 2
    assert tiny.operators(after).count("DequantizeLinear") == 1
    assert sum(constant.nbytes for constant in tensors(after).values()) == 64 + 8 * 4


# ------------------------------------------------------------------------------------------------- what is not done


def test_double_precision_is_skipped() -> None:
    """DequantizeLinear has no scales of type double."""
    after, changes = quantize(tiny.build(MATMUL.replace("float[", "double["), W="normal"))
    assert tiny.reasons(changes)["fc"] == "its weight is DOUBLE, and DequantizeLinear has no scales of that type"
    assert tiny.operators(after) == ["MatMul"]


@pytest.mark.parametrize("format", ["nf4", "int32"])
def test_formats_that_dequantize_linear_cannot_decode(format: str) -> None:
    with pytest.raises(QCompilerError, match=format):
        QuantizeWeights(format=format)


def test_formats_that_need_a_newer_opset() -> None:
    with pytest.raises(QCompilerError, match=r"opset 21.*fp4"):
        quantize(tiny.build(MATMUL, W="normal"), format="fp4")


@pytest.mark.parametrize("opset", [21, 25])
def test_two_bits(opset: int) -> None:
    """Before opset 25 there is no 2-bit type, so the codes lie in 4 bits, and the node says how many they have."""
    model = tiny.build(MATMUL, opset=opset, W="normal")
    after, _ = quantize(model, format="int2")
    (node,) = [node for node in after.graph if node.op_type == "DequantizeLinear"]
    assert operand(node, 0).dtype == (ir.DataType.INT2 if opset == 25 else ir.DataType.INT4)
    assert node.metadata_props.get("qcompiler.bits") == (None if opset == 25 else "2")
    W = tiny.data(model, "W")
    expected = np.clip(np.round(W / (np.abs(W).max(0) / np.float32(1.5))), -2, 1) * (np.abs(W).max(0) / 1.5)
    np.testing.assert_allclose(effective_weight(after), expected, rtol=1e-5, atol=1e-6)


def test_twice_is_once() -> None:
    model = tiny.build(MATMUL, W="normal")
    once, _ = quantize(model)
    twice, changes = quantize(once, format="int4")
    assert "already" in tiny.reasons(changes)["fc"]
    assert tiny.operators(twice) == tiny.operators(once)


def test_layers_option() -> None:
    _, changes = quantize(tiny.build(TIED, E="normal"), layers=("embedding",))
    assert [c.site for c in changes.changed] == ["embed"]


def test_unsupported_forms_are_reported() -> None:
    model = tiny.build("g (float[2,S,8] x, float[2,8,6] W) => (float[2,S,6] y) { [fc] y = MatMul(x, W) }", W="normal")
    _, changes = quantize(model)
    assert "rank 3" in tiny.reasons(changes)["fc"]


def test_not_a_number_is_refused() -> None:
    W = np.ones((8, 6), np.float32)
    W[2, 3] = np.nan
    with pytest.raises(QCompilerError, match="NaN"):
        quantize(tiny.build(MATMUL, W=W))


def test_mse_is_no_worse_than_minmax() -> None:
    model = tiny.build(MATMUL, W="normal")
    errors = {}
    for search in ("minmax", "mse"):
        after, _ = quantize(model, format="int4", search=search)
        errors[search] = np.linalg.norm(effective_weight(after) - tiny.data(model, "W"))
    assert errors["mse"] < errors["minmax"]


# -------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    inputs=st.integers(2, 19), outputs=st.integers(2, 9), size=st.integers(1, 20), zero=st.integers(0, 8),
    format=st.sampled_from(["int8", "uint8", "int4", "uint4"]), symmetric=st.booleans(), half=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group"]), transposed=st.booleans(),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_every_weight_is_within_half_a_step(
    inputs: int, outputs: int, size: int, zero: int, format: str, symmetric: bool, half: bool, granularity: str,
    transposed: bool, magnitude: float, seed: int,
) -> None:  # fmt: skip
    """Whatever the shape: the layer multiplies by its weight within half a step (a whole one at the end of a range)."""
    dtype = np.float16 if half else np.float32
    W = (np.random.default_rng(seed).normal(size=(inputs, outputs)) * magnitude).astype(dtype)
    W[:, zero % outputs] = 0
    kind = "float16" if half else "float"
    node = "Gemm<transB=1>(x, W)" if transposed else "MatMul(x, W)"
    dims = f"{outputs},{inputs}" if transposed else f"{inputs},{outputs}"
    text = f"g ({kind}[M,{inputs}] x, {kind}[{dims}] W) => ({kind}[M,{outputs}] y) {{ [fc] y = {node} }}"
    model = tiny.build(text, W=W.T if transposed else W)
    group = size if granularity == "group" else None
    after, changes = quantize(model, format=format, granularity=granularity, group_size=group, symmetric=symmetric)
    assert not changes.skipped
    got = effective_weight(after).astype(np.float64)
    wide = W.astype(np.float64)
    qmin, qmax = BITS[format]
    blocks = np.arange(inputs) // (group or inputs)
    for n in range(outputs):
        for block in range(blocks[-1] + 1):
            part = blocks == block
            values = wide if granularity == "tensor" else wide[part, n]
            span = 2 * np.abs(values).max() if symmetric else max(values.max(), 0) - min(values.min(), 0)
            step = span / (qmax - qmin - (1 if symmetric and qmax - qmin == 255 else 0))
            ends = 1.0 if not symmetric or qmax - qmin == 15 else 0.5  # rounded zero points, and codes up to 7 of 7.5
            # A float16 scale is a multiple of 2^-24, and every code is multiplied by its error.
            rounding = np.abs(wide[part, n]).max() * (2**-9 if half else 2**-20) + half * (qmax - qmin) * 2**-24
            assert np.abs(got[part, n] - wide[part, n]).max() <= ends * step * 1.01 + rounding
    if symmetric:
        np.testing.assert_array_equal(got[:, zero % outputs], 0)


def test_one_constant_read_in_both_directions_has_scales_for_one() -> None:
    model = tiny.build(
        """g (float[M,8] x, float[8,8] W) => (float[M,8] z) {
        [first] y = MatMul (x, W)  T = Transpose <perm = [1, 0]> (W)  [second] z = MatMul (y, T) }""",
        W="normal",
    )
    _, changes = quantize(model)
    assert [changed.site for changed in changes.changed] == ["first"]
    assert tiny.reasons(changes) == {"second": "first shares its constant and needs scales along the other axis"}


@pytest.mark.parametrize(
    ("options", "target", "size"),
    [
        ({"granularity": "group"}, "ort-cpu", 128),
        ({"granularity": "group"}, "ort-cuda", 32),
        ({"granularity": "group"}, "portable", None),  # which prefers none
        ({"granularity": "group", "group_size": 16}, "ort-cuda", 16),
        ({"granularity": "channel"}, "ort-cuda", None),
    ],
)
def test_a_group_is_as_large_as_the_target_likes_it_where_it_is_open(
    options: dict[str, Any], target: str, size: int | None
) -> None:
    step = QuantizeWeights(**options).for_target(Target.load(target))
    assert isinstance(step, QuantizeWeights)
    assert step.group_size == size
    if options["granularity"] == "group":
        assert step.scheme().granularity == PerGroup(size or 128)


def test_a_group_holds_one_weight_at_least() -> None:
    assert QuantizeWeights(granularity="group", group_size=1).scheme().granularity == PerGroup(1)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        QuantizeWeights(granularity="group", group_size=0)


def test_what_an_analysis_decides_does_not_overrule_the_options() -> None:
    step = QuantizeWeights(bits={"a": 8}).decided({"a": 4, "b": 4})
    assert isinstance(step, QuantizeWeights)
    assert step.bits == {"a": 8, "b": 4}


@pytest.mark.parametrize(
    ("format", "bits", "said"),
    [
        ("int8", 32, "int8 does not come in 32 bits; choose of 2, 3, 4, 8, 16"),
        ("uint4", 5, "uint4 does not come in 5 bits; choose of 2, 3, 4, 8, 16"),
        ("fp4", 4, "fp4 does not come in 4 bits; only integers do"),
        ("fp8_e4m3", 8, "fp8_e4m3 does not come in 8 bits; only integers do"),
    ],
)
def test_bits_that_a_format_does_not_come_in(format: str, bits: int, said: str) -> None:
    with pytest.raises(QCompilerError, match=f"quantize-weights.bits: {said}"):
        QuantizeWeights(format=format, bits={"fc": bits})


def test_binary_weights_are_for_linear_layers_of_any_float_type() -> None:
    reason = "binary weights are decoded for linear layers alone: choose int8 or uint8 for this one"
    for text, constants in ((CONV, {"W": "normal", "b": "normal"}), (EMBEDDING, {"E": "normal"})):
        _, changes = quantize(tiny.build(text, **constants), format="binary")
        assert list(tiny.reasons(changes).values()) == [reason]
    _, changes = quantize(tiny.build(MATMUL.replace("float[", "double["), W="normal"), format="binary")
    ((site, detail),) = [(changed.site, changed.detail) for changed in changes.changed]
    assert (site, "bits a weight" in detail) == ("fc", True)


def test_binary_weights_have_no_scale_for_the_whole_tensor() -> None:
    for granularity in ("channel", "group"):
        assert QuantizeWeights(format="binary", granularity=granularity).format == "binary"
    with pytest.raises(QCompilerError, match="set granularity to channel or group"):
        QuantizeWeights(format="binary", granularity="tensor")
