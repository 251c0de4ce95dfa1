"""The operator table: against ONNX's schemas, ONNX Runtime's registry, qcompiler's own functions, and what runs."""

from __future__ import annotations

import importlib
import pkgutil
import re

import onnx
import onnx.reference
import onnx_ir as ir
import pytest

import qcompiler.functions
from qcompiler.functions.library import FORMATS
from qcompiler.graph.operators import (
    OPERATORS,
    Operator,
    attends,
    continuations,
    gains,
    holds,
    multiplied,
    quantized,
    result,
    weight,
    weights,
)
from qcompiler.graph.operators.functions import DOMAIN
from qcompiler.graph.operators.row import row
from qcompiler.graph.operators.runtime import DOMAIN as RUNTIME
from qcompiler.targets import FOLDER
from qcompiler.targets.kernels import CPU_TABLE, read

TABLES = [read(CPU_TABLE), *(read(path) for path in sorted(FOLDER.glob("kernels-ort-cuda*.json")))]
SIGNATURES = {key: signature for table in TABLES for key, signature in table.signatures.items()}
SCALES = ("scale", "zero_point", "absmax")


def identity(operator: Operator) -> str:
    return f"{operator.domain}::{operator.name}".removeprefix("::")


def rows(domain: str) -> list[Operator]:
    return [operator for operator in OPERATORS.values() if operator.domain == domain]


def node(op_type: str, inputs: int, outputs: int = 1, domain: str = "") -> ir.Node:
    return ir.Node(
        domain, op_type, [ir.Value(name=f"i{index}") for index in range(inputs)],
        outputs=[ir.Value(name=f"o{index}") for index in range(outputs)], name="node",
    )  # fmt: skip


@pytest.mark.parametrize(
    "operator", [row for row in rows("") if row.name != "SimplifiedLayerNormalization"], ids=identity
)
def test_rows_are_as_onnx_has_them(operator: Operator) -> None:
    schema = onnx.defs.get_schema(operator.name, onnx.defs.onnx_opset_version(), "")
    variadic = schema.inputs and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    assert bool(operator.repeated) == bool(variadic)
    if not operator.repeated:
        assert [port.name for port in operator.inputs] == [item.name for item in schema.inputs]
    assert [port.name for port in operator.outputs] == [item.name for item in schema.outputs]


@pytest.mark.parametrize(
    "operator", [row for row in rows(RUNTIME) if (row.domain, row.name) in SIGNATURES], ids=identity
)
def test_rows_are_as_onnx_runtime_has_them(operator: Operator) -> None:
    signature = SIGNATURES[operator.domain, operator.name]
    given = [name for name, _ in signature.inputs]
    if operator.repeated:
        assert [port.name for port in operator.inputs] == given[:-1]
    else:
        assert [port.name for port in operator.inputs] == given
    assert [port.name for port in operator.outputs] == [name for name, _ in signature.outputs]


def test_rows_without_a_signature_are_few() -> None:
    """SimplifiedLayerNormalization is registered in the standard domain; the others are halves of pairs."""
    unknown = {row.name for row in rows(RUNTIME) if (row.domain, row.name) not in SIGNATURES}
    assert unknown <= {"SimplifiedLayerNormalization", "DequantizeLinear", "DequantizeWithOrder"}


def test_every_operator_of_the_runtime_that_takes_scales_has_a_row() -> None:
    """A float operator with a parameter of such a name (a norm's scale) is told by the exceptions."""
    floats = {
        "BranchwiseRMSNorm",
        "EngramGate",
        "GatedRMSNorm",
        "LinearAttentionGate",
        "ScaledSiLU",
        "SparsePagedAttention",
    }
    coded = {
        key
        for key, signature in SIGNATURES.items()
        if key[0] == RUNTIME and any(word in name.lower() for name, _ in signature.inputs for word in SCALES)
    }
    assert {name for domain, name in coded if (domain, name) not in OPERATORS} <= floats


# Parameters that are called a scale and are not that of an operand: second levels, products inside of attention, gains,
# and activations that no kernel takes as codes.
OTHER_SCALES = re.compile(
    r"scale_(Q|K|V|QKT|qkv|global)_\w+|weight_scale_2|(input|a|fc\d_(global|act|act_block))_scale|[Ss]cale"
)
ROLES = {
    r"\w*(scale|absmax)\w*": "scale", r"\w*zero_point\w*": "zero", r"attn_mask|mask_index|attention_bias": "mask",
    r"gamma\w*|\w*norm_weight": "gain", r"beta\w*": "shift", r"\w*bias": "bias", r"past(_key|_value)?": "past",
    r"(key|value)_cache": "past", r"present\w*|\w+_cache_out|new_\w+_cache": "present", r"cos_cache|sin_cache": "angle",
    r"indices|position_ids|input_ids|block_table|slot_mapping": "index",
    r"mean|Mean|inv_std_var|InvStdDev": "statistic", r"axes|shape|starts|ends|repeats|\w*lens?|\w*length": "setting",
    r"W|\w*weights?|\w+_embedding(_quant)?": "weight",
}  # fmt: skip
"""By what operators call an input or output: the first pattern that fits."""
EXCEPTIONS = {
    ("Shape", "shape"), ("EmbedLayerNormalization", "mask_index"), ("QMoE", "router_weights"),
    ("DequantizeBinary", "W"),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=identity)
