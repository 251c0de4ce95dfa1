"""Which linear layers belong to attention: by what they are connected to, however attention is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.graph.metadata import PART_OF
from qcompiler.sites.attention_layers import find_attention_projections
from qcompiler.sites.find import find_sites
from tests import tiny


def projections(text: str, **constants: Any) -> set[str]:
    model = tiny.build(text, **constants)
    return {linear.name for linear in find_attention_projections(model, find_sites(model).linears)}


def test_what_stands_between_a_projection_and_attention_does_not_matter() -> None:
    """A cache, norms of heads, rotation, grouped heads, a mask, biases, and a head that follows."""
    text = """g (float[B,S,4] x, float[B,M,4] past, float[B,S,1] cos, float[S,T] mask, float[4,4] Q, float[4] c,
               float[4,4] K, float[4,4] V, float[4,4] O, float[4,9] H, float[4] gain)
           => (float[B,S,9] y, float[B,T,4] present) {
        [q] q0 = MatMul(x, Q)  q1 = Add(q0, c)  n = ReduceMean(q1)  q2 = Div(q1, n)  q3 = Mul(q2, cos)
        [k] k0 = MatMul(x, K)  present = Concat<axis=1>(past, k0)  t = Transpose<perm=[0,2,1]>(present)
        [v] v0 = MatMul(x, V)  shape = Shape(v0)  v1 = Reshape(v0, shape)  v2 = Expand(v1, shape)
        s = MatMul(q3, t)  s1 = Add(s, mask)  p = Softmax(s1)  z = MatMul(p, v2)  shape_of_z = Shape(z)
        z1 = Reshape(z, shape_of_z)  [o] o0 = MatMul(z1, O)  r = Add(x, o0)  r1 = Mul(r, gain)
        [head] y = MatMul(r1, H) }"""
    found = projections(text, Q="normal", K="normal", V="normal", O="normal", H="normal", c="normal", gain="gain")
    assert found == {"q", "k", "v", "o"}


@pytest.mark.parametrize("core", [
    "c, pk, pv = com.microsoft.GroupQueryAttention<num_heads=1, kv_num_heads=1>(a, , , past, past2, n, m)",
    "c = com.microsoft.Attention<num_heads=1>(a, P)",
])  # fmt: skip
def test_operators_that_attend(core: str) -> None:
    text = f"""g (float[B,S,4] x, float[B,1,M,4] past, float[B,1,M,4] past2, int32[B] n, int32 m, float[4,12] A,
               float[12,12] P, float[4,4] O, float[4,4] U) => (float[B,S,4] y) {{
        [qkv] a = MatMul(x, A)  {core}  [out] o = MatMul(c, O)  r = Add(x, o)  [up] y = MatMul(r, U) }}"""
    assert projections(text, A="normal", P="normal", O="normal", U="normal") == {"qkv", "out"}


@pytest.mark.parametrize("text", [
    # the router of a mixture of experts: its softmax weighs what experts answer
    """g (float[B,S,4] x, float[4,2] R, float[4,4] W) => (float[B,S,4] y) {
        [router] l = MatMul(x, R)  p = Softmax(l)  [expert] e = MatMul(x, W)  t = Transpose<perm=[0,2,1]>(p)
        z = MatMul(t, e)  s = ReduceSum(z)  y = Mul(e, s) }""",
    # a classifier
    """g (float[B,4] x, float[4,4] R, float[4,2] W) => (float[B,2] y) {
        [fc] h = MatMul(x, R)  r = Relu(h)  [logits] l = MatMul(r, W)  y = Softmax(l) }""",
])  # fmt: skip
def test_a_softmax_alone_is_no_attention(text: str) -> None:
    assert projections(text, R="normal", W="normal") == set()


def test_a_part_of_a_projection_does_not_lead_beyond_it() -> None:
    """What split-outliers makes: x W as two products, of which one is no site."""
    text = """g (float[B,S,4] x, float[4,4] D, float[4,4] Q, float[2,4] P, int64[2] some) => (float[B,S,4] y) {
        [down] h = MatMul(x, D)  picked = Gather<axis=-1>(h, some)  [part] a = MatMul(picked, P)  [q] b = MatMul(h, Q)
        q = Add(a, b)  t = Transpose<perm=[0,2,1]>(q)  s = MatMul(q, t)  p = Softmax(s)  y = MatMul(p, q) }"""
    model = tiny.build(text, D="normal", Q="normal", P="normal", some=np.array([0, 2]))
    next(node for node in model.graph if node.name == "part").metadata_props[PART_OF] = "q"
    found = find_attention_projections(model, find_sites(model).linears)
    assert [linear.name for linear in found] == ["q"]
