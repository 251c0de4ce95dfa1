"""awq: the function stays, the scales are the paper's, and the search finds what really running the layers would."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.awq import CHANNELS, Awq
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import QCompilerError
from qcompiler.formats.scheme import PerGroup
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from qcompiler.statistics import SecondMoment, StatisticsStore
from qcompiler.targets import Target
from tests import tiny
from tests.oracles import awq as oracle
from tests.there import held, there

K = 64
TWO = f"""g (float[M,{K}] x, float[{K}] g, float[{K},48] A, float[{K},96] C) => (float[M,48] a, float[M,96] c) {{
    n = Mul(x, g)  [a_proj] a = MatMul(n, A)  [c_proj] c = MatMul(n, C) }}"""


def loud(seed: int, rows: int = 600) -> tuple[np.ndarray, list[np.ndarray]]:
    """Activations [rows, K] with a few loud, correlated channels, and two weights that read them."""
    rng = np.random.default_rng(seed)
    channel = np.exp(0.5 * rng.normal(size=K))
    channel[rng.choice(K, 5, replace=False)] *= 20
    X = rng.normal(size=(rows, K)) * channel + 0.3 * rng.normal(size=(rows, 1))
    return X.astype(np.float32), [rng.normal(size=(K, n)).astype(np.float32) * 0.05 for n in (48, 96)]


def two_layers(Ws: list[np.ndarray]) -> ir.Model:
    return tiny.build(TWO, g=np.ones(K, np.float32), A=Ws[0], C=Ws[1])


def run(model: ir.Model, samples: Sequence[tiny.Feeds], tolerance: float = 3e-6, **options: Any) -> Changes:
    """Apply in place, after which the model must compute what it did."""
    before = model.clone()
    (changes,) = tiny.compile(model, [Awq(**options)], samples)
    for sample in samples:
        for got, expected in zip(tiny.run(model, sample), tiny.run(before, sample), strict=True):
            assert tiny.relative_error(got, expected) < tolerance
    return changes


SCHEMES = [("int4", 16, True), ("uint4", 32, False), ("int3", 24, True), ("int4", None, True)]


@pytest.mark.parametrize(("format", "group_size", "symmetric"), SCHEMES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_search_is_the_oracles(seed: int, format: str, group_size: int | None, symmetric: bool) -> None:
    X, Ws = loud(seed)
    model = two_layers(Ws)
    changes = run(model, [{"x": X}], format=format, group_size=group_size, symmetric=symmetric)
    scheme = {"bits": int(format[-1]), "symmetric": symmetric}
    alpha, least = oracle.search(X, Ws, group_size or 128, **scheme)
    found = re.search(r"alpha (\S+), expected output error", changes.changed[0].detail)
    assert found is not None
    s = oracle.scales(X, float(found[1]))
    np.testing.assert_allclose(changes.rescaled["n"], s, rtol=1e-4)
    before = oracle.output_error(X, Ws, np.ones(K), group_size or 128, **scheme)
    after = oracle.output_error(X, Ws, s, group_size or 128, **scheme)
    # Symmetric codes of few bits put -absmax right between two codes, so that float32 decides which it becomes.
    tolerance = 0.05 if symmetric else 0.005
    assert sum(after) <= (1 + tolerance) * sum(oracle.output_error(X, Ws, least, group_size or 128, **scheme))
    assert symmetric or float(found[1]) == alpha
    for changed, then, now in zip(changes.changed, before, after, strict=True):
        said = re.search(r"error (\S+) → (\S+),", changed.detail)
        assert said is not None
        np.testing.assert_allclose([float(said[1]), float(said[2])], [then, now], rtol=max(tolerance, 0.005))
    for site, W in zip(find_sites(model).linears, Ws, strict=True):
        np.testing.assert_allclose(held(site.weight), W * s[:, None], rtol=1e-4)


def test_rounded_layers_are_better_after() -> None:
    """What counts in the end: the outputs of quantize-weights on data that the search has not seen."""
    for seed in range(4):
        X, Ws = loud(seed, 1200)
        plain, scaled = two_layers(Ws), two_layers(Ws)
        seen, new = {"x": X[:600]}, {"x": X[600:]}
        exact = tiny.run(plain, new)
        rounding = QuantizeWeights(format="int4", granularity="group", group_size=32)
        tiny.compile(plain, [rounding], [seen])
        tiny.compile(scaled, [Awq(group_size=32), rounding], [seen])
        for rtn, awq, expected in zip(tiny.run(plain, new), tiny.run(scaled, new), exact, strict=True):
            assert tiny.relative_error(awq, expected) < 0.9 * tiny.relative_error(rtn, expected)


def test_channels_of_one_loudness_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(400, K)) @ np.linalg.qr(rng.normal(size=(K, K)))[0]).astype(np.float32)
    for _ in range(20):  # the weights of tokens depend on the channels, and the other way round
        X /= np.sqrt(np.mean(oracle.weighed(X) ** 2, axis=0)).astype(np.float32)
    model = two_layers(loud(1)[1])
    changes = run(model, [{"x": X}], grid=4)
    s = changes.rescaled.get("n", np.ones(K))
    np.testing.assert_allclose(s, 1, atol=1e-5)


def test_never_worse_by_its_own_measure() -> None:
    for seed in range(5):
        X, Ws = loud(seed)
        X = X[:, np.random.default_rng(seed).permutation(K)] ** 3  # loudness that says nothing about the weights
        changes = run(two_layers(Ws), [{"x": X}], group_size=32, tolerance=1e-5)
        s = changes.rescaled.get("n", np.ones(K))
        errors = [sum(oracle.output_error(X, Ws, scale, 32)) for scale in (np.ones(K), s)]
        assert errors[1] <= errors[0] * 1.001


def test_large_layers_are_sampled() -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(size=(8, 4 * CHANNELS)).astype(np.float32)
    model = tiny.build(
        f"g (float[M,8] x, float[8] g, float[8,{4 * CHANNELS}] W) => (float[M,{4 * CHANNELS}] y) "
        "{ n = Mul(x, g)  [fc] y = MatMul(n, W) }",
        g="outliers", W=W,
    )  # fmt: skip
    gain = tiny.data(model, "g")
    changes = run(model, tiny.feeds(model))
    X = np.concatenate([sample["x"] for sample in tiny.feeds(model)]) * gain
    picked = np.linspace(0, 4 * CHANNELS - 1, CHANNELS).round().astype(int)
    errors = [sum(oracle.output_error(X, [W[:, picked]], s, 128)) for s in (np.ones(8), changes.rescaled["n"])]
    said = re.search(r"error (\S+) → (\S+),", changes.changed[0].detail)
    assert said is not None
    np.testing.assert_allclose([float(said[1]), float(said[2])], errors, rtol=0.02)


# ---------------------------------------------------------------------------------------------------- forms of layers

BLOCK = """g (float[B,S,8] x, float[8] g, float[8,8] Wq, float[8,8] Wk, float[8,8] Wv, float[8] bv, float[8,8] Wo,
    float[8] h, float[8,12] G, float[8,12] U, float[12,8] D, int64[4] split, int64[3] join) => (float[B,S,8] y) {
    n = RMSNormalization<axis=-1>(x, g)
    [q_proj] q = MatMul(n, Wq)  [k_proj] k = MatMul(n, Wk)  [v_proj] v0 = MatMul(n, Wv)  v = Add(v0, bv)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qh = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vh = Transpose<perm=[0,2,1,3]>(v4)
    scores = MatMul(qh, kt)  probs = Softmax<axis=-1>(scores)  oh = MatMul(probs, vh)
    o4 = Transpose<perm=[0,2,1,3]>(oh)  o = Reshape(o4, join)  [o_proj] a = MatMul(o, Wo)  r = Add(x, a)
    m = RMSNormalization<axis=-1>(r, h)  [gate_proj] gate = MatMul(m, G)  act = Sigmoid(gate)  silu = Mul(gate, act)
    [up_proj] up = MatMul(m, U)  p = Mul(silu, up)  [down_proj] d = MatMul(p, D)  y = Add(r, d) }"""
CONSTANTS = {
    "g": "outliers", "h": "outliers", "split": np.array([0, 0, 2, 4]), "join": np.array([0, 0, 8]),
    **dict.fromkeys(("Wq", "Wk", "Wv", "bv", "Wo", "G", "U", "D"), "normal"),
}  # fmt: skip


def test_a_transformer_block() -> None:
    model = tiny.build(BLOCK, opset=23, **CONSTANTS)
    changes = run(model, tiny.feeds(model), group_size=4, tolerance=1e-5)
    assert not changes.skipped
    assert [changed.site for changed in changes.changed] == [site.name for site in find_sites(model).linears]
    places = {c.site: c.detail.rsplit("folded into ", 1)[-1] for c in changes.changed if "folded" in c.detail}
    expected = {"q_proj": "n", "k_proj": "n", "v_proj": "n", "o_proj": "v_proj", "gate_proj": "m", "up_proj": "m"}
    expected["down_proj"] = "up_proj"
    assert places == {site: expected[site] for site in places}
    assert {"q_proj", "gate_proj"} <= places.keys()


def test_values_that_are_split_off_one_projection() -> None:
    """q, k and v come out of one layer: its channels for v start behind those of q and k."""
    packed = BLOCK.replace("float[8,8] Wq, float[8,8] Wk, float[8,8] Wv, float[8] bv,", "float[8,24] Wq, float[24] bv,")
    packed = re.sub(r"\[q_proj\].*", "[qkv] a0 = MatMul(n, Wq)  a1 = Add(a0, bv)"
                    "  q, k, v = Split<axis=-1, num_outputs=3>(a1)", packed)  # fmt: skip
    constants = {name: entry for name, entry in CONSTANTS.items() if name not in ("Wk", "Wv")}
    model = tiny.build(packed, opset=23, **constants)
    changes = run(model, tiny.feeds(model), group_size=4, tolerance=1e-5)
    assert "qkv" in {changed.site for changed in changes.changed}


def test_statistics_follow() -> None:
    """Second moments of the scaled model are the measured ones, rescaled: gptq after awq needs no second look."""
    model = tiny.build(BLOCK, opset=23, **CONSTANTS)
    samples = tiny.feeds(model)
    store, again = StatisticsStore(), StatisticsStore()
    step = Awq(group_size=4)
    tiny.measure(model, [step], samples, store)
    changes = step.apply(model, store)
    assert {"n", "m"} <= changes.rescaled.keys()
    for value, divisor in changes.rescaled.items():
        store.rescale(value, divisor)
    tiny.measure(model, [step], samples, again)
    for value in ("n", "m", "o", "p"):
        expected, got = (s.get(value, SecondMoment(per_token=True)).result() for s in (again, store))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("insert_mul", [False, True])
def test_nothing_to_fold_into(insert_mul: bool) -> None:
    model = tiny.build("g (float[M,64] x, float[64,48] W) => (float[M,48] y) { [fc] y = MatMul(x, W) }",
                       W=loud(1)[1][0])  # fmt: skip
    changes = run(model, [{"x": loud(1)[0]}], group_size=16, insert_mul=insert_mul)
    if insert_mul:
        assert tiny.operators(model) == ["Mul", "MatMul"]
        assert not changes.rescaled
    else:
        assert "no norm" in tiny.reasons(changes)["fc"]


def test_transposed_weights_and_biases() -> None:
    model = tiny.build(
        """g (float[M,8] x, float[8] g, float[8] b, float[6,8] W, float[6] c) => (float[M,6] y) {
        n = LayerNormalization(x, g, b)  [fc] y = Gemm<transB=1>(n, W, c) }""",
        g="outliers", b="normal", W="normal", c="normal",
    )  # fmt: skip
    W = tiny.data(model, "W")
    changes = run(model, tiny.feeds(model), group_size=4)
    assert changes.rescaled
    np.testing.assert_allclose(tiny.data(model, "W"), W * changes.rescaled["n"], rtol=1e-6)


def test_tied_and_shared_weights_are_skipped() -> None:
    tied = tiny.build(
        """g (int64[B,S] ids, float[12,8] E, float[8] g) => (float[B,S,12] logits) {
        x = Gather(E, ids)  n = RMSNormalization<axis=-1>(x, g)  T = Transpose<perm=[1,0]>(E)
        [lm_head] logits = MatMul(n, T) }""",
        opset=23, E="normal", g="outliers",
    )  # fmt: skip
    changes = run(tied, tiny.feeds(tied))
    assert "tied" in tiny.reasons(changes)["lm_head"]
    shared = tiny.build(
        """g (float[B,S,8] x, float[8] g, float[8,8] W) => (float[B,S,8] y, float[B,S,8] z) {
        n = RMSNormalization<axis=-1>(x, g)  [one] y = MatMul(n, W)  m = Neg(x)  [two] z = MatMul(m, W) }""",
        opset=23, g="outliers", W="normal",
    )  # fmt: skip
    changes = run(shared, tiny.feeds(shared))
    assert set(tiny.reasons(changes)) == {"one", "two"}
    assert not changes.changed


def test_quantized_weights_are_skipped() -> None:
    model = two_layers(loud(1)[1])
    samples = [{"x": loud(1)[0]}]
    rounding = QuantizeWeights(format="int4", granularity="group", group_size=32)
    _, changes = tiny.compile(model, [rounding, Awq()], samples)
    assert "awq comes before" in tiny.reasons(changes)["a_proj"]


def test_an_excluded_sibling_stops_the_group() -> None:
    changes = run(two_layers(loud(1)[1]), [{"x": loud(1)[0]}], ignore=("c_proj",))
    assert tiny.reasons(changes) == {"a_proj": "another layer that reads the same value is excluded"}


def test_half_precision() -> None:
    gentle = {name: 0.2 * tiny.data(tiny.build(BLOCK, opset=23, **CONSTANTS), name) for name in ("Wq", "Wk")}
    half = {name: array.astype(np.float16) for name, array in gentle.items()}  # a softmax that is no argmax
    model = tiny.build(BLOCK.replace("float[", "float16["), opset=23, **{**CONSTANTS, **half})
    changes = run(model, tiny.feeds(model), group_size=4, tolerance=4e-3)
    assert {"n", "m"} <= changes.rescaled.keys()
    floats = [value.dtype for value in model.graph.initializers.values() if there(value.dtype).is_floating_point()]
    assert set(floats) == {ir.DataType.FLOAT16}


def test_half_precision_without_room_is_left_alone() -> None:
    X, (W, _) = loud(1)
    text = "g (float16[M,64] x, float16[64] g, float16[64,48] W) => (y) { n = Mul(x, g) [fc] y = MatMul(n, W) }"
    small = (W * 1e-5).astype(np.float16)  # subnormal: any factor below 1 loses digits
    model = tiny.build(text, g=np.ones(64, np.float16), W=small)
    (changes,) = tiny.compile(model, [Awq(group_size=16)], [{"x": X.astype(np.float16)}])
    assert "fit" in tiny.reasons(changes)["fc"]
    np.testing.assert_array_equal(tiny.data(model, "W"), small)


def test_channels_that_are_never_active() -> None:
    X, Ws = loud(1)
    X[:, 7] = 0
    changes = run(two_layers(Ws), [{"x": X}], group_size=32)
    s = changes.rescaled["n"]
    assert np.isfinite(s).all()
    assert s[7] == s.min()
    silent = two_layers(Ws)
    changes = run(silent, [{"x": np.zeros_like(X)}])
    assert "left as it is" in changes.changed[0].detail


@pytest.mark.parametrize(
    "options",
    [{"format": "int5"}, {"group_size": 0}, {"group_size": -3}, {"grid": 0}, {"format": "nf4", "symmetric": False}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises((QCompilerError, ValueError)):
        Awq(**options)


def test_an_open_group_size_is_the_targets() -> None:
    assert Awq().scheme().granularity == PerGroup(128)
    cuda, cpu = Target.load("ort-cuda"), Target.load("ort-cpu")
    for step, target, size in ((Awq(), cuda, 32), (Awq(), cpu, 128), (Awq(group_size=64), cuda, 64)):
        filled = step.for_target(target)
        assert isinstance(filled, Awq)
        assert filled.scheme().granularity == PerGroup(size)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Awq().grid = 5  # type: ignore[misc]
