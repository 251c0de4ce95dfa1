"""folding: dividing what writes a value and multiplying what reads it keeps the function, whatever stands between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from passes.awq import Awq
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting import folding
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.analyses import linear_groups_of
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import NormGroup
from tests import tiny
from tests.there import dims, numpy_type, there

# Attention over [B, S, 8] with heads of 4: four of queries, and as many of keys and values as HEADS says.
ATTENTION = """g (float[B,S,8] x, float[8,16] Wq, float[8,KV] Wk, float[8,KV] Wv, float[KV] bv, float[16,8] Wo,
    int64[4] as_q, int64[4] as_kv, int64[1] two, int64[5] times, int64[4] merged, int64[3] flat) => (float[B,S,8] y) {
    [q_proj] q = MatMul(x, Wq)  [k_proj] k = MatMul(x, Wk)  [v_mul] v0 = MatMul(x, Wv)  v = Add(v0, bv)
    q4 = Reshape(q, as_q)  k4 = Reshape(k, as_kv)  v4 = Reshape(v, as_kv)
    qh = Transpose<perm=[0,2,1,3]>(q4)  kh = Transpose<perm=[0,2,1,3]>(k4)  vh = Transpose<perm=[0,2,1,3]>(v4)
    BODY
    [o_proj] y = MatMul(o, Wo) }"""
DECOMPOSED = """ke = Unsqueeze(kh, two)  kx = Expand(ke, times)  kr = Reshape(kx, merged)
    ve = Unsqueeze(vh, two)  vx = Expand(ve, times)  vr = Reshape(vx, merged)
    kt = Transpose<perm=[0,1,3,2]>(kr)  scores = MatMul(qh, kt)  probs = Softmax<axis=-1>(scores)
    oh = MatMul(probs, vr)  o4 = Transpose<perm=[0,2,1,3]>(oh)  o = Reshape(o4, flat)"""
DIRECT = """kt = Transpose<perm=[0,1,3,2]>(kh)  scores = MatMul(qh, kt)  probs = Softmax<axis=-1>(scores)
    oh = MatMul(probs, vh)  o4 = Transpose<perm=[0,2,1,3]>(oh)  o = Reshape(o4, flat)"""
OPERATOR_4D = "oh = Attention(qh, kh, vh)  o4 = Transpose<perm=[0,2,1,3]>(oh)  o = Reshape(o4, flat)"
OPERATOR_3D = "o = Attention<q_num_heads=4, kv_num_heads=HEADS>(q, k, v)"
MICROSOFT = "o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)"


def attention(body: str, heads: int, **constants: Any) -> ir.Model:
    text = ATTENTION.replace("BODY", body).replace("KV", str(4 * heads)).replace("HEADS", str(heads))
    shapes = {
        "as_q": [0, 0, 4, 4], "as_kv": [0, 0, heads, 4], "two": [2], "times": [1, 1, 4 // heads, 1, 1],
        "merged": [0, 4, -1, 4], "flat": [0, 0, 16],
    }  # fmt: skip
    arrays = {name: np.array(shape) for name, shape in shapes.items()}
    weights = dict.fromkeys(("Wq", "Wk", "Wv", "bv", "Wo"), "normal")
    return tiny.build(text, opset=23, **arrays, **weights, **constants)


def group_of(model: ir.Model, name: str) -> NormGroup:
    return next(group for group in linear_groups_of(model) if any(linear.name == name for linear in group.linears))


def heads_of(heads: int) -> list[int]:
    """Channel h·4 + d of o_proj's input comes from channel (h // repeats)·4 + d of v_proj."""
    return [(h // (4 // heads)) * 4 + d for h in range(4) for d in range(4)]


FORMS = {
    "decomposed, grouped": (DECOMPOSED, 2),
    "decomposed, one head of values": (DECOMPOSED, 1),
    "decomposed, repeated once": (DECOMPOSED, 4),
    "decomposed, one head each": (DIRECT, 4),
    "operator, grouped": (OPERATOR_4D, 2),
    "operator, one head each": (OPERATOR_4D, 4),
    "operator of rank 3, grouped": (OPERATOR_3D, 2),
    "operator of rank 3, one head each": (OPERATOR_3D, 4),
    "com.microsoft": (MICROSOFT, 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_v_proj_takes_factors_for_o_proj(form: str) -> None:
    body, heads = FORMS[form]
    model = attention(body, heads)
    group = group_of(model, "o_proj")
    assert group.factor is not None
    assert group.factor.through_attention
    assert group.factor.linear.name == "v_mul"
    assert group.factor.channels.tolist() == heads_of(heads)
    rescaled_at_random(model, [group])


def rescaled_at_random(model: ir.Model, groups: list[NormGroup], tolerance: float = 5e-6) -> None:
    """Rescale by random factors in place and compare all outputs, and the values that are said to be divided."""
    rng = np.random.default_rng(0)
    before, changes, rw = model.clone(), Changes(), Rewriter(model, "awq")
    for group in groups:
        squares = folding.shared(group, np.exp(2 * rng.normal(size=group.linears[0].in_features)))
        folding.rescale(group, np.sqrt(squares), rw, changes)
    tiny.check(model)
    assert changes.rescaled
    probes = [before, model.clone()]
    for probe in probes:
        values = {value.name: value for node in probe.graph for value in node.outputs}
        probe.graph.outputs.extend(values[name] for name in changes.rescaled)
    divisors = [np.ones(1)] * len(model.graph.outputs) + list(changes.rescaled.values())
    for sample in tiny.feeds(model, count=1):
        then, now = (tiny.run(probe, sample) for probe in probes)
        for old, new, divisor in zip(then, now, divisors, strict=True):
            assert tiny.relative_error(new * divisor, old) < tolerance


@pytest.mark.parametrize(
    "between", ["f = Flatten<axis=1>(u)", "f = Identity(u)", "f = Cast<to=1>(u)", "f = Reshape(u, k)"]
)
def test_a_layer_takes_factors_past_what_keeps_the_order_of_numbers(between: str) -> None:
    model = tiny.build(
        "g (float[B,8] x, float[8,16] U, float[16,4] W, int64[2] k) => (float[B,4] y) "
        f"{{ [up] u = MatMul(x, U) {between} r = Relu(f) [down] y = MatMul(r, W) }}",
        U="normal", W="normal", k=np.array([-1, 16]),
    )  # fmt: skip
    group = group_of(model, "down")
    assert group.factor is not None
    assert group.factor.linear.name == "up"
    assert group.factor.channels.tolist() == list(range(16))
    rescaled_at_random(model, [group])


def test_scales_that_differ_within_repeats_are_refused() -> None:
    model = attention(DECOMPOSED, 2)
    with pytest.raises(ValueError, match="differ"):
        folding.rescale(group_of(model, "o_proj"), np.arange(1.0, 17.0), Rewriter(model, "awq"), Changes())


def test_shared_is_the_mean_of_the_repeats() -> None:
    group = group_of(attention(DECOMPOSED, 2), "o_proj")
    squares = np.arange(16.0)
    expected = squares.reshape(2, 2, 4).mean(1, keepdims=True).repeat(2, 1).reshape(-1)
    np.testing.assert_allclose(folding.shared(group, squares), expected)


AVERAGE = "oh = MatMul(probs, vh)"
REFUSED = {
    "a present": (DIRECT.replace(AVERAGE, f"present = Identity(vh)  {AVERAGE}"), "cache"),
    "other readers": (f"{DIRECT}  z = Neg(vh)", "attention's values are read by Neg, too"),
    "a bias inside": (
        "o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, qkv)",
        "MultiHeadAttention adds the bias of its values itself",
    ),
    "values packed with keys": (
        "o = com.microsoft.MultiHeadAttention<num_heads=4>(packed)",
        "MultiHeadAttention reads its values packed with keys",
    ),
    "a nonlinear node": (
        DIRECT.replace(AVERAGE, "vs = Tanh(vh)  oh = MatMul(probs, vs)"),
        "Tanh stands between it and the layer that writes attention's values",
    ),
    "values twice": (
        DIRECT.replace(AVERAGE, "vv = Mul(vh, vh)  oh = MatMul(probs, vv)"),
        "Mul reads the same value twice",
    ),
    "values that are given": (
        DIRECT.replace(AVERAGE, "oh = MatMul(probs, past)"),
        "attention's values are given (past), not written by a layer",
    ),
    "a past": (
        DIRECT.replace(AVERAGE, "all = Concat<axis=2>(past, vh)  oh = MatMul(more, all)"),
        "attention's values are joined with a cache by Concat, whose contents would change meaning",
    ),
    "an operator with a past": (
        OPERATOR_4D.replace("vh)", "vh, , past, past)"),
        "Attention keeps its values in a cache, whose contents would change meaning",
    ),
    "an operator that is told how much of its cache is valid": (
        OPERATOR_4D.replace("vh)", "vh, , , , count)"),
        "Attention keeps its values in a cache, whose contents would change meaning",
    ),
    "sums over channels": (
        DIRECT.replace(AVERAGE, "vt = Transpose<perm=[0,1,3,2]>(vh)  oh = MatMul(square, vt)"),
        "do not show which channel goes where",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form: str) -> None:
    body, reason = REFUSED[form]
    text = ATTENTION.replace("BODY", body).replace("KV", "16").replace("HEADS", "4")
    extra = {"past": "float[B,4,S,4] past", "qkv": "float[48] qkv", "more": "float[B,4,S,T] more"}
    extra |= {"square": "float[B,4,S,4] square", "count": "int64[B] count"}
    extra["packed"] = "float[B,S,4,3,4] packed"
    given = ", ".join(extra[name] for name in extra if name in body)
    text = text.replace("float[B,S,8] x,", f"float[B,S,8] x, {given + ',' if given else ''}")
    if "present" in body:
        text = text.replace("(float[B,S,8] y)", "(float[B,S,8] y, float[B,4,S,4] present)")
    if "z =" in body:
        text = text.replace("(float[B,S,8] y)", "(float[B,S,8] y, float[B,4,S,4] z)")
    arrays = {"as_q": [0, 0, 4, 4], "as_kv": [0, 0, 4, 4], "two": [2], "times": [1] * 5, "flat": [0, 0, 16]}
    weights = dict.fromkeys(("Wq", "Wk", "Wv", "bv", "Wo", *(["qkv"] if "qkv" in body else [])), "normal")
    opset = 24 if "count" in body else 23
    model = tiny.build(text, opset=opset, **{name: np.array(a) for name, a in arrays.items()}, **weights)
    group = group_of(model, "o_proj")
    assert group.factor is None
    assert reason in group.refusal
    (found,) = [reason for other, reason in folding.rescalable(model, Awq(), insert_mul=False)
                if other.linears[0].name == "o_proj"]  # fmt: skip
    assert group.refusal in str(found)


def test_an_operator_with_a_mask_and_no_bias_passes_a_factor_on() -> None:
    body = "o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , real)"
    text = (
        ATTENTION.replace("BODY", body)
        .replace("KV", "16")
        .replace("float[B,S,8] x,", "float[B,S,8] x, int32[B,S] real,")
    )
    shapes = {"as_q": [0, 0, 4, 4], "as_kv": [0, 0, 4, 4], "two": [2], "times": [1] * 5, "merged": [0, 4, -1, 4],
              "flat": [0, 0, 16]}  # fmt: skip
    weights = dict.fromkeys(("Wq", "Wk", "Wv", "bv", "Wo"), "normal")
    model = tiny.build(text, opset=23, **{name: np.array(shape) for name, shape in shapes.items()}, **weights)
    group = group_of(model, "o_proj")
    assert group.factor is not None
    assert group.factor.linear.name == "v_mul"


def test_grouped_query_attention_keeps_a_cache() -> None:
    model = tiny.build(
        """g (float[B,S,32] qkv, float[B,2,P,8] pk, float[B,2,P,8] pv, int32[B] last, int32 total, float[16,8] Wo)
        => (float[B,S,8] y, float[B,2,P,8] present_k, float[B,2,P,8] present_v) {
        o, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=2>(
            qkv, , , pk, pv, last, total)
        [o_proj] y = MatMul(o, Wo) }""",
        Wo="normal",
    )  # fmt: skip
    assert (
        "GroupQueryAttention keeps its values in a cache, whose contents would change meaning"
        in group_of(model, "o_proj").refusal
    )


GATED = """g (float[B,S,8] x, float[8,12] G, float[8,6] U, float[6] b, float[6,8] D, int64[2] parts, int64[2] flat,
    float[6] h) => (y) { BODY }"""
ELEMENTWISE = {
    "product": ("a = MatMul(x, U) u = Add(a, b) s = Tanh(u2) p = Mul(s, u) y = MatMul(p, D)", "a"),
    "halves of one layer": (
        "[gu] m = MatMul(x, G) s0, u0 = Split<axis=-1, num_outputs=2>(m) s1 = Tanh(s0) p = Mul(s1, u0)"
        " y = MatMul(p, D)", "gu"),
    "relu": ("a = MatMul(x, U) u = Add(a, b) p = Relu(u) y = MatMul(p, D)", "a"),
    "quotient": ("a = MatMul(x, U) p = Div(a, h) y = MatMul(p, D)", "a"),
    "then flattened": ("a = MatMul(x, U) s = Mul(a, u2) p = Reshape(s, flat) y = Gemm(p, D)", "a"),
    "two layers": ("a = MatMul(x, U) y = MatMul(a, D)", "a"),
}  # fmt: skip


@pytest.mark.parametrize("form", ELEMENTWISE)
def test_elementwise_factors(form: str) -> None:
    body, writer = ELEMENTWISE[form]
    text = GATED.replace("BODY", body)
    if "u2" in body:
        text = text.replace("float[6] h)", "float[6] h, float[B,S,6] u2)")
    constants: dict[str, Any] = {name: "normal" for name in "GUbDh" if f"{name})" in body or f"{name} " in body}
    for name in ("parts", "flat"):
        constants[name] = np.array([-1, 6])
    model = tiny.build(text, **constants)
    group = next(group for group in linear_groups_of(model) if group.linears[0].node.outputs[0].name == "y")
    assert group.factor is not None
    assert not group.factor.through_attention
    assert group.factor.linear.name == writer
    offset = 6 if form == "halves of one layer" else 0
    assert group.factor.channels.tolist() == list(range(offset, offset + 6))
    rescaled_at_random(model, [group])


def test_a_bias_within_the_layer_is_divided_too() -> None:
    model = tiny.build(
        """g (float[B,8] x, float[B,6] g, float[8,6] U, float[6] b, float[6,4] D) => (float[B,4] y) {
        [up] u = Gemm(x, U, b) p = Mul(g, u) [down] y = Gemm(p, D) }""",
        U="normal", b="normal", D="normal",
    )  # fmt: skip
    group = group_of(model, "down")
    assert group.factor is not None
    assert group.factor.linear.name == "up"
    rescaled_at_random(model, [group])


@pytest.mark.parametrize("between", ["Clip(u, low, high)", "Tanh(u)", "Softplus(u)"])
def test_nothing_passes_what_is_no_straight_line_through_zero(between: str) -> None:
    """f(a u) is not a f(u): a range of its own, or a curve."""
    model = tiny.build(
        f"""g (float[B,8] x, float[8,6] U, float[6,4] D, float low, float high) => (float[B,4] y) {{
        u = MatMul(x, U) c = {between} y = MatMul(c, D) }}""",
        U="normal", D="normal", low=np.float32(-1), high=np.float32(1),
    )  # fmt: skip
    assert group_of(model, "y").factor is None


def test_channels_that_somebody_else_reads_as_well_take_no_factor() -> None:
    """Each channel is there twice, and the other half has other readers: it would be divided as well."""
    model = tiny.build(
        """g (float[2,5,8] x, float[8,6] U, float[6,8] D, int64[1] two, int64[4] times, int64[3] flat)
        => (float[2,5,8] y, float[2,5,6] z) {
        a = MatMul(x, U) b = Unsqueeze(a, two) c = Expand(b, times) d = Reshape(c, flat)
        first, second = Split<axis=2, num_outputs=2>(d) p = Relu(first) y = MatMul(p, D)  z = Neg(second) }""",
        U="normal", D="normal", two=np.array([2]), times=np.array([1, 1, 2, 1]), flat=np.array([0, 0, 12]),
    )  # fmt: skip
    assert group_of(model, "y").factor is None


def test_halves_of_a_sequence_share_their_channels() -> None:
    """What is split along another axis holds the same channels, and its other half would be divided as well."""
    model = tiny.build(
        """g (float[2,4,8] x, float[8,6] U, float[6,8] D) => (y, z) {
        a = MatMul(x, U) first, second = Split<axis=1, num_outputs=2>(a) p = Relu(first) y = MatMul(p, D)
        z = Neg(second) }""",
        U="normal", D="normal",
    )  # fmt: skip
    assert group_of(model, "y").factor is None


def test_an_excluded_writer_is_not_touched_where_a_mul_is_allowed() -> None:
    model = tiny.build(
        "g (float[B,S,8] x, float[8,6] U, float[6,8] D) => (y) { a = MatMul(x, U) p = Relu(a) y = MatMul(p, D) }",
        U="normal", D="normal",
    )  # fmt: skip
    step = Awq(ignore=("a",))
    ((_, refused),) = folding.rescalable(model, step, insert_mul=False)
    assert "a would take the scales and is excluded" in str(refused)
    ((group, obstacle),) = folding.rescalable(model, step, insert_mul=True)
    assert obstacle is None
    assert not folding.folds(group)
    before = tiny.data(model, "U")
    changes = Changes()
    folding.rescale(group, np.arange(1.0, 7.0), Rewriter(model, step.name), changes)
    assert tiny.operators(model) == ["MatMul", "Relu", "Mul", "MatMul"]
    assert not changes.rescaled
    np.testing.assert_array_equal(tiny.data(model, "U"), before)


PAIR = """g (float[B,S,8] x, float[B,S,6] u, float[8,6] U, float[6,8] D) => (float[B,S,8] y) {
    [up] a = MatMul(x, U)  p = BODY  [down] y = MatMul(p, D) }"""


def pair(body: str = "Mul(a, u)", dtype: str = "float", arrays: Any = None) -> tuple[ir.Model, NormGroup]:
    """Layer `up` takes factors on behalf of p, which `down` reads."""
    weights: dict[str, Any] = {"U": "normal", "D": "normal"} | (arrays or {})
    model = tiny.build(PAIR.replace("BODY", body).replace("float[", f"{dtype}["), **weights)
    return model, group_of(model, "down")


@pytest.mark.parametrize(("body", "taken"), [("Mul(a, u)", True), ("Relu(a)", False), ("Sum(a, u)", False)])
def test_a_side_of_a_product_takes_factors_where_only_products_do(body: str, taken: bool) -> None:
    model, _ = pair(body)
    for products_only, expected in ((True, taken), (False, body != "Sum(a, u)")):
        pairs = folding.rescalable(model, Awq(), insert_mul=False, products_only=products_only)
        ((group, reason),) = [item for item in pairs if item[0].linears[0].name == "down"]
        assert folding.folds(group) == expected == (reason is None)


def test_a_product_behind_attention_is_none_of_a_gated_layer() -> None:
    model = tiny.build(
        """g (float[B,S,8] x, float[B,S,S] probs, float[B,S,6] u, float[8,6] V, float[6,8] O) => (float[B,S,8] y) {
        [v] a = MatMul(x, V)  h = MatMul(probs, a)  p = Mul(h, u)  [o] y = MatMul(p, O) }""",
        V="normal", O="normal",
    )  # fmt: skip
    for products_only in (True, False):
        pairs = folding.rescalable(model, Awq(), insert_mul=False, products_only=products_only)
        assert folding.folds(pairs[-1][0]) == (not products_only)


def test_the_report_says_where_the_division_went() -> None:
    _, group = pair()
    assert folding.place(group) == "folded into up"
    assert folding.place(replace(group, factor=None)) == "divided by a Mul"
    norm = """g (float[B,S,8] x, float[8] g, float[8,6] W) => (float[B,S,6] y) {
        [norm] n = RMSNormalization(x, g)  [fc] y = MatMul(n, W) }"""
    assert folding.place(group_of(tiny.build(norm, opset=23, g="gain", W="normal"), "fc")) == "folded into norm"


def test_what_is_quantized_already_takes_no_factor() -> None:
    text = """g (float[B,S,8] x, float[B,S,6] u, int8[8,6] Q, float s, float[6,8] D, int8[6,8] R) => (y, z) {
        W = DequantizeLinear(Q, s)  [up] a = MatMul(x, W)  p = Mul(a, u)  [down] y = MatMul(p, D)
        V = DequantizeLinear(R, s)  [other] z = MatMul(u, V) }"""
    codes = {"Q": np.ones((8, 6), np.int8), "R": np.ones((6, 8), np.int8)}
    model = tiny.build(text, D="normal", s=np.float32(0.1), **codes)
    found = folding.rescalable(model, Awq(), insert_mul=False)
    why = {group.linears[0].name: str(reason) for group, reason in found}
    assert why["down"] == "the weight of up, which would take the scales, is shared or quantized already"
    assert (
        why["up"]
        == why["other"]
        == "its weight is quantized already: awq comes before the passes that quantize weights"
    )


def test_channels_at_the_bound_of_silence_are_silent() -> None:
    """1e-6 of the loudest says nothing; it counts as the quietest of those that do."""
    np.testing.assert_array_equal(folding.without_silence(np.array([2.0, 1.0, 2e-6, 0.0])), [2, 1, 1, 1])
    np.testing.assert_array_equal(folding.without_silence(np.zeros(3)), np.ones(3))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("name", "place", "factor", "fit"),
    [
        ("D", (0, 3), 2.0, False), ("D", (5, 0), 2.0, False), ("D", (0, 3), 1.5, True),  # what reads is multiplied
        ("U", (3, 0), 0.5, False), ("U", (0, 5), 0.5, False), ("U", (3, 0), 0.7, True),  # what writes is divided
        ("U", (3, 0), 2.0, True), ("D", (0, 3), 0.5, True),
    ],
)  # fmt: skip
def test_a_weight_of_16_bits_has_room_or_not(
    dtype: Any, name: str, place: tuple[int, int], factor: float, fit: bool
) -> None:
    """One number near the end of the type, and the scale that takes it beyond or not."""
    arrays = {"U": np.ones((8, 6), dtype), "D": np.ones((6, 8), dtype)}
    arrays[name][place] = 0.6 * float(ml_dtypes.finfo(dtype).max)
    _, group = pair(dtype="float16" if dtype is np.float16 else "bfloat16", arrays=arrays)
    assert folding.fits(group, np.full(6, factor)) == fit


def test_weights_of_zeros_fit_and_those_of_32_bits_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = {"U": np.zeros((8, 6), np.float16), "D": np.zeros((6, 8), np.float16)}
    assert folding.fits(pair(dtype="float16", arrays=zeros)[1], np.full(6, 2.0))
    _, group = pair()
    monkeypatch.setattr(folding, "read", None)
    assert folding.fits(group, np.full(6, 1e30))


# ---------------------------------------------------------------------------------------------------- real exports


def export(variant: str) -> ir.Model:
    from models.export import model_path

    model = ir.load(Path(model_path(variant)))
    ir.external_data.load_to_model(model)
    canonicalize(model)
    return model


@pytest.mark.parametrize("variant", ["dynamo", "opset23", "fp16", "dynamo-past"])
def test_exports(variant: str) -> None:
    model = export(variant)
    groups = [group for group in linear_groups_of(model) if group.gains or group.factor]
    groups = [group for group in groups if len(group.linears[0].weight.uses()) == 1]  # not the tied lm_head
    through = [group for group in groups if group.factor is not None and group.factor.through_attention]
    assert len(groups) == (12 if variant == "dynamo-past" else 16)
    assert len(through) == (0 if variant == "dynamo-past" else 4)
    for group in through:
        assert group.factor is not None
        assert group.factor.channels.tolist() == [h // 4 * 32 + d for h in range(8) for d in range(32)]
    before, changes, rw = model.clone(), Changes(), Rewriter(model, "awq")
    rng = np.random.default_rng(0)
    for group in groups:
        spread = 0.2 if variant == "fp16" else 1.0
        squares = folding.shared(group, np.exp(spread * rng.normal(size=group.linears[0].in_features)))
        folding.rescale(group, np.sqrt(squares), rw, changes)
    feed = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 3 for size in dims(value)]
        if value.name == "attention_mask" and variant == "dynamo-past":
            shape = [3, 6]
        ids = rng.integers(1, 3000, shape) if value.name == "input_ids" else np.ones(shape)
        feed[there(value.name)] = ids.astype(numpy_type(value))
    for now, then in zip(tiny.run(model, feed), tiny.run(before, feed), strict=True):
        assert tiny.relative_error(now, then) < (5e-3 if variant == "fp16" else 1e-5)


@pytest.mark.parametrize("variant", ["dynamo-past", "optimum", pytest.param("genai", marks=pytest.mark.exporters)])
def test_caches_of_exports(variant: str) -> None:
    groups = linear_groups_of(export(variant))
    refused = [group for group in groups if group.refusal]
    assert {linear.module_path.rsplit(".", 1)[-1] for group in refused for linear in group.linears} == {"o_proj"}
    assert len(refused) == 4
    assert all("cache" in group.refusal and "meaning" in group.refusal for group in refused)


def test_without_attention_v_proj_is_left_alone() -> None:
    pairs = folding.rescalable(attention(DIRECT, 4), Awq(), insert_mul=False, products_only=True)
    ((group, reason),) = [pair for pair in pairs if pair[0].linears[0].name == "o_proj"]
    assert group.factor is None
    assert "no norm" in str(reason)