def test_roles_are_those_of_the_names(operator: Operator) -> None:
    for slot in (*operator.inputs, *operator.outputs, *operator.repeated):
        if (operator.name, slot.name) in EXCEPTIONS or (OTHER_SCALES.fullmatch(slot.name) and slot.role != "scale"):
            continue
        role = next((role for names, role in ROLES.items() if re.fullmatch(names, slot.name)), None)
        assert role is None or slot.role == role, slot.name


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=identity)
def test_traits_are_those_of_the_names(operator: Operator) -> None:
    name, has_trait = operator.name, operator.traits.__contains__
    assert has_trait("convolution") == ("Conv" in name)
    assert has_trait("product") == (re.search("MatMul|Gemm|Conv|Einsum", name) is not None and name != "DeformConv")
    assert has_trait("bilinear") == (name in ("Mul", "MatMul", "FusedMatMul"))
    assert has_trait("attention") == name.endswith(("Attention", "SelfAttention"))
    assert has_trait("norm") == (name.endswith("Normalization") and not name.startswith(("Embed", "Q")))
    assert has_trait("decodes") == name.startswith("Dequantize")
    makes_codes = re.fullmatch("(Dynamic)?Quantize(?!MatMul|LSTM).*", name) is not None
    assert has_trait("quantizes") == makes_codes
    assert has_trait("cache") == (operator.domain == DOMAIN and ("Cache" in name or "Int4" in name))
    assert has_trait("rounds") == (name in ("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits"))
    assert has_trait("reduction") == name.startswith("Reduce")
    assert has_trait("typed") == (operator.domain == DOMAIN and (has_trait("decodes") or name == "UnpackInt4"))
    if has_trait("decodes"):
        assert operator.inputs[0].role == "code"
    if makes_codes:
        assert operator.outputs[0].role == "code"
    if has_trait("convolution"):
        assert has_trait("rows")


