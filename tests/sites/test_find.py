"""Recognisers: every idiom by hand, and the graphs that real exporters write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.nf4 import Nf4
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import RecipeError
from qcompiler.graph.edit import constant
from qcompiler.graph.files import load
from qcompiler.graph.metadata import PART_OF
from qcompiler.rewriting.contract import Pass
from qcompiler.sites.activations import Dynamic, Float, Static
from qcompiler.sites.analyses import linear_groups_of, norm_groups_of
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import (
    Convolution,
    Embedding,
    Linear,
    Sites,
    Unsupported,
    check_patterns,
    find_sites,
    matches,
    weight_decoder,
)
from tests import tiny
from tests.there import operand

OPSETS = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def build(graph: str, /, **constants: Any) -> ir.Model:
    """A model from the text of a graph whose inputs named in `constants` (shape, or array) become initializers."""
    model = ir.from_onnx_text(f"{OPSETS} {graph}")
    for value in list(model.graph.inputs):
        if value.name in constants:
            data = constants[value.name]
            array = np.ones(data, np.float32) if isinstance(data, tuple) else np.asarray(data)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    return model


def only_linear(model: ir.Model) -> Linear:
    (site,) = find_sites(model)
    assert isinstance(site, Linear)
    return site


def reason(model: ir.Model) -> str:
    (site,) = find_sites(model)
    assert isinstance(site, Unsupported)
    return site.reason


# ---------------------------------------------------------------------------------------------------- linear layers


def test_matmul() -> None:
    site = only_linear(
        build("g (float[B,S,4] x, float[4,3] W) => (float[B,S,3] y) { y = MatMul(x, W) }", W=(4, 3)),
    )
    assert (site.in_features, site.out_features, site.transposed, site.channel_axis) == (4, 3, False, 1)
    assert site.input.name == "x"
    assert site.weight.name == "W"
    assert site.output.name == "y"
    assert site.bias is None
    assert site.dequantize is None


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)])
@pytest.mark.parametrize("sides", ["p, b", "b, p"])
def test_bias_of_an_add(shape: tuple[int, ...], sides: str) -> None:
    dims = ",".join(map(str, shape))
    site = only_linear(
        build(
            f"g (float[B,S,4] x, float[4,3] W, float[{dims}] b) => (float[B,S,3] y) "
            f"<float[B,S,3] p> {{ p = MatMul(x, W) y = Add({sides}) }}",
            W=(4, 3),
            b=shape,
        )
    )
    assert site.bias is not None
    assert site.bias.name == "b"
    assert site.bias_node is not None
    assert site.output.name == "y"


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, W) q = Relu(p) y = Add(p, b)",  # somebody else reads the product
        "p = MatMul(x, W) y = Add(p, b) q = Relu(p)",
        "p = MatMul(x, W) y = Add(p, r)",  # a residual stream
        "p = MatMul(x, W) y = Mul(p, b)",
        "p = MatMul(x, W) y = Add(p, s)",  # a scalar is no bias
        "p = MatMul(x, W) y = Add(p, t)",
        "p = MatMul(x, W) y = Add(p, column)",  # as many numbers, one for each row
        "p = MatMul(x, W) y = Add(p, rows)",  # a bias for each row
        "p = MatMul(x, W) y = custom.Add(p, b)",
    ],
)
def test_an_add_that_is_no_bias(body: str) -> None:
    text = (
        "g (float[B,4] x, float[4,3] W, float[3] b, float[1] s, float t, float[3,1] column, float[2,3] rows, "
        "float[B,3] r) => (float[B,3] y, float[B,3] q) <float[B,3] p> {"
    )
    shapes: dict[str, Any] = {"W": (4, 3), "b": (3,), "s": (1,), "t": (), "column": (3, 1), "rows": (2, 3)}
    model = build(text + body + ("" if "q =" in body else " q = Relu(y)") + "}", **shapes)
    site = only_linear(model)
    assert site.bias is None
    assert site.bias_node is None
    assert site.output.name == "p"


def test_what_gives_the_product_another_rank_is_no_bias() -> None:
    text = "g (float[B,4] x, float[4,3] W, float[1,1,3] b) => (float[1,B,3] y) <float[B,3] p> {"
    site = only_linear(build(text + " p = MatMul(x, W) y = Add(p, b) }", W=(4, 3), b=(1, 1, 3)))
    assert site.bias is None
    assert site.bias_node is None
    assert site.output.name == "p"


@pytest.mark.parametrize(("shape", "found"), [((3,), True), ((1, 3), False)])
def test_what_is_added_to_a_product_of_unknown_rank_is_a_bias_where_it_cannot_widen_it(
    shape: tuple[int, ...], found: bool
) -> None:
    dims = ",".join(map(str, shape))
    text = f"g (x, float[4,3] W, float[{dims}] b) => (y) {{ p = MatMul(x, W) y = Add(p, b) }}"
    assert (only_linear(build(text, W=(4, 3), b=shape)).bias is not None) == found


def test_an_add_inside_a_body_is_no_bias_of_a_product_outside() -> None:
    text = """g (float[B,4] x, bool c, float[4,3] W, float[3] b) => (float[B,3] y) <float[B,3] p> {
        p = MatMul(x, W)
        y = If(c) <then_branch = t () => (float[B,3] u) { u = Add(p, b) },
                   else_branch = e () => (float[B,3] v) { v = Neg(x) }> }"""
    site = only_linear(build(text, W=(4, 3), b=(3,)))
    assert (site.bias, site.bias_node, site.output.name) == (None, None, "p")


def test_a_product_that_is_an_output_has_no_bias() -> None:
    text = (
        "g (float[B,4] x, float[4,3] W, float[3] b) => (float[B,3] p, float[B,3] y) { p = MatMul(x, W) y = Add(p, b) }"
    )
    assert only_linear(build(text, W=(4, 3), b=(3,))).bias is None


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int) -> None:
    shape = (3, 4) if transposed else (4, 3)
    dims = ",".join(map(str, shape))
    site = only_linear(
        build(
            f"g (float[B,4] x, float[{dims}] W, float[3] b) => (y) {{ y = Gemm<transB={transposed}>(x, W, b) }}",
            W=shape,
            b=(3,),
        )
    )
    assert (site.in_features, site.out_features, site.transposed) == (4, 3, bool(transposed))
    assert site.channel_axis == 1 - transposed
    assert site.bias is not None
    assert site.bias_node is None


def test_a_gemm_without_a_bias_has_none() -> None:
    # What is added behind it is left alone: a Gemm has a bias of its own, or none.
    text = (
        "g (float[B,4] x, float[4,3] W, float[3] b) => (float[B,3] y) <float[B,3] p> { p = Gemm(x, W) y = Add(p, b) }"
    )
    site = only_linear(build(text, W=(4, 3), b=(3,)))
    assert (site.bias, site.bias_node, site.output.name) == (None, None, "p")


def test_attributes_may_say_what_goes_without_saying() -> None:
    call = "Gemm<alpha=1.0, beta=1.0, transA=0>(x, W)"
    assert only_linear(build(f"g (float[B,4] x, float[4,3] W) => (y) {{ y = {call} }}", W=(4, 3))).in_features == 4


def test_sites_of_nodes_without_names_have_none() -> None:
    text = """g (int64[B] ids, float[9,4] E, float[4,4] W, float[B,2,8,8] i, float[6,2,3,3] K) => (y, z, u) {
        e = Gather(E, ids) y = MatMul(e, W) z = Conv(i, K) u = MatMul(W, e) }"""
    model = build(text, E=(9, 4), W=(4, 4), K=(6, 2, 3, 3))
    for node in model.graph:
        node.name = None
    assert [(type(site), site.name) for site in find_sites(model)] == [
        (Embedding, ""), (Linear, ""), (Convolution, ""), (Unsupported, "")
    ]  # fmt: skip


def test_few_features_are_features() -> None:
    site = only_linear(build("g (float[B,2] x, float[2,2] W) => (y) { y = MatMul(x, W) }", W=(2, 2)))
    assert (site.in_features, site.out_features) == (2, 2)
    left = "g (float[2,B] x, float[2,2] W) => (y) { y = MatMul(W, x) }"
    assert "left operand" in reason(build(left, W=(2, 2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("Gemm<alpha=0.5>(x, W)", "its attribute alpha is 0.5, not 1.0"),
        ("Gemm<beta=2.0>(x, W, b)", "its attribute beta is 2.0, not 1.0"),
        ("Gemm<transA=1>(x, W)", "its attribute transA is 1, not 0"),
        ("Gemm(x, W, c)", "what it adds is computed, not a constant"),
        ("Gemm(x, W, s)", "what it adds has shape [1], not [3]"),
        ("com.microsoft.FusedMatMul<alpha=0.125>(x, W)", "alpha"),
        ("com.microsoft.FusedMatMul<transA=1>(x, W)", "transA"),
        ("com.microsoft.FusedMatMul<transBatchA=1>(x, W)", "its attribute transBatchA is 1, not 0"),
        ("com.microsoft.FusedMatMul<transBatchB=1>(x, W)", "its attribute transBatchB is 1, not 0"),
        ("MatMul(W, x)", "left operand"),
        ("MatMul(casted, x)", "left operand"),
        ("Conv(x, casted)", "its weight is computed from constants by Cast; fold the constants first"),
        ("MatMul(x, T)", "rank 3"),
        ("MatMul(x, O)", "outer product"),
        ("MatMul(x, casted)", "its weight is computed from constants by Cast; fold the constants first"),
        ('Einsum<equation="ij,jk->ik">(x, W)', "no pass handles the weights of Einsum"),
        ('Einsum<equation="ij,jk->ik">(x, casted)', "no pass handles the weights of Einsum"),
    ],
)
def test_forms_that_no_pass_handles(call: str, words: str) -> None:
    text = (
        "g (float[B,4] x, float[4,3] W, float[3] b, float[1] s, float[B,3] c, float[2,4,3] T, float[1,3] O, "
        "float16[4,3] H) => (y) <float[4,3] casted> { casted = Cast<to=1>(H) y = " + call + " }"
    )
    half = np.ones((4, 3), np.float16)
    model = build(text, W=(4, 3), b=(3,), s=(1,), T=(2, 4, 3), O=(1, 3), H=half)
    assert words in reason(model)


def test_weights_that_an_operator_is_not_given_are_none() -> None:
    text = """g (float[B,4] x, float[B,2] router, float[2,4,4] U, float[2,4,4] D, float[2,4] b) => (y, z) {
        y = com.microsoft.MoE(x, router, U, b, D, b) z = com.microsoft.MoE(x, router, x, b, , b) }"""
    model = build(text, U=(2, 4, 4), D=(2, 4, 4), b=(2, 4))
    assert [(site.name, reason) for site in find_sites(model).unsupported for reason in [site.reason]] == [
        ("y", "no pass handles the weights of MoE")
    ]


def test_operators_of_other_domains_are_no_layers() -> None:
    text = """g (float[B,4] x, int64[B] ids, float[4,3] W, float[6,2,3,3] K) => (a, b, c) {
        a = custom.MatMul(x, W) b = custom.Gather(W, ids) c = custom.Conv(x, K) }"""
    assert list(find_sites(build(text, W=(4, 3), K=(6, 2, 3, 3)))) == []


def test_recurrent_and_transposed_convolutions_are_named() -> None:
    text = """g (float[S,B,4] x, float[1,12,4] W, float[1,12,3] R, float[B,4,8,8] i, float[4,2,3,3] K) => (y, z) {
        y = LSTM<hidden_size=3>(x, W, R) z = ConvTranspose(i, K) }"""
    sites = find_sites(build(text, W=(1, 12, 4), R=(1, 12, 3), K=(4, 2, 3, 3)))
    assert [site.node.op_type for site in sites.unsupported] == ["LSTM", "ConvTranspose"]
    assert len(sites) == 2


def test_what_is_no_site_at_all() -> None:
    model = build(
        """g (float[B,H,S,4] q, float[B,H,4,S] k, float[1,8,1] F, float[1,1,S] p, uint8[B,4] a, uint8[4,B] c,
              float[4] v, float[4,3] W, float[3,4] V, float[1,6,1] T) => (s, r, t, u, w, n, o, e)
              <float[4,3] noise> {
              s = MatMul(q, k) r = MatMul(F, p) t = MatMulInteger(a, c) u = MatMul(q, v)
              w = MatMul(W, V) n = MatMul(q, noise) o = MatMul(q, T)
              noise = RandomNormal<shape=[4,3]>() e = Einsum<equation="bhsi,i->bhs">(q, v) }""",
        F=(1, 8, 1), v=(4,), W=(4, 3), V=(3, 4), T=(1, 6, 1),
    )  # fmt: skip
    assert list(find_sites(model)) == []


def test_what_is_not_known_to_be_of_constants_or_of_floats_is_no_weight() -> None:
    """A body may read anything, and a value without a type may hold anything."""
    text = """g (float[B,4] x, float[4,3] W, bool c) => (a, b) <float[4,3] chosen> {
        chosen = If(c) <then_branch = t () => (float[4,3] u) { u = Neg(x) },
                        else_branch = e () => (float[4,3] v) { v = Abs(x) }>
        untyped = custom.Foo(W)
        a = MatMul(x, chosen)  b = MatMul(x, untyped) }"""
    assert list(find_sites(build(text, W=(4, 3), c=np.bool_(True)))) == []


def test_what_a_function_has_decoded_is_quantized_not_computed_from_constants() -> None:
    text = """g (float16[B,4] x, uint8[4,3] Q, float[1] s) => (y) <float[4,3] D, float16[4,3] H> {
        D = qcompiler.DequantizeNF4(Q, s) H = Cast<to=10>(D) y = MatMul(x, H) }"""
    assert list(find_sites(build(text, Q=np.ones((4, 3), np.uint8), s=(1,)))) == []


def test_a_part_of_another_layer_is_no_layer() -> None:
    model = build("g (float[B,4] x, float[4,3] W) => (y) { y = MatMul(x, W) }", W=(4, 3))
    model.graph[0].metadata_props[PART_OF] = "fc"
    assert list(find_sites(model)) == []


def test_what_is_quantized_already_is_reported() -> None:
    text = "g (uint8[B,4] a, uint8[4,3] Q) => (y) { y = MatMulInteger(a, Q) }"
    assert reason(build(text, Q=np.ones((4, 3), np.uint8))) == "it is quantized already (MatMulInteger)"


def test_fused_matmul_and_a_transposed_weight() -> None:
    fused = only_linear(
        build("g (float[B,4] x, float[3,4] W) => (y) { y = com.microsoft.FusedMatMul<transB=1>(x, W) }", W=(3, 4))
    )
    assert (fused.transposed, fused.in_features, fused.out_features) == (True, 4, 3)
    tied = only_linear(
        build("g (float[B,4] x, float[3,4] W) => (y) { T = Transpose<perm=[1,0]>(W) y = MatMul(x, T) }", W=(3, 4))
    )
    assert (tied.transposed, tied.in_features, tied.out_features, tied.weight.name) == (True, 4, 3, "W")
    assert tied.transpose is not None
    assert tied.transpose.op_type == "Transpose"


@pytest.mark.parametrize(("transpose", "found"), [("", True), ("<perm=[1,0]>", True), ("<perm=[0,1]>", False)])
def test_a_transpose_before_a_layer_swaps_the_axes_of_a_matrix(transpose: str, found: bool) -> None:
    """Together with that of a Gemm it gives the matrix back; what else moves numbers is no part of a layer."""
    body = f"T = Transpose{transpose}(W) y = Gemm<transB=1>(x, T)"
    sites = find_sites(build(f"g (float[B,3] x, float[3,4] W) => (y) <float[4,3] T> {{ {body} }}", W=(3, 4)))
    assert [type(site) for site in sites] == [Linear if found else Unsupported]
    if found:
        assert (sites.linears[0].transposed, sites.linears[0].in_features) == (False, 3)


def test_a_transpose_of_more_than_two_axes_is_not_looked_through() -> None:
    text = "g (float[B,4] x, float[2,4,3] W) => (y) <float[3,4,2] T> { T = Transpose(W) y = MatMul(x, T) }"
    assert "computed from constants by Transpose" in reason(build(text, W=(2, 4, 3)))


@pytest.mark.parametrize("step", [Nf4(block_size=16), QuantizeWeights(format="binary")], ids=["nf4", "binary"])
def test_codes_that_a_function_decodes_are_still_the_same_site(step: Pass) -> None:
    """Also its name, though codes of functions lie as [outputs, inputs] behind a Transpose."""
    text = "g (float[M,32] x, float[32,16] W) => (float[M,16] y) { [MatMul_7] y = MatMul(x, W) }"
    model = tiny.build(text, W="normal")
    model.graph.initializers["W"].name = "fc.weight"
    before = only_linear(model)
    assert weight_decoder(before.node) is None
    tiny.compile(model, [step], [])
    site = only_linear(model)
    assert (site.module_path, site.in_features, site.out_features) == (before.module_path, 32, 16) == ("fc", 32, 16)
    assert site.dequantize is not None
    assert site.dequantize.domain == "qcompiler"
    assert weight_decoder(site.node) is site.dequantize


def test_a_transposed_weight_is_named_by_whose_it_is() -> None:
    """A table that a head shares keeps the name of the embedding; the head is called as its node is."""
    text = "g (float[B,4] x, float[3,4] W) => (y) { T = Transpose<perm=[1,0]>(W) [MatMul_7] y = MatMul(x, T) }"
    model = build(text, W=(3, 4))
    model.graph.initializers["W"].name = "embed_tokens.weight"
    assert only_linear(model).module_path == "MatMul_7"
    codes = """g (float[B,4] x, int8[3,4] W, float[3] s) => (y) {
        D = DequantizeLinear<axis=0>(W, s) T = Transpose<perm=[1,0]>(D) [MatMul_7] y = MatMul(x, T) }"""
    model = build(codes, W=np.ones((3, 4), np.int8), s=(3,))
    model.graph.initializers["W"].name = "embed_tokens.weight"
    assert only_linear(model).module_path == "MatMul_7"


def test_what_reads_one_value_has_no_decoder() -> None:
    model = build("g (float[B,4] x) => (y) { y = Relu(x) }")
    assert weight_decoder(model.graph[0]) is None


@pytest.mark.parametrize("transpose", [False, True])
def test_a_quantized_weight_is_still_the_same_site(transpose: bool) -> None:
    shape, tail = (
        ((3, 4), "T = Transpose<perm=[1,0]>(D) y = MatMul(x, T)") if transpose else ((4, 3), "y = MatMul(x, D)")
    )
    dims = ",".join(map(str, shape))
    model = build(
        f"g (float[B,4] x, int8[{dims}] W, float[3] s) => (y) "
        f"<float[{dims}] D> {{ D = DequantizeLinear<axis={0 if transpose else 1}>(W, s) {tail} }}",
        W=np.ones(shape, np.int8),
        s=(3,),
    )
    site = only_linear(model)
    assert site.dequantize is not None
    assert site.weight.dtype == ir.DataType.INT8
    assert (site.in_features, site.out_features, site.transposed) == (4, 3, transpose)


def test_a_weight_quantized_as_it_runs_is_named() -> None:
    text = """g (float[B,4] x, float[4,3] W, float s, int8 z) => (y)
        <int8[4,3] Q, float[4,3] D> { Q = QuantizeLinear(W, s, z) D = DequantizeLinear(Q, s, z) y = MatMul(x, D) }"""
    assert "DequantizeLinear" in reason(build(text, W=(4, 3), s=np.float32(1), z=np.int8(0)))


def test_sites_inside_a_body_are_named() -> None:
    text = """g (float[B,4] x, bool c, float[4,3] W) => (float[B,3] y) {
        y = If(c) <then_branch = t () => (float[B,3] a) { a = MatMul(x, W) },
                   else_branch = e () => (float[B,3] b) { p = MatMul(x, W) b = Neg(p) }> }"""
    sites = find_sites(build(text, W=(4, 3)))
    assert len(sites.unsupported) == 2
    assert {site.reason for site in sites.unsupported} == {"it is inside the body of an If, Loop or Scan"}


# ---------------------------------------------------------------------------------------------------- the others


def test_convolution() -> None:
    text = "g (float[B,2,8,8] x, float[6,2,3,3] W, float[6] b) => (y) { y = Conv(x, W, b) }"
    (site,) = find_sites(build(text, W=(6, 2, 3, 3), b=(6,)))
    assert isinstance(site, Convolution)
    assert site.bias is not None
    assert site.channel_axis == 0
    assert reason(build(text, W=(6, 2, 3, 3))) == "its bias is computed, not a constant"
    quantized = """g (float[B,2,8,8] x, int8[6,2,3,3] W, float[6] s) => (y)
        { D = DequantizeLinear<axis=0>(W, s) y = Conv(x, D) }"""
    (site,) = find_sites(build(quantized, W=np.ones((6, 2, 3, 3), np.int8), s=(6,)))
    assert isinstance(site, Convolution)
    assert site.dequantize is not None


def test_a_convolution_of_a_constant_is_no_layer() -> None:
    text = "g (float[1,2,8,8] c, float[6,2,3,3] W, float[B,2,8,8] x) => (y, z) { y = Conv(c, W) z = Conv(x, W) }"
    assert [site.name for site in find_sites(build(text, c=(1, 2, 8, 8), W=(6, 2, 3, 3)))] == ["z"]


def test_embedding_and_tied_forms() -> None:
    text = """g (int64[B,S] ids, float[4,9] W, float[B,S,4] h) => (e, y)
        <float[9,4] T> { T = Transpose<perm=[1,0]>(W) e = Gather(T, ids) y = MatMul(h, W) }"""
    sites = find_sites(build(text, W=(4, 9)))
    (embedding,), (linear,) = sites.embeddings, sites.linears
    assert (embedding.transposed, embedding.channel_axis) == (True, 1)
    assert embedding.table is linear.weight
    assert not linear.transposed


def test_gathers_that_are_no_embeddings() -> None:
    text = """g (int64[B,S] ids, float[9,4] E, float[9] V, int64[9,2] I, float[9,4] R, float[9,4] Z, int64[2] C,
               int8[9,4] Q, float[9] s, float[B,1,S,4] q, float[B,4] x, float16[9,4] H)
               => (a, b, c, d, f, k, l) <float[9,4] D, float[9,4] casted> {
        k = Gather(x, ids) casted = Cast<to=1>(H) l = Gather(casted, ids)
        a = Gather(V, ids) b = Gather(I, ids) c = Gather(E, C)
        cos = Gather(R, ids) wide = Unsqueeze(cos, C) d = Mul(q, wide)
        D = DequantizeLinear<axis=0>(Q, s) f = Gather(D, ids) }"""
    model = build(
        text, E=(9, 4), V=(9,), I=np.ones((9, 2), np.int64), R=(9, 4), Z=(9, 4), C=np.array([0, 1]),
        Q=np.ones((9, 4), np.int8), s=(9,), H=np.ones((9, 4), np.float16),
    )  # fmt: skip
    assert list(find_sites(model)) == []


def test_an_embedding_that_is_the_output_is_one() -> None:
    """Nobody rotates anything by it."""
    (site,) = find_sites(build("g (int64[B] ids, float[9,4] E) => (y) { y = Gather<axis=-2>(E, ids) }", E=(9, 4)))
    assert isinstance(site, Embedding)


def test_tables_of_angles_are_known_behind_what_moves_them() -> None:
    text = """g (int64[B,S] ids, int64[1] two, float[9,4] R, float[B,1,S,8] q) => (y) {
        cos = Gather(R, ids) twice = Concat<axis=-1>(cos, cos) wide = Unsqueeze(twice, two) y = Mul(q, wide) }"""
    assert list(find_sites(build(text, R=(9, 4), two=np.array([1])))) == []


def test_tables_of_a_rotary_embedding_are_none_but_its_input_is() -> None:
    text = """g (int64[B,S] ids, float[9,4] E, float[9,4] R) => (y) {
        e = Gather(E, ids) cos = Gather(R, ids) y = RotaryEmbedding(e, cos, cos) }"""
    assert [site.name for site in find_sites(build(text, E=(9, 4), R=(9, 4)))] == ["e"]


def test_scaled_and_position_embeddings_are_embeddings() -> None:
    text = """g (int64[B,S] ids, int64[B,S] places, float[9,4] E, float[7,4] P, float s) => (y) {
        e = Gather(E, ids) f = Mul(e, s) p = Gather(P, places) y = Add(f, p) }"""
    sites = find_sites(build(text, E=(9, 4), P=(7, 4), s=np.float32(2)))
    assert [site.table.name for site in sites.embeddings] == ["E", "P"]


def test_odd_gathers_are_named() -> None:
    text = "g (int64[B] ids, float[5,9,4] T, float[9,4] E) => (y, z) { y = Gather(T, ids) z = Gather<axis=1>(E, ids) }"
    reasons = [site.reason for site in find_sites(build(text, T=(5, 9, 4), E=(9, 4))).unsupported]
    assert reasons == ["its table has rank 3, not 2", "it gathers along axis 1, not rows"]


def test_graph_order() -> None:
    text = """g (int64[B,S] ids, float[9,4] E, float[4,4] W, float[4,4] V) => (y) {
        e = Gather(E, ids) h = MatMul(e, W) y = MatMul(h, V) }"""
    sites = find_sites(build(text, E=(9, 4), W=(4, 4), V=(4, 4)))
    assert [type(site) for site in sites] == [Embedding, Linear, Linear]
    assert [site.name for site in sites] == ["e", "h", "y"]
    assert sites.all == tuple(sites)


# ---------------------------------------------------------------------------------------------------- names


TORCH, ONNXSCRIPT = "pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes"


@pytest.mark.parametrize(
    ("name", "metadata", "weight", "path", "block"),
    [
        ("node_linear_3", {TORCH: "['', 'h', 'h.3.mlp', 'linear']"}, "val_1", "h.3.mlp", "h.3"),
        ("n", {ONNXSCRIPT: "['model', '', 'layers.0', 'up']"}, "w", "model.layers.0.up", "model.layers.0"),
        ("/model/layers.0/q_proj/MatMul", {}, "onnx::MatMul_7", "model.layers.0.q_proj", "model.layers.0"),
        ("/encoder/layer.2/output/MatMul_1", {}, "w", "encoder.layer.2.output", "encoder.layer.2"),
        ("MatMul_7", {}, "features.0.fc.weight", "features.0.fc", "features.0"),
        ("fc", {}, "val_7", "fc", ""),
        ("n", {TORCH: "broken"}, "val_7", "n", ""),
        ("/MatMul", {}, "fc1.weight", "fc1", ""),
    ],
)
def test_module_paths(name: str, metadata: dict[str, str], weight: str, path: str, block: str) -> None:
    model = build("g (float[B,4] x, float[4,3] W) => (y) { y = MatMul(x, W) }", W=(4, 3))
    node = model.graph[0]
    node.name = name
    node.metadata_props.update(metadata)
    model.graph.initializers["W"].name = weight
    site = only_linear(model)
    assert (site.module_path, site.block) == (path, block)


@pytest.fixture
def two() -> Sites:
    model = build(
        "g (float[B,4] x, float[4,4] W, float[4,4] V) => (y) { h = MatMul(x, W) y = MatMul(h, V) }",
        W=(4, 4), V=(4, 4),
    )  # fmt: skip
    model.graph[0].name = "/model/layers.0/up_proj/MatMul"
    model.graph[1].name = "/model/layers.10/down_proj/MatMul"
    return find_sites(model)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("model.layers.0.up_proj", [True, False]),
        ("/model/layers.0/up_proj/MatMul", [True, False]),
        ("*.down_proj", [False, True]),
        ("model.layers.1*", [False, True]),
        ("up_proj", [False, False]),
        ("re:up_proj$", [True, False]),
        (r"re:layers\.\d+\.", [True, True]),
        ("*.UP_proj", [False, False]),
    ],
)
def test_patterns(two: Sites, pattern: str, found: list[bool]) -> None:
    assert [matches(pattern, site) for site in two] == found


def test_bad_patterns(two: Sites) -> None:
    with pytest.raises(RecipeError, match="regular expression"):
        matches("re:(", two.all[0])
    check_patterns(["*.up_proj", "re:down"], two)
    with pytest.raises(RecipeError, match=r"'model.layers.0.upproj'.*closest.*model\.layers\.0\.up_proj"):
        check_patterns(["*.up_proj", "model.layers.0.upproj"], two)


# ---------------------------------------------------------------------------------------------------- norm groups

NORMS = {
    "LayerNormalization": ("n = LayerNormalization<axis=-1>(x, G, B)", [1, 2]),
    "without bias": ("n = LayerNormalization<axis=-1>(x, G)", [1]),
    "RMSNormalization": ("n = RMSNormalization(x, G)", [1]),
    "Simplified": ("n = SimplifiedLayerNormalization(x, G)", [1]),
    "Simplified, com.microsoft": ("n = com.microsoft.SimplifiedLayerNormalization(x, G)", [1]),
    "SkipSimplified": ("n, m, i, r = com.microsoft.SkipSimplifiedLayerNormalization(x, x, G)", [2]),
    "Skip": ("n = com.microsoft.SkipLayerNormalization(x, x, G, B)", [2, 3]),
    "decomposed, gain first": ("u = Relu(x) n = Mul(G, u)", [0]),
    "decomposed, gain last": ("u = Relu(x) n = Mul(u, G)", [1]),
    "decomposed, bias": ("u = Relu(x) v = Mul(u, G) n = Add(v, B)", [1, 1]),
    "decomposed, bias first": ("u = Relu(x) v = Mul(G, u) n = Add(B, v)", [0, 0]),
    "then Cast": ("u = Relu(x) v = Mul(G, u) n = Cast<to=1>(v)", [0]),
    "then Reshape": ("v = LayerNormalization(x, G, B) n = Reshape(v, K)", [1, 2]),
}


def normed(body: str, tail: str = "y = MatMul(n, W) z = MatMul(n, V)") -> ir.Model:
    return build(
        "g (float[A,S,4] x, float[4] G, float[4] B, float[4,3] W, float[4,2] V, int64[3] K, float[4] C) => (y, z) "
        f"<float[A,S,4] v, float[A,S,4] n> {{ {body} {tail} }}",
        G=(4,), B=(4,), W=(4, 3), V=(4, 2), K=np.array([0, 0, 4]), C=(4,),
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str) -> None:
    body, places = NORMS[norm]
    (group,) = norm_groups_of(normed(body))
    assert [index for _, index in group.gains] == places
    assert [operand(node, index).name for node, index in group.gains] == ["G", "B"][: len(places)]
    assert [linear.name for linear in group.linears] == ["y", "z"]
    assert group.output.name == "n"
    assert group.others == ()


@pytest.mark.parametrize(
    "body",
    [
        "n = Mul(x, x)",
        "u = Relu(x) v = Mul(G, u) n = Mul(v, x)",
        "s, n, i, r = com.microsoft.SkipSimplifiedLayerNormalization(x, x, G)",  # not the output that the gain scales
        "n = LayerNormalization(x, x)",
        "n = Reshape(x, K)",
    ],
)
def test_producers_that_take_no_factor(body: str) -> None:
    model = normed(body)
    assert norm_groups_of(model) == ()
    (group,) = linear_groups_of(model)
    assert group.gains == ()
    assert len(group.linears) == 2
    assert group.node.outputs[0].name is not None


def test_an_output_takes_no_factor() -> None:
    model = normed("n = LayerNormalization(x, G)")
    model.graph.outputs.append(model.graph[0].outputs[0])
    assert norm_groups_of(model) == ()


def test_other_readers_are_listed() -> None:
    (group,) = norm_groups_of(normed("n = LayerNormalization(x, G)", "y = MatMul(n, W) z = Relu(n)"))
    assert [node.name for node in group.others] == ["z"]
    (group,) = norm_groups_of(normed("v = LayerNormalization(x, G) n = Cast<to=1>(v)", "y = MatMul(n, W) z = Relu(v)"))
    assert [node.name for node in group.others] == ["z"]
    (group,) = norm_groups_of(normed("n = LayerNormalization(x, G)", "y = MatMul(n, W) z = Shape(n)"))
    assert group.others == ()  # a shape does not change


def test_the_bias_of_a_norm_must_be_its_own() -> None:
    body = "u = Relu(x) v = Mul(u, G) n = Add(v, B)"
    assert norm_groups_of(normed(body, "y = MatMul(n, W) z = Neg(v)")) == ()


def test_groups_of_graph_inputs() -> None:
    (group,) = linear_groups_of(normed("n = Relu(x)", "y = MatMul(x, W) z = MatMul(x, V)"))
    assert group.output.name == "x"
    assert group.node is group.linears[0].node
    assert [node.op_type for node in group.others] == ["Relu"]


# ---------------------------------------------------------------------------------------------------- real exports


class NoReading(ir.ExternalTensor):
    """External weights that must not be looked at."""


@pytest.mark.parametrize(
    "variant",
    ["dynamo", "dynamo-past", "opset23", "fp16", "optimum", pytest.param("genai", marks=pytest.mark.exporters)],
)
def test_exports(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.export import model_path

    model = load(Path(model_path(variant)))
    canonicalize(model)

    def refuse(self: ir.ExternalTensor, *args: object) -> None:
        raise AssertionError(f"{self.name} was read")

    for method in ("numpy", "tobytes", "_load"):
        monkeypatch.setattr(ir.ExternalTensor, method, refuse)
    sites = find_sites(model)
    groups = norm_groups_of(model)

    per_layer = 5 if variant == "genai" else 7
    assert len(sites.linears) == 4 * per_layer + 1
    assert sites.unsupported == ()
    (embedding,) = sites.embeddings
    head = sites.linears[-1]
    assert head.weight is embedding.table  # tied
    assert head.module_path == "lm_head"
    assert embedding.module_path == "model.embed_tokens"
    assert {site.block for site in sites.linears} == {f"model.layers.{i}" for i in range(4)} | {""}
    ends = {site.module_path.rsplit(".", 1)[-1] for site in sites.linears[:per_layer]}
    attention = {"qkv_proj"} if variant == "genai" else {"q_proj", "k_proj", "v_proj"}
    assert ends == attention | {"o_proj", "gate_proj", "up_proj", "down_proj"}

    assert len(groups) == 9  # two norms a layer, and the last one
    assert all(group.others == () for group in groups)
    for group in groups:
        for node, index in group.gains:
            tensor = constant(node.inputs[index])
            assert tensor is not None
            assert tensor.size == group.linears[0].in_features


def test_a_pattern_that_backtracks_without_end_is_given_up(two: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.sites.kinds.PATIENCE", 0.2)
    site = dataclasses.replace(two.all[0], name="a" * 60 + "b")
    with pytest.raises(RecipeError, match=r"is still undecided about 'a+b' after 0\.2 s; write it without"):
        matches("re:(a|aa)+$", site)


def test_a_layer_says_what_its_activation_is() -> None:
    quantized = "s = QuantizeLinear(x, a, b)  d = DequantizeLinear(s, a, b)"
    dynamic = "s, t, u = DynamicQuantizeLinear(x)  d = DequantizeLinear(s, t, u)"
    for body, kind in ((quantized, Static), (dynamic, Dynamic), ("d = Identity(x)", Float)):
        for layer in ("y = MatMul(d, W)", "y = Gemm(d, W)"):
            graph = f"g (float[8,4] x, float a, uint8 b, float[4,4] W) => (float[8,4] y) {{ {body}  [fc] {layer} }}"
            used = {"a": np.float32(0.1), "b": np.uint8(7)} if kind is Static else {}
            (linear,) = find_sites(tiny.build(graph, W="normal", **used)).linears
            assert isinstance(linear.activation, kind)
            assert len(linear.activation.nodes) == (0 if kind is Float else 2)
