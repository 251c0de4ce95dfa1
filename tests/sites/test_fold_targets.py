"""Which layer takes a factor on behalf of a value, through what, and which of its channels goes where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting import folding
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.analyses import linear_groups_of
from qcompiler.sites.find import NormGroup
from tests import tiny
from tests.there import dims, there

INPUTS = {
    "x": "float[2,5,8]", "u": "float[2,5,6]", "tokens": "float[5,8]", "mix": "float[5,5]", "probs": "float[2,5,5]",
    "six": "float[2,6,3]", "rows": "float[2,5,16]", "pair": "float[2,5,4,2,4]", "real": "float[5,5]",
    "some": "float[B,5,8]", "few": "float[B,8]", "most": "float[q,s,8]", "bare": "float[?,8]", "open": "float[?,?,8]",
    "none": "float[0,5,8]", "turned": "float[2,6,5]", "k1": "float[2,1,5,6]",
    "anyhow": "int64[r]", "two": "int64[2]", "three": "int64[3]", "four": "int64[4]",
    "q1": "float[2,1,3,4]", "q3": "float[2,3,5,3]", "q4": "float[2,4,5,3]", "qs": "float[2,q,5,3]",
    "k4": "float[2,2,5,3]", "last": "int32[2]", "total": "int32",
}  # fmt: skip
WEIGHTS = {
    "U": "float[8,6]", "G": "float[8,12]", "T": "float[8,10]", "C": "float[8,1]", "H": "float[8,3]", "V": "float[8,16]",
    "h": "float[6]", "D": "float[6,8]", "L": "float[16,8]", "K": "float[12,8]", "J": "float[3,8]",
    "kc": "float[2,2,5,3]",
}  # fmt: skip


def built(body: str, shapes: Mapping[str, list[int]] | None = None, *, more: str = "", noted: str = "") -> ir.Model:
    """A model whose layer `down` reads p; of inputs, weights and the outputs z and w it has those that the body names.

    `shapes` are constants of integers, `more` outputs of one letter, `noted` types of values between.
    """
    shapes = shapes or {}
    words = set(re.findall(r"\w+", body))
    outputs = ", ".join(["y", *(name for name in ("z", "w") if name in words), *more])
    constants: dict[str, Any] = {name: "normal" for name in WEIGHTS if name in words}
    constants |= {name: np.array(shape) for name, shape in shapes.items()}
    given = [f"{text} {name}" for name, text in (INPUTS | WEIGHTS).items() if name in words]
    given += [f"int64[{len(shape)}] {name}" for name, shape in shapes.items()]
    return tiny.build(
        f"g ({', '.join(given)}) => ({outputs}) {f'<{noted}>' if noted else ''} {{ {body} }}", opset=23, **constants
    )


def group(model: ir.Model) -> NormGroup:
    return next(found for found in linear_groups_of(model) if found.linears[0].name == "down")


def assert_kept(model: ir.Model, found: NormGroup) -> None:
    """Rescaled by numbers drawn at random, the model computes what it did."""
    before = model.clone()
    squares = folding.shared(found, np.exp(np.random.default_rng(0).normal(size=found.linears[0].in_features)))
    folding.rescale(found, np.sqrt(squares), Rewriter(model, "awq"), Changes())
    rng = np.random.default_rng(1)
    feed = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 4 for size in dims(value)]
        feed[there(value.name)] = rng.normal(size=shape).astype(np.float32)
    for now, then in zip(tiny.run(model, feed), tiny.run(before, feed), strict=True):
        assert tiny.relative_error(now, then) < 5e-6


SAME = list(range(6))
TAKEN: dict[str, tuple[str, list[int], dict[str, list[int]]]] = {
    "first operand": ("a = MatMul(x, U) p = Mul(a, u)", SAME, {}),
    "second operand": ("a = MatMul(x, U) p = Mul(u, a)", SAME, {}),
    "one channel for all": ("a = MatMul(x, C) p = Mul(a, u)", [0] * 6, {}),
    "another float type": ("a = MatMul(x, U) c = Cast<to=11>(a) p = Cast<to=1>(c)", SAME, {}),
    "turned and turned back": ("a = MatMul(x, U) t = Transpose(a) r = Relu(t) p = Transpose(r)", SAME, {}),
    "the shape is read, too": ("a = MatMul(x, U) s = Shape(a) z = Neg(s) p = Relu(a)", SAME, {}),
    "heads": (
        "a = MatMul(x, U) r = Reshape(a, s) t = Transpose<perm=[0,2,1,3]>(r) b = Transpose<perm=[0,2,1,3]>(t)"
        " p = Reshape(b, m)", SAME, {"s": [0, 0, 2, 3], "m": [0, 0, -1]},
    ),
    "channels in another order": (
        "a = MatMul(x, U) r = Reshape(a, s) t = Transpose<perm=[0,1,3,2]>(r) p = Reshape(t, m)",
        [0, 3, 1, 4, 2, 5], {"s": [0, 0, 2, 3], "m": [0, 0, -1]},
    ),
    "rows together": ("a = MatMul(x, U) r = Reshape(a, s) q = Relu(r) p = Reshape(q, m)", SAME,
                      {"s": [-1, 6], "m": [2, 5, 6]}),
    "rows apart": ("a = MatMul(x, U) r = Reshape(a, s) q = Relu(r) p = Reshape(q, m)", SAME,
                   {"s": [2, 5, 1, 1, 6], "m": [1, 10, -1]}),
    "repeated": ("a = MatMul(x, H) b = Unsqueeze(a, s) c = Expand(b, t) p = Reshape(c, m)", [0, 1, 2, 0, 1, 2],
                 {"s": [2], "t": [1, 1, 2, 1], "m": [0, 0, 6]}),
    "an axis more for a while": ("a = MatMul(x, U) b = Unsqueeze(a, s) q = Relu(b) p = Squeeze(q, s)", SAME,
                                 {"s": [0]}),
    "the first of two parts": ("a = MatMul(x, G) p, b = Split<axis=2, num_outputs=2>(a) z = Neg(b)", SAME, {}),
    "the last of two parts": ("a = MatMul(x, T) b, p = Split<axis=-1>(a, s) z = Neg(b)", list(range(4, 10)),
                              {"s": [4, 6]}),
    "the middle of three parts": ("a = MatMul(x, T) b, p, c = Split<axis=2>(a, s) z = Neg(b) w = Neg(c)",
                                  list(range(1, 7)), {"s": [1, 6, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("form", TAKEN)
def test_a_layer_takes_a_factor(form: str) -> None:
    body, channels, shapes = TAKEN[form]
    model = built(f"[up] {body}  [down] y = MatMul(p, D)", shapes)
    found = group(model)
    assert found.factor is not None
    assert (found.factor.linear.name, found.factor.through_attention) == ("up", False)
    assert found.factor.channels.tolist() == channels
    assert_kept(model, found)


REFUSED: dict[str, tuple[str, dict[str, list[int]]]] = {
    "another reader": ("a = MatMul(x, U) z = Neg(a) p = Relu(a)", {}),
    "the value twice": ("a = MatMul(x, U) p = Mul(a, a)", {}),
    "integers between": ("a = MatMul(x, U) c = Cast<to=7>(a) p = Cast<to=1>(c)", {}),
    "an operator that nobody knows": ("a = MatMul(x, U) p = custom.Relu(a)", {}),
    "a divisor": ("a = MatMul(x, U) p = Div(u, a)", {}),
    "a part that is picked": ("a = MatMul(x, G) p = Slice(a, s, e, axes)", {"s": [0], "e": [6], "axes": [2]}),
    "channels that are picked": ("a = MatMul(x, G) p = Gather<axis=2>(a, s)", {"s": [0, 1, 2, 3, 4, 11]}),
    "joined": ("a = MatMul(x, H) b = MatMul(x, H) p = Concat<axis=2>(a, b)", {}),
    "a product of two matrices": ("a = MatMul(tokens, U) p = MatMul(mix, a)", {}),
    "more channels than the layer reads": ("a = MatMul(x, G) r = Reshape(a, s) p = Relu(r)", {"s": [2, 10, 6]}),
    "a shape that is given": ("a = MatMul(x, U) p = Reshape(a, three)", {}),
    "any shape at all": ("a = MatMul(x, U) r = Reshape(a, anyhow) t = Relu(r) p = Reshape(t, m)", {"m": [2, 5, 6]}),
    "shapes that do not fit the layer": ("a = MatMul(x, G) p = Relu(a)", {}),
    "any order of any shape": (
        "a = MatMul(x, U) r = Reshape(a, anyhow) t = Transpose(r) p = Reshape(t, m)", {"m": [2, 5, 6]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_nothing_takes_a_factor(form: str) -> None:
    body, shapes = REFUSED[form]
    found = group(built(f"[up] {body}  [down] y = MatMul(p, D)", shapes))
    assert found.factor is None
    assert found.refusal == ""  # only attention's v_proj is expected to take one


@pytest.mark.parametrize(
    ("body", "noted", "back"),
    [
        ("a = MatMul(some, U) b = Reshape(a, four) p = Reshape(b, m)", "float[B,5,q,3] b", [0, 5, -1]),
        ("a = MatMul(few, U) b = Reshape(a, three) p = Reshape(b, m)", "float[B,q,3] b", [0, 6]),
        ("a = MatMul(few, U) b = Reshape(a, four) p = Reshape(b, m)", "float[B,3,q,1] b", [0, 6]),
        ("a = MatMul(x, U) t = Transpose(a) b = Reshape(t, four) c = Reshape(b, m) p = Transpose(c)",
         "float[q,3,5,2] b", [6, 5, 2]),
    ],
)  # fmt: skip
def test_one_size_follows_from_the_others(body: str, noted: str, back: list[int]) -> None:
    found = group(built(f"[up] {body}  [down] y = MatMul(p, D)", {"m": back}, noted=noted))
    assert found.factor is not None
    assert found.factor.channels.tolist() == SAME


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("bare", "float[?,?,3] b"),  # two sizes that nobody knows are not known to be the same
        ("none", "float[q,0,3] b"),
        ("x", "float[2,5,q,4] b"),
        ("x", "float[q,r,3] b"),
    ],
)
def test_nothing_takes_a_factor_where_sizes_do_not_follow(source: str, noted: str) -> None:
    body = f"[up] a = MatMul({source}, U) b = Reshape(a, three) p = Reshape(b, m)  [down] y = MatMul(p, D)"
    assert group(built(body, {"m": [2, 5, 6]}, noted=noted)).factor is None


def test_where_a_part_begins_is_known_from_the_sizes_before_it() -> None:
    body = "[up] a = MatMul(x, T) b, p = Split<axis=2>(a, two) z = Neg(b)  [down] y = MatMul(p, D)"
    for noted, channels in (("float[2,5,4] b", list(range(4, 10))), ("float[2,5,q] b", None)):
        factor = group(built(body, noted=f"{noted}, float[2,5,6] p")).factor
        assert (factor.channels.tolist() if factor is not None else None) == channels


@pytest.mark.parametrize(("source", "noted"), [("most", "float[t,4,u,3] d"), ("open", "float[?,4,?,3] d")])
def test_two_sizes_that_nobody_knows_may_both_have_changed(source: str, noted: str) -> None:
    """[q, 4, s, 3] as [t, 4, u, 3]: where s is not u, other channels lie along the second axis."""
    body = (
        f"[up] a = MatMul({source}, G) b = Reshape(a, s) c = Transpose<perm=[0,2,1,3]>(b) d = Reshape(c, four)"
        " e = Transpose<perm=[0,2,1,3]>(d) p = Reshape(e, m)  [down] y = MatMul(p, K)"
    )
    shapes = {"s": [0, 0, 4, 3], "m": [0, 0, 12]}
    assert group(built(body, shapes, noted=noted)).factor is None
    assert group(built(body.replace("Reshape(c, four)", "Relu(c)"), shapes)).factor is not None


@pytest.mark.parametrize("output", ["p", "a"])
def test_what_the_caller_gets_is_not_divided(output: str) -> None:
    found = group(built("[up] a = MatMul(x, U) p = Relu(a)  [down] y = MatMul(p, D)", more=output))
    assert found.factor is None


# ----------------------------------------------------------------------------------------------------------- attention

HEADS = "r = Reshape(a, s) v = Transpose<perm=[0,2,1,3]>(r)"
BACK = "b = Transpose<perm=[0,2,1,3]>(o) p = Reshape(b, m)  [down] y = MatMul(p, K)"
THROUGH: dict[str, tuple[str, list[int], dict[str, list[int]]]] = {
    "one head": ("[up] a = MatMul(x, U) p = MatMul(probs, a)  [down] y = MatMul(p, D)", SAME, {}),
    "heads in groups": (
        f"[up] a = MatMul(x, U) {HEADS} o = Attention(q4, k4, v) {BACK}",
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], {"s": [0, 0, 2, 3], "m": [0, 0, 12]},
    ),
    "inputs that are left out": (
        f"[up] a = MatMul(x, U) {HEADS} o = Attention(q4, k4, v, real, , ) {BACK}",
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], {"s": [0, 0, 2, 3], "m": [0, 0, 12]},
    ),
    "keys that are constants": (
        f"[up] a = MatMul(x, U) {HEADS} o = Attention(q4, kc, v) {BACK}",
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], {"s": [0, 0, 2, 3], "m": [0, 0, 12]},
    ),
    "no outputs but the first": (
        f"[up] a = MatMul(x, U) {HEADS} o, pk, pv, qk = Attention(q4, k4, v) z = Neg(qk) {BACK}",
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], {"s": [0, 0, 2, 3], "m": [0, 0, 12]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", THROUGH)
def test_a_layer_takes_a_factor_through_attention(form: str) -> None:
    body, channels, shapes = THROUGH[form]
    model = built(body, shapes)
    found = group(model)
    assert found.factor is not None
    assert (found.factor.linear.name, found.factor.through_attention) == ("up", True)
    assert found.factor.channels.tolist() == channels
    assert_kept(model, found)


CACHE = "keeps its values in a cache, whose contents would change meaning"
UNKNOWN = "the shapes between it and up do not show which channel goes where"
GROUPED = {"s": [0, 0, 2, 3], "m": [0, 0, 12]}
THREE = "[up] a = MatMul(x, V) p = Attention<{}>(rows, rows, a)  [down] y = MatMul(p, L)"
WHY: dict[str, tuple[str, str, dict[str, list[int]]]] = {
    "values are the output": (f"[up] a = MatMul(x, U) {HEADS} o, z, w = Attention(q4, k4, v) {BACK}", CACHE, GROUPED),
    "values are read": (
        f"[up] a = MatMul(x, U) {HEADS} o, pk, pv = Attention(q4, k4, v) z = Neg(pv) {BACK}", CACHE, GROUPED
    ),
    "keys are read": (f"[up] a = MatMul(x, U) {HEADS} o, pk = Attention(q4, k4, v) z = Neg(pk) {BACK}", CACHE, GROUPED),
    "keys and values in one": (
        "p = com.microsoft.MultiHeadAttention<num_heads=4>(rows, pair)  [down] y = MatMul(p, L)",
        "MultiHeadAttention reads its values packed with keys", {},
    ),
    "no values but a mask": (
        "p = com.microsoft.MultiHeadAttention<num_heads=4>(rows, pair, , , )  [down] y = MatMul(p, L)",
        "MultiHeadAttention reads its values packed with keys", {},
    ),
    "an operator made for caches": (
        "[up] a = MatMul(x, V) p = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=4>"
        "(rows, rows, a, , , last, total)  [down] y = MatMul(p, L)", f"GroupQueryAttention {CACHE}", {},
    ),
    "heads of values in an operator of the runtime": (
        f"[up] a = MatMul(x, U) {HEADS} p = com.microsoft.MultiHeadAttention<num_heads=2>(u, k4, v)"
        "  [down] y = MatMul(p, D)", UNKNOWN, GROUPED,
    ),
    "one head of values in an operator of the runtime": (
        "[up] a = MatMul(x, U) v = Unsqueeze(a, s) p = com.microsoft.MultiHeadAttention<num_heads=1>(u, k1, v)"
        "  [down] y = MatMul(p, D)", UNKNOWN, {"s": [1]},
    ),
    "positions of values that are channels": (
        "[up] a = MatMul(x, U) t = Transpose<perm=[0,2,1]>(a)"
        " o = Attention<q_num_heads=1, kv_num_heads=1>(turned, turned, t)"
        " p = Transpose<perm=[0,2,1]>(o)  [down] y = MatMul(p, D)", UNKNOWN, {},
    ),
    "positions of heads that are channels": (
        "[up] a = MatMul(x, H) t = Transpose<perm=[0,2,1]>(a) v = Unsqueeze(t, s) o = Attention(q1, q1, v)"
        " b = Squeeze(o, s) p = Transpose<perm=[0,2,1]>(b)  [down] y = MatMul(p, J)", UNKNOWN, {"s": [1]},
    ),
    "queries whose heads do not divide": (
        f"[up] a = MatMul(x, U) {HEADS} o = Attention(q3, k4, v) {BACK}", UNKNOWN, GROUPED
    ),
    "queries of unknown heads": (f"[up] a = MatMul(x, U) {HEADS} o = Attention(qs, k4, v) {BACK}", UNKNOWN, GROUPED),
    "heads of values unknown": (THREE.format("q_num_heads=4"), UNKNOWN, {}),
    "heads of queries unknown": (THREE.format("kv_num_heads=4"), UNKNOWN, {}),
    "heads that do not divide": (THREE.format("q_num_heads=3, kv_num_heads=2"), UNKNOWN, {}),
    "channels that heads do not divide": (THREE.format("q_num_heads=3, kv_num_heads=3"), UNKNOWN, {}),
    "a sum over channels": (
        "[up] a = MatMul(x, H) t = Transpose<perm=[0,2,1]>(a) o = MatMul(six, t) p = Transpose<perm=[0,2,1]>(o)"
        "  [down] y = MatMul(p, D)", UNKNOWN, {},
    ),
    "values that are given": ("p = MatMul(probs, u)  [down] y = MatMul(p, D)",
                              "attention's values are given (u), not written by a layer", {}),
    "a curve": ("[up] a = MatMul(x, U) t = Tanh(a) p = MatMul(probs, t)  [down] y = MatMul(p, D)",
                "Tanh stands between it and the layer that writes attention's values", {}),
    "a sum": ("[up] a = MatMul(x, U) t = Add(a, u) p = MatMul(probs, t)  [down] y = MatMul(p, D)",
              "Add stands between it and the layer that writes attention's values", {}),
    "a cache": ("[up] a = MatMul(x, U) c = Identity(a) n = Relu(c) p = MatMul(probs, n)  [down] y = MatMul(p, D)",
                "attention's values are kept in a cache (a), whose contents would change meaning", {}),
    "other readers": (
        "[up] a = MatMul(x, U) z = Neg(a) w = Exp(a) n = Relu(a) p = MatMul(probs, n)  [down] y = MatMul(p, D)",
        "attention's values are read by Exp, Neg, too", {},
    ),
    "twice": ("[up] a = MatMul(x, U) n = Mul(a, a) p = MatMul(probs, n)  [down] y = MatMul(p, D)",
              "Mul reads the same value twice", {}),
}  # fmt: skip


@pytest.mark.parametrize("form", WHY)
def test_why_nothing_takes_a_factor_through_attention(form: str) -> None:
    body, why, shapes = WHY[form]
    found = group(built(body, shapes, more="a" if form == "a cache" else ""))
    assert found.factor is None
    assert why in found.refusal