def test_every_function_of_ours_has_a_row() -> None:
    names = set(FORMATS)
    for module in pkgutil.iter_modules(qcompiler.functions.__path__):
        found = importlib.import_module(f"qcompiler.functions.{module.name}")
        names |= set(getattr(found, "_SCRIPTS", ()))
        names |= {getattr(found, name) for name in ("SPLIT",) if hasattr(found, name)}
    from qcompiler.functions import binary

    assert names | {binary.DEQUANTIZE, binary.UNPACK} == {row.name for row in rows(DOMAIN)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (("x:nothing", "y", ""), "x:nothing"),
        (("x", "y", "sings"), "sings"),
        (("x s:scale(z)", "y", ""), "belongs to z"),
        (("x:scale(", "y", ""), "no input"),
    ],
)
def test_a_row_that_is_none_is_refused(text: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        row("", "Odd", *text)


# -------------------------------------------------------------------------------------------------- operands


@pytest.mark.parametrize(
    ("key", "inputs", "expected"),
    [
        # name, codes, scale, zero point of each quantized operand: what the operators' documentation says
        (("", "DequantizeLinear"), 3, [("x", 0, 1, 2)]),
        (("", "QLinearMatMul"), 8, [("a", 0, 1, 2), ("b", 3, 4, 5), ("y", "0", 6, 7)]),
        (("", "QLinearConv"), 9, [("x", 0, 1, 2), ("w", 3, 4, 5), ("y", "0", 6, 7)]),
        (("", "MatMulInteger"), 4, [("A", 0, None, 2), ("B", 1, None, 3)]),
        (("", "DynamicQuantizeLinear"), 1, [("y", "0", "1", "2")]),
        ((RUNTIME, "MatMulIntegerToFloat"), 7, [("A", 0, 2, 4), ("B", 1, 3, 5)]),
        ((RUNTIME, "DynamicQuantizeMatMul"), 5, [("B", 1, 2, 3)]),
        ((RUNTIME, "MatMulNBits"), 6, [("B", 1, 2, 3)]),
        ((RUNTIME, "MatMulBnb4"), 3, [("B", 1, 2, None)]),
        ((RUNTIME, "GatherBlockQuantized"), 4, [("data", 0, 2, 3)]),
        ((RUNTIME, "QGemm"), 9, [("A", 0, 1, 2), ("B", 3, 4, 5), ("Y", "0", 7, 8)]),
        ((RUNTIME, "QAttention"), 9, [("input", 0, 3, 6), ("weight", 1, 4, 7)]),
        ((RUNTIME, "QLinearAdd"), 8, [("A", 0, 1, 2), ("B", 3, 4, 5), ("C", "0", 6, 7)]),
        ((RUNTIME, "QLinearWhere"), 9, [("X", 1, 2, 3), ("Y", 4, 5, 6), ("Z", "0", 7, 8)]),
        ((RUNTIME, "QLinearConcat"), 8, [("input", 2, 3, 4), ("input", 5, 6, 7), ("Y", "0", 0, 1)]),
        ((RUNTIME, "GroupQueryAttention"), 14, [("past_key", 3, 12, None), ("past_value", 4, 13, None)]),
        ((DOMAIN, "DynamicQuantizePerToken"), 1, [("codes", "0", "1", None)]),
        ((DOMAIN, "DequantizeCache"), 2, [("codes", 0, 1, None)]),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_where_scales_and_zero_points_are(
    key: tuple[str, str], inputs: int, expected: list[tuple[object, ...]]
) -> None:
    """Numbers are inputs; texts are outputs."""
    domain, name = key
    found = [
        (item.name, *(None if place is None else str(place.index) if place.output else place.index
                      for place in (item.codes, item.scale, item.zero_point)))
        for item in quantized(node(name, inputs, domain=domain))
    ]  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("domain", "name", "of_weight", "of_data", "of_result"),
    [
        ("", "QLinearMatMul", 3, 0, 0),
        ("", "ConvInteger", 1, 0, None),
        (RUNTIME, "QGemm", 3, 0, 0),
        (RUNTIME, "MatMulNBits", 1, None, None),
        (RUNTIME, "DynamicQuantizeMatMul", 1, None, None),
        (RUNTIME, "QLinearAdd", None, None, 0),  # it has no weight, so nothing is multiplied by one
        ("", "MatMul", None, None, None),
        ("", "DequantizeLinear", None, None, None),
        ("", "Nothing", None, None, None),
    ],
)
def test_weight_activation_and_result(
    domain: str, name: str, of_weight: int | None, of_data: int | None, of_result: int | None
) -> None:
    one = node(name, 9, domain=domain)
    found = [None if item is None else item.codes.index for item in (weight(one), multiplied(one), result(one))]
    assert found == [of_weight, of_data, of_result]


def test_places_beyond_what_a_node_has_are_none() -> None:
    kernel = node("MatMulNBits", 3, domain=RUNTIME)
    (operand,) = quantized(kernel)
    assert operand.zero_point is not None
    assert operand.zero_point.of(kernel) is None


@pytest.mark.parametrize(
    ("domain", "name", "inputs", "expected"),
    [
        ("", "MatMul", 2, (1,)),
        ("", "LSTM", 4, (1, 2)),
        ("", "Einsum", 3, (0, 1, 2)),
        (RUNTIME, "DecoderAttention", 12, (2, 3)),
        (RUNTIME, "EmbedLayerNormalization", 7, (2, 3, 4)),
        (RUNTIME, "MoE", 8, (2, 4, 6)),
        ("", "Gather", 2, ()),
        ("", "Nothing", 2, ()),
    ],
)
def test_weights(domain: str, name: str, inputs: int, expected: tuple[int, ...]) -> None:
    assert weights(node(name, inputs, domain=domain)) == expected


@pytest.mark.parametrize(
    ("domain", "name", "expected"),
    [
        ("", "LayerNormalization", (1, 2)),
        ("", "RMSNormalization", (1,)),
        ("", "SimplifiedLayerNormalization", (1,)),
        (RUNTIME, "SkipLayerNormalization", (2, 3)),
        (RUNTIME, "SkipSimplifiedLayerNormalization", (2,)),
    ],
)
def test_gains(domain: str, name: str, expected: tuple[int, ...]) -> None:
    assert gains(node(name, 5, domain=domain)) == expected


@pytest.mark.parametrize(
    ("domain", "name", "expected", "roles"),
    [
        ("", "Concat", {0: 0}, (None, None)),
        ("", "TensorScatter", {0: 0}, (None, None)),
        ("", "Attention", {4: 1, 5: 2}, ("key", "value")),
        (RUNTIME, "Attention", {4: 1}, (None, None)),
        (RUNTIME, "GroupQueryAttention", {3: 1, 4: 2}, ("key", "value")),
        (RUNTIME, "MultiHeadAttention", {6: 1, 7: 2}, ("key", "value")),
        (RUNTIME, "PagedAttention", {3: 1, 4: 2}, ("key", "value")),
        ("", "MatMul", {}, (None, None)),
        ("other", "FlashAttention", {}, ("key", "value")),  # not known: by the order that all have
    ],
)
def test_pasts_and_presents(
    domain: str, name: str, expected: dict[int, int], roles: tuple[str | None, str | None]
) -> None:
    one = node(name, 12, 3, domain)
    assert continuations(one) == expected
    assert (holds(one, 1), holds(one, 2)) == roles
    if len(expected) == 2:
        assert [holds(one, past) for past in expected] == ["key", "value"]
    assert attends(one) == name.endswith("Attention")
