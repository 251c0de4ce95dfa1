"""lower-embedding, and lower-weight-only where embeddings are tied: GatherBlockQuantized gathers and decodes rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.lower_embedding import LowerEmbedding
from passes.lower_int8 import LowerInt8
from passes.lower_weight_only import LowerWeightOnly
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sites.embeddings import find_quantized_embeddings
from tests import tiny
from tests.there import tensors

EMBED = "g (int64[B,S] ids, float[12,K] E) => (float[B,S,K] x) { [embed] x = Gather(E, ids) }"
TURNED = """g (int64[B,S] ids, float[K,12] E) => (float[B,S,K] x) {
    T = Transpose<perm=[1,0]>(E)  [embed] x = Gather(T, ids) }"""
TIED = """g (int64[B,S] ids, float[12,K] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
TIED_TURNED = """g (int64[B,S] ids, float[K,12] E) => (float[B,S,12] logits) {
    T = Transpose<perm=[1,0]>(E)  [embed] x = Gather(T, ids)  [lm_head] logits = MatMul(x, E) }"""

# The table decoded as a whole, as a graph has to say it where Gather does not take the codes.
DECODED = """g (int64[B,S] ids, {type}[12,{k}] Q, float[12,{n}] s, {type}[12,{n}] z) => (float[B,S,{k}] x) {{
    E = DequantizeLinear<axis=1, block_size={g}>(Q, s, z)  [embed] x = Gather(E, ids) }}"""
GATHERED = """g (int64[B,S] ids, {type}[12,{k}] Q, float[12,{n}] s, {type}[12,{n}] z) => (float[B,S,{k}] x) {{
    q = Gather(Q, ids)  t = Gather(s, ids)  p = Gather(z, ids)
    [embed] x = DequantizeLinear<axis=2, block_size={g}>(q, t, p) }}"""


def model_of(text: str, features: int = 32, half: bool = False) -> ir.Model:
    text = text.replace("K]", f"{features}]").replace("[K,", f"[{features},")
    return tiny.build(text.replace("float[", "float16[") if half else text, E="normal")


def lower(model: ir.Model, *steps: Pass, **weights: Any) -> tuple[ir.Model, ir.Model, list[Changes]]:
    """(portable, lowered, changes of the steps)."""
    portable = model.clone()
    tiny.compile(portable, [QuantizeWeights(**weights)], [])
    lowered = portable.clone()
    return portable, lowered, tiny.compile(lowered, list(steps), [])


def assert_identical(portable: ir.Model, lowered: ir.Model, samples: list[Any]) -> None:
    for sample in samples:
        for got, wanted in zip(tiny.run(lowered, sample, optimized=True), tiny.run(portable, sample), strict=True):
            np.testing.assert_array_equal(got, wanted)
            assert got.dtype == wanted.dtype


def coded(text: str, features: int, group: int, type: str) -> ir.Model:
    """A model whose codes use the whole range of their type, with zero points anywhere in it."""
    rng, blocks = np.random.default_rng(0), -(-features // group)
    model = tiny.build(text.format(k=features, n=blocks, g=group, type=type))
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[type]
    whole = np.uint8 if type[0] == "u" else np.int8
    filled = {"Q": (12, features), "z": (12, blocks)}
    data = {name: rng.integers(low, high, shape).astype(whole) for name, shape in filled.items()}
    data["s"] = (rng.random((12, blocks)) + 0.1).astype(np.float32)
    for value in list(model.graph.inputs):
        if value.name in data:
            array = data[value.name]
            value.const_value = ir.Tensor(array, dtype=value.dtype, shape=ir.Shape(array.shape), name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("features", [8, 32, 40])
@pytest.mark.parametrize("text", [EMBED, TURNED], ids=["rows", "columns"])
def test_the_operator_gives_what_the_graph_means(
    text: str, features: int, format: str, symmetric: bool, half: bool
) -> None:
    model = model_of(text, features, half)
    portable, lowered, (changes,) = lower(model, LowerEmbedding(), format=format, symmetric=symmetric)
    assert [(changed.site, changed.kernel) for changed in changes.changed] == [("embed", "GatherBlockQuantized")]
    assert tiny.operators(lowered) == ["GatherBlockQuantized"]
    assert [node.name for node in lowered.graph] == ["embed"]
    assert_identical(portable, lowered, tiny.feeds(model, ids=12))


@pytest.mark.parametrize("type", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize(("features", "group"), [(64, 16), (40, 32), (96, 48), (40, 64)])
@pytest.mark.parametrize("text", [DECODED, GATHERED], ids=["table", "rows"])
def test_groups(text: str, features: int, group: int, type: str) -> None:
    if text is GATHERED and type.endswith("4"):
        pytest.skip("Gather takes no 4 bits")
    model = coded(text, features, group, type)
    lowered = model.clone()
    (changes,) = tiny.compile(lowered, [LowerEmbedding()], [])
    assert [changed.site for changed in changes.changed] == ["embed"]
    assert tiny.operators(lowered) == ["GatherBlockQuantized"]
    assert_identical(model, lowered, tiny.feeds(model, ids=12))


def test_codes_that_the_operator_takes_stay_where_they_are() -> None:
    model = coded(DECODED, 64, 16, "int4")
    before = model.graph.initializers["Q"].const_value
    tiny.compile(model, [LowerEmbedding()], [])
    assert model.graph.initializers["Q"].const_value is before


def test_two_embeddings_share_a_table() -> None:
    model = tiny.build(
        """g (int64[B] one, int64[B,S] two, float[12,32] E) => (float[B,32] x, float[B,S,32] y) {
        [first] x = Gather(E, one)  [second] y = Gather(E, two) }""",
        E="normal",
    )
    portable, lowered, (changes,) = lower(model, LowerEmbedding(), format="int8")
    assert len(changes.changed) == 2
    assert sum(constant.size == 12 * 32 for constant in tensors(lowered).values()) == 1
    assert_identical(portable, lowered, tiny.feeds(model, ids=12))


def test_negative_ids_count_from_the_end() -> None:
    model = model_of(EMBED)
    portable, lowered, _ = lower(model, LowerEmbedding())
    assert_identical(portable, lowered, [{"ids": np.array([[-1, -12, 3]], np.int64)}])


# ------------------------------------------------------------------------------------------------- tied to a lm_head


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("features", [32, 40])
@pytest.mark.parametrize("text", [TIED, TIED_TURNED], ids=["rows", "columns"])
def test_tied_to_a_layer(text: str, features: int, symmetric: bool, half: bool, half_precision: bool) -> None:
    """Both read one array; the embedding is the portable one's in every bit."""
    model = model_of(text, features, half)
    steps = LowerWeightOnly(block_size=16, accuracy_level=0, half_precision=half_precision), LowerEmbedding()
    portable, lowered, changes = lower(model, *steps, format="int8", symmetric=symmetric)
    assert {changed.site for changed in changes[0].changed} == {"embed", "lm_head"}
    assert not changes[1].changed
    assert not changes[1].skipped
    large = [constant for constant in tensors(lowered).values() if constant.size >= 12 * features]
    assert [constant.nbytes for constant in large] == [12 * -(-features // 16) * 16]
    for sample in tiny.feeds(model, ids=12):
        (got,), (wanted,) = tiny.run(lowered, sample, optimized=True), tiny.run(portable, sample)
        assert tiny.relative_error(got, wanted) <= (2e-3 if half else 1e-5)
    for graph in (portable, lowered):
        graph.graph.outputs.append(layer_input(graph))
    assert_identical_outputs(portable, lowered, tiny.feeds(model, ids=12), 1)


@pytest.mark.parametrize("type", ["int4", "uint4"])
@pytest.mark.parametrize(("features", "group"), [(64, 16), (40, 32), (96, 48)])
def test_four_bits_tied_to_a_layer(features: int, group: int, type: str) -> None:
    text = DECODED.replace("=> (float[B,S,{k}] x)", "=> (float[B,S,{k}] x, float[B,S,12] logits)").replace(
        "ids) }}", "ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }}"
    )
    model = coded(text, features, group, type)
    lowered = model.clone()
    changes, _ = tiny.compile(lowered, [LowerWeightOnly(accuracy_level=0), LowerEmbedding()], [])
    assert {changed.site for changed in changes.changed} == {"embed", "lm_head"}
    assert "DequantizeLinear" not in tiny.operators(lowered)
    shapes = [(constant.shape.numpy(), constant) for constant in tensors(lowered).values()]
    codes = [constant for shape, constant in shapes if len(shape) == 3 and shape[-1] > 1]
    assert [constant.nbytes for constant in codes] == [
        12 * -(-features // {32: 32}.get(group, 16)) * {32: 16}.get(group, 8)
    ]
    assert_identical_outputs(model, lowered, tiny.feeds(model, ids=12), 0)
    for sample in tiny.feeds(model, ids=12):
        assert tiny.relative_error(tiny.run(lowered, sample)[1], tiny.run(model, sample)[1]) <= 1e-5


def layer_input(model: ir.Model) -> ir.Value:
    """What the embedding gives."""
    return next(value for node in model.graph for value in node.outputs if value.name == "x")


def assert_identical_outputs(portable: ir.Model, lowered: ir.Model, samples: list[Any], index: int) -> None:
    for sample in samples:
        np.testing.assert_array_equal(
            tiny.run(lowered, sample, optimized=True)[index], tiny.run(portable, sample)[index]
        )


# ------------------------------------------------------------------------------------------------- what is not done


@pytest.mark.parametrize("weights", [{"format": "uint8"}, {"format": "int8", "saturation_safe": True}])
def test_a_table_is_not_stored_twice_beside_an_integer_kernel(weights: dict[str, Any]) -> None:
    """The kernel reads the codes as they are: uint8 serves both, and int8 is not copied."""
    model = model_of(TIED)
    rounding = [QuantizeWeights(**weights), QuantizeActivations(format="uint8", symmetric=False)]
    tiny.compile(model, [*rounding, LowerInt8()], tiny.feeds(model, ids=12))
    (changes,) = tiny.compile(model, [LowerEmbedding()], [])
    if weights["format"] == "uint8":
        assert [changed.site for changed in changes.changed] == ["embed"]
    else:
        assert "stored twice" in tiny.reasons(changes)["embed"]
    assert sum(constant.size >= 12 * 32 for constant in tensors(model).values()) == 1


def test_groups_that_the_operator_has_no_block_for() -> None:
    model = coded(DECODED, 64, 8, "int4")
    (changes,) = tiny.compile(model, [LowerEmbedding()], [])
    assert tiny.reasons(changes)["embed"] == "groups of 8 features are no multiple of 16, the operator's least block"


def test_ignored_embeddings_are_left_alone() -> None:
    _, lowered, (changes,) = lower(model_of(EMBED), LowerEmbedding(ignore=("embed",)))
    assert not changes.changed
    assert "GatherBlockQuantized" not in tiny.operators(lowered)


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[B] ids, float[12,8] E) => (float[B,8] x) { x = Gather(E, ids) }",  # float
        "g (int64[B] ids, int8[12,8] E) => (int8[B,8] x) { x = Gather(E, ids) }",  # decoded by nobody
        """g (int64[B] ids, int8[12,8] E, float f) => (float[B,8] x) {
        q = Gather(E, ids)  c = Cast<to=1>(q)  x = Mul(c, f) }""",
        """g (int64[B] ids, int64[B] more, int8[12,8] E, float[12] s, int64[1] a) => (float[B,8] x) {
        q = Gather(E, ids)  c = Cast<to=1>(q)  t = Gather(s, more)  u = Unsqueeze(t, a)  x = Mul(c, u) }""",
    ],
)
def test_what_is_no_quantized_embedding(text: str) -> None:
    known = {"E": np.ones((12, 8), np.int8), "s": np.ones(12, np.float32), "a": np.array([-1])}
    model = tiny.build(text, **{name: data for name, data in known.items() if f"] {name}" in text})
    assert not find_quantized_embeddings(model)
