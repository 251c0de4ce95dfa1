"""quantize-activations: one pair for each value, with the range that the statistic gives, in the right place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.quantize_activations import RANGES, QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import QCompilerError
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from tests import tiny
from tests.oracles import quantized_linear as oracle
from tests.there import held, operand, operands

MATMUL = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
SIBLINGS = """g (float[B,S,8] x, float[8,6] W, float[8,4] V) => (float[B,S,6] y, float[B,S,4] z, float[B,S,8] r) {
    h = Sigmoid(x)  [first] y = MatMul(h, W)  [second] z = MatMul(h, V)  r = Neg(h) }"""
CONVS = """g (float[B,3,9,9] x, float[4,3,3,3] W, float[4] b, float[5,4,3,3] V)
    => (float[B,5,5,5] y, float[B,4,7,7] other) {
    [conv1] c = Conv(x, W, b)  r = Relu(c)  other = Sigmoid(r)  [conv2] y = Conv(r, V) }"""
BITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


def quantize(
    model: ir.Model, weights: dict[str, Any] | None = None, samples: list[Any] | None = None, **options: Any
) -> tuple[ir.Model, Changes]:
    after = model.clone()
    steps = [QuantizeWeights(**(weights or {})), QuantizeActivations(**options)]
    return after, tiny.compile(after, steps, samples or tiny.feeds(model))[-1]


def pairs(model: ir.Model) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of each QuantizeLinear, by the value that it reads."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            name = str(operand(node, 0).name)
            assert name not in found
            scale, zero = (held(value) for value in operands(node)[1:])
            found[name] = float(scale), int(zero)
            (use,) = node.outputs[0].uses()
            assert use.node.op_type == "DequantizeLinear"
            assert list(use.node.inputs[1:]) == list(node.inputs[1:])
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", BITS)
def test_minmax(format: str, symmetric: bool) -> None:
    model = tiny.build(MATMUL, W="normal")
    samples = [{"x": np.abs(s["x"]) - 0.1} for s in tiny.feeds(model)]
    after, _ = quantize(model, samples=samples, format=format, symmetric=symmetric)
    x = np.stack([s["x"] for s in samples])
    qmin, qmax = BITS[format]
    lo, hi = float(x.min()), float(x.max())
    if symmetric:
        scale, zero = max(-lo, hi) / ((qmax - qmin) // 2), (qmin + qmax + 1) // 2
    else:
        scale, zero = oracle.affine(lo, hi, qmin, qmax)
    ((name, found),) = pairs(after).items()
    assert (name, found[1]) == ("x", zero)
    assert found[0] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("range", RANGES)
def test_every_way_to_choose_a_range(range: str) -> None:
    """Each gives a pair whose range holds most values; `mse` has the least mean over tokens of relative errors."""
    model = tiny.build(MATMUL, W="normal")
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_t(3, size=(2, 400, 8)).astype(np.float32)} for _ in np.arange(4)]
    x = np.stack([s["x"] for s in samples])
    errors = {}
    for method in {range, "mse", "minmax"}:
        after, _ = quantize(model, samples=samples, range=method, percent=99.0)
        scale, zero = pairs(after)["x"]
        codes = oracle.codes(x, scale, zero, 0, 255)
        lost = np.square((codes - zero) * scale - x).sum(-1)
        errors[method] = float((lost / np.square(x).sum(-1)).mean())
        lo, hi = -zero * scale, (255 - zero) * scale
        assert np.mean((x >= lo - scale) & (x <= hi + scale)) > 0.97
    assert errors["mse"] <= errors[range] * 1.02
    assert errors["mse"] < errors["minmax"]


def test_a_statistic_of_ones_own() -> None:
    model = tiny.build(MATMUL, W="normal")
    after, _ = quantize(model, range="qcompiler.statistics:MinMax")
    assert set(pairs(after)) == {"x"}
    with pytest.raises(QCompilerError, match="needs a Range"):
        quantize(model, range="qcompiler.statistics:ChannelMoments")


@pytest.mark.parametrize("range", ["minmac", "percentile "])
def test_an_unknown_range(range: str) -> None:
    with pytest.raises(QCompilerError, match="did you mean"):
        QuantizeActivations(range=range)


@pytest.mark.parametrize(
    "range",
    [
        "no_module:Class",
        "qcompiler.statistics:Nothing",
        "qcompiler.statistics:finite",
        "qcompiler.statistics:Statistic",  # it is no dataclass
    ],
)
def test_an_unknown_statistic(range: str) -> None:
    with pytest.raises(QCompilerError, match=r"quantize-activations\.range"):
        quantize(tiny.build(MATMUL, W="normal"), range=range)


def test_siblings_share_one_pair_and_others_read_the_float() -> None:
    after, changes = quantize(tiny.build(SIBLINGS, W="normal", V="normal"))
    assert sorted(c.site for c in changes.changed) == ["first", "second"]
    assert set(pairs(after)) == {"h"}
    first, second = find_sites(after).linears
    assert first.input is second.input
    (negative,) = [node for node in after.graph if node.op_type == "Neg"]
    assert operand(negative, 0).name == "h"


def test_a_value_that_never_changes() -> None:
    model = tiny.build(MATMUL, W="normal")
    after, _ = quantize(model, samples=[{"x": np.zeros((2, 5, 8), np.float32)}])
    assert pairs(after)["x"][0] == 1
    assert np.all(tiny.run(after, {"x": np.zeros((2, 5, 8), np.float32)})[0] == 0)


def test_a_layer_of_float_weight_is_left_out_with_the_reason() -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    after, changes = quantize(model, weights={"ignore": ("second",)})
    assert [(left.site, left.reason) for left in changes.excluded] == [("second", "its weight is float")]
    assert not changes.skipped
    first, second = find_sites(after).linears
    assert first.input.name == "h.dequantized"
    assert second.input.name == "h"


def test_an_excluded_layer_reads_the_float() -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    after, changes = quantize(model, ignore=("second",))
    assert not changes.skipped
    assert [site.input.name for site in find_sites(after).linears] == ["h.dequantized", "h"]


def test_patterns_on_weights_names_still_match() -> None:
    model = tiny.build(
        SIBLINGS.replace("W)", '"a.weight")').replace("[8,6] W", '[8,6] "a.weight"'),
        **{"a.weight": "normal", "V": "normal"},
    )
    assert find_sites(model).linears[0].module_path == "a"
    after, changes = quantize(model, ignore=("a",))
    assert [c.site for c in changes.changed] == ["second"]
    assert find_sites(after).linears[0].module_path == "a"


@pytest.mark.parametrize(("text", "layer"), [(SIBLINGS, "first"), (CONVS, "conv2")], ids=["linear", "convolution"])
def test_twice_is_once(text: str, layer: str) -> None:
    constants = ("W", "V", "b") if text is CONVS else ("W", "V")
    model = tiny.build(text, **dict.fromkeys(constants, "normal"))
    after, _ = quantize(model)
    before = tiny.operators(after)
    (changes,) = tiny.compile(after, [QuantizeActivations()], tiny.feeds(model))
    assert tiny.operators(after) == before
    assert "already" in tiny.reasons(changes)[layer]


# ------------------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("outputs", [True, False])
def test_convolutions(outputs: bool) -> None:
    model = tiny.build(CONVS, W="normal", b="normal", V="normal")
    after, changes = quantize(model, outputs=outputs)
    assert [c.site for c in changes.changed] == ["conv1", "conv2"]
    assert set(pairs(after)) == {"x", "r"}  # `y` is an output of the graph, and `c` is what the Relu absorbs
    (sigmoid,) = [node for node in after.graph if node.op_type == "Sigmoid"]
    assert operand(sigmoid, 0).name == ("r.dequantized" if outputs else "r")
    sample = tiny.feeds(model)[0]
    for got, expected in zip(tiny.run(after, sample), tiny.run(model, sample), strict=True):
        assert tiny.relative_error(got, expected) < 0.03


@pytest.mark.parametrize("activation", ["Relu(c)", "Clip(c, low, high)"])
def test_the_result_of_a_convolution_before_other_operators(activation: str) -> None:
    model = tiny.build(
        f"""g (float[B,3,9,9] x, float[4,3,3,3] W, float low, float high) => (float[B,4,3,3] y, float[B,4,7,7] z) {{
        [conv] c = Conv(x, W)  r = {activation}  y = MaxPool<kernel_shape=[3,3], strides=[2,2]>(r)  z = Neg(r) }}""",
        W="normal", low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    after, _ = quantize(model)
    assert set(pairs(after)) == {"x", "r"}
    others = [node for node in after.graph if node.op_type in ("MaxPool", "Neg")]
    assert [operand(node, 0).name for node in others] == ["r.dequantized"] * 2


def test_a_convolution_that_two_activation_functions_read() -> None:
    model = tiny.build(
        """g (float[B,3,9,9] x, float[4,3,3,3] W) => (float[B,4,7,7] y, float[B,4,7,7] z) {
        [conv] c = Conv(x, W)  y = Relu(c)  z = Sigmoid(c) }""",
        W="normal",
    )  # fmt: skip
    after, _ = quantize(model)
    assert set(pairs(after)) == {"x", "c"}


def test_readers_that_stand_before_the_layer_that_brings_the_pair() -> None:
    """The pool reads the same value as the second convolution and comes before it."""
    model = tiny.build(
        """g (float[B,3,9,9] x, float[4,3,3,3] W, float[5,4,3,3] V) => (float[B,5,5,5] y, float[B,4,3,3] p) {
        [conv1] c = Conv(x, W)  r = Relu(c)  p = MaxPool<kernel_shape=[3,3], strides=[2,2]>(r)
        [conv2] y = Conv(r, V) }""",
        W="normal", V="normal",
    )  # fmt: skip
    after, _ = quantize(model)  # compile() checks the order of the nodes
    assert set(pairs(after)) == {"x", "r"}


def test_a_convolution_and_a_linear_layer_that_read_one_value() -> None:
    model = tiny.build(
        """g (float[B,3,9,9] x, float[4,3,3,3] W, float[9,6] V) => (float[B,4,7,7] y, float[B,3,9,6] z) {
        h = Sigmoid(x)  [conv] y = Conv(h, W)  [fc] z = MatMul(h, V) }""",
        W="normal", V="normal",
    )  # fmt: skip
    after, _ = quantize(model)
    assert set(pairs(after)) == {"h"}
    after, changes = quantize(model, weights={"ignore": ("conv",)})
    assert [c.site for c in changes.changed] == ["fc"]


# --------------------------------------------------------------------------------------------------------- precision


def test_half_precision() -> None:
    model = tiny.build(SIBLINGS.replace("float[", "float16["), W="normal", V="normal")
    after, _ = quantize(model)
    (quantized,) = [node for node in after.graph if node.op_type == "QuantizeLinear"]
    assert operand(quantized, 1).dtype == ir.DataType.FLOAT16
    sample = tiny.feeds(model)[0]
    assert tiny.relative_error(tiny.run(after, sample)[0], tiny.run(model, sample)[0]) < 0.03


def test_half_precision_behind_an_operator_of_unknown_type() -> None:
    """Shape inference stops at ONNX Runtime's own operators, so the value has no type in the graph."""
    model = tiny.build(
        """g (float16[B,S,8] x, float16[B,S,8] r, float16[8] g, float16[8,6] W) => (float16[B,S,6] y) {
        n = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g)  [fc] y = MatMul(n, W) }""",
        g="gain", W="normal",
    )  # fmt: skip
    after, _ = quantize(model)
    sample = tiny.feeds(model)[0]
    assert tiny.relative_error(tiny.run(after, sample)[0], tiny.run(model, sample)[0]) < 0.03


def test_statistics_are_asked_for_once() -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    taps = QuantizeActivations().taps(model)
    assert len({(tap.value, tap.statistic.key) for tap in taps}) == len(taps) == 1


def test_a_convolution_that_is_an_output_itself_has_no_pair_behind_its_relu() -> None:
    """Its kernel cannot absorb the Relu, as its own result is asked for."""
    model = tiny.build(
        """g (float[B,3,9,9] x, float[4,3,3,3] W) => (float[B,4,7,7] c, float[B,4,7,7] y) {
        [conv] c = Conv(x, W)  r = Relu(c)  y = Neg(r) }""",
        W="normal",
    )
    after, _ = quantize(model)
    assert set(pairs(after)) == {"x"}
