"""The cache that GroupQueryAttention keeps in few bits, against a float64 oracle, and what the operator refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from passes.quantize_kv_cache import QuantizeKvCache
from qcompiler.formats.scheme import PerChannel, Scheme
from qcompiler.recipes import Recipe, Step
from qcompiler.rewriting.cache_storage import Storage
from qcompiler.rewriting.fused_cache import refusal
from qcompiler.sessions.decoder import Decoder
from qcompiler.sites.caches import Cache, find_caches
from qcompiler.statistics import HeadRange, StatisticsStore
from tests import tiny
from tests.oracles.grouped_query_attention import Row, packed, rotate
from tests.there import dims, operand, there

HEADS, KV_HEADS, SIZE, SCALE, LONGEST = 4, 2, 16, 0.25, 64


def angles() -> tuple[np.ndarray, np.ndarray]:
    turned = np.arange(LONGEST)[:, None] / 10.0 ** (np.arange(SIZE // 2) / 4)
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


def build(rotary: bool = False, bias: bool = False) -> ir.Model:
    """GroupQueryAttention over float caches, as the builder of onnxruntime-genai writes it."""
    more = ", float[64,8] cos, float[64,8] sin" if rotary else ""
    more += ", float[1,1,1,1] bias" if bias else ""
    inputs = "q, k, v, past_key, past_value, seqlens, total"
    inputs += (", cos, sin" if rotary else ", , ") + (", , bias" if bias else "")
    constants: dict[str, Any] = {"ones": np.array([1]), "bias": "normal"}
    constants |= dict(zip(("cos", "sin"), angles(), strict=True))
    return tiny.build(
        f"""layer (float[B,S,64] q, float[B,S,32] k, float[B,S,32] v, int64[B,T] attention_mask,
            float[B,2,Q,16] past_key, float[B,2,Q,16] past_value, int64[1] ones{more})
            => (float[B,S,64] y, float[B,2,T,16] present_key, float[B,2,T,16] present_value) {{
        counts = ReduceSum <keepdims = 0> (attention_mask, ones)
        last = Sub (counts, ones)
        seqlens = Cast <to = 6> (last)
        length = Shape <start = 1, end = 2> (attention_mask)
        number = Squeeze (length)
        total = Cast <to = 6> (number)
        [attention] y, present_key, present_value = com.microsoft.GroupQueryAttention
            <num_heads = 4, kv_num_heads = 2, scale = 0.25, do_rotary = {int(rotary)}> ({inputs.rstrip(", ")})
        }}""",
        **constants,
    )


def quantized(model: ir.Model, options: dict[str, Any]) -> tuple[ir.Model, list[np.ndarray]]:
    """The model with its cache quantized, and the ranges [KV_HEADS, SIZE] that were said to be measured."""
    rng = np.random.default_rng(5)
    store, ranges = StatisticsStore(), []
    for role in ("key", "value"):
        statistic = HeadRange()
        statistic.update((rng.normal(size=(1, KV_HEADS, 40, SIZE)) * (1 + np.arange(SIZE))).astype(np.float32) / 4)
        store.put(f"present_{role}", statistic)
        ranges.append(np.maximum(-statistic.result()[0], statistic.result()[1]))
    changes = QuantizeKvCache(**options).apply(model, store)
    assert [changed.site for changed in changes.changed] == ["past_key", "past_value"]
    tiny.check(model)
    return model, ranges


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_against_the_oracle(format: str, granularity: str, rotary: bool) -> None:
    options = {"format": format, "key_granularity": granularity, "value_granularity": granularity, "widen": False}
    model, ranges = quantized(build(rotary), options)
    bits, divisor = (8, 127.0) if format == "int8" else (4, 7.5)
    k_scale, v_scale = (
        (peak.max().reshape(1) if granularity == "tensor" else peak[:, None]).astype(np.float32) / np.float32(divisor)
        for peak in ranges
    )
    cos, sin = (table.astype(np.float64) for table in angles())
    session = tiny.session(model, optimized=True)
    width = SIZE // 2 if bits == 4 else SIZE
    dtype = np.uint8 if bits == 4 else np.int8
    rng = np.random.default_rng(6)
    mask = np.ones((2, 16), np.int64)
    mask[1, 5:8] = 0  # the second row is shorter: padded on the right in the prompt
    oracle = [Row(bits, k_scale, v_scale, SCALE) for _ in range(2)]
    past = {f"past_{role}": np.zeros((2, KV_HEADS, 0, width), dtype) for role in ("key", "value")}
    start = 0
    for count in (8, 1, 1, 1, 1, 1, 1, 1, 1):
        end = start + count
        new = {name: rng.normal(size=(2, count, size)).astype(np.float32)
               for name, size in (("q", HEADS * SIZE), ("k", KV_HEADS * SIZE), ("v", KV_HEADS * SIZE))}  # fmt: skip
        y, key, value = session.run(None, {**new, **past, "attention_mask": mask[:, :end]})
        past = {"past_key": key, "past_value": value}
        for index, row in enumerate(oracle):
            real = mask[index, start:end] != 0
            q, k, v = (new[name][index].reshape(count, -1, SIZE).swapaxes(0, 1)[:, real].astype(np.float64)
                       for name in "qkv")  # fmt: skip
            before = 0 if row.codes is None else row.codes[0].shape[1]
            if rotary:
                places = before + np.arange(real.sum())
                q, k = rotate(q, places, cos, sin), rotate(k, places, cos, sin)
            wanted = row.step(q, k, v)
            got = y[index].reshape(count, HEADS, SIZE).swapaxes(0, 1)[:, real]
            assert row.codes is not None
            stored = [packed(codes) if bits == 4 else codes for codes in row.codes]
            same = [np.mean(array[index, :, : codes.shape[1]] == codes)
                    for array, codes in zip((key, value), stored, strict=True)]  # fmt: skip
            assert min(same) == 1.0 if not rotary else min(same) > 0.99  # a rotated number may lie on an edge
            assert tiny.relative_error(got, wanted) < (2e-6 if min(same) == 1.0 else 2e-2)
        start = end


def test_what_is_written_down() -> None:
    model, _ = quantized(build(), {"format": "int4", "value_granularity": "tensor"})
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert node.attributes["k_quant_type"].value == "PER_CHANNEL"
    assert node.attributes["v_quant_type"].value == "PER_TENSOR"
    assert node.attributes["kv_cache_bit_width"].value == 4
    assert [dims(operand(node, index)) for index in (12, 13)] == [[KV_HEADS, 1, SIZE], [1]]
    for value in (operand(node, 3), operand(node, 4), *node.outputs[1:]):
        assert value.dtype == ir.DataType.UINT8
        assert dims(value)[-1] == SIZE // 2


def refused(model: ir.Model, **options: Any) -> str:
    changes = QuantizeKvCache(**options).apply(model, StatisticsStore())
    assert not changes.changed
    assert {skipped.site for skipped in changes.skipped} <= {"past_key", "past_value"}
    return changes.skipped[0].reason


def test_what_the_operator_does_not_do() -> None:
    assert "per token" in refused(build(), key_granularity="token")
    assert "one is left out" in refused(build(), targets=("past_key",))
    assert refused(build(bias=True)) == (
        "GroupQueryAttention adds a bias to its scores, which it does with a float cache only"
    )
    sinks = build()
    (attention,) = (node for node in sinks.graph if node.op_type == "GroupQueryAttention")
    attention.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    assert (
        refused(sinks) == "GroupQueryAttention has sinks (a smooth Softmax), which was not tried with a quantized cache"
    )
    twice = build()
    (attention,) = (node for node in twice.graph if node.op_type == "GroupQueryAttention")
    attention.resize_inputs(14)
    attention.replace_input_with(12, twice.graph.inputs[0])
    assert refused(twice) == "its cache is quantized already"


def test_four_bits_are_stored_in_pairs_of_one_type() -> None:
    model = build()
    key, value = (site for site in find_caches(model) if isinstance(site, Cache))
    eight, four = (Storage(Scheme(format, PerChannel())) for format in ("int8", "int4"))
    assert refusal((key, four), (value, four)) == ""
    assert refusal((key, four), (value, eight)) == "GroupQueryAttention keeps keys and values in one type"
    odd = replace(key, head_size=15), replace(value, head_size=15)
    assert refusal((odd[0], four), (odd[1], four)) == "its heads have 15 numbers, and two of them share a byte"


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["genai", "dynamo-past"])
def test_the_demo_model(variant: str, format: str) -> None:
    fuse = (Step(name="fuse-attention"),) if variant != "genai" else ()
    recipe = Recipe(name="kv", passes=(*fuse, Step(name="quantize-kv-cache", options={"format": format})))
    compiled = qcompiler.compile(
        model_path(variant), recipe, target="ort-cpu", calibration=str(CHECKPOINT / "calibration.txt"),
        tokenizer=CHECKPOINT / "tokenizer.json", samples=6, sequence_length=64,
    )  # fmt: skip
    assert compiled.report.outputs["logits"]["sqnr_db"] > (40 if format == "int8" else 20)
    pasts = [value for value in compiled.model.graph.inputs if there(value.name).startswith("past")]
    assert {value.dtype for value in pasts} == {ir.DataType.INT8 if format == "int8" else ir.DataType.UINT8}
    assert {dims(value)[-1] for value in pasts} == {32 if format == "int8" else 16}


@pytest.mark.parametrize("recipe", ["kv-int8-fused", "kv-int4-fused"])
def test_a_thousand_steps_do_not_drift(recipe: str, tmp_path: Path) -> None:
    """Token by token, each from what the steps before stored, gives what reading all from scratch gives."""
    compiled = qcompiler.compile(
        model_path("dynamo-past"), recipe, calibration=str(CHECKPOINT / "calibration.txt"),
        tokenizer=CHECKPOINT / "tokenizer.json", samples=8, sequence_length=256,
    )  # fmt: skip
    compiled.save(tmp_path / "out")
    ids = np.random.default_rng(3).integers(0, 3072, 1000)
    decoder = Decoder(tmp_path / "out", threads=1)
    once = decoder.read(ids, prefill=1000, chunk=1)
    stepwise = decoder.read(ids, prefill=1, chunk=1)
    np.testing.assert_allclose(stepwise, once, rtol=0, atol=1e-4 * np.abs(once).max())


@pytest.mark.parametrize(("attributes", "widened"), [
    ("do_rotary = 1, rotary_embedding_dim = 4", HeadRange(heads_axis=1, pairs="half", rotary_dim=4)),
    ("do_rotary = 1, rotary_interleaved = 1", HeadRange(heads_axis=1, pairs="interleaved", rotary_dim=0)),
    ("do_rotary = 0, rotary_embedding_dim = 4", HeadRange(heads_axis=1)),
])  # fmt: skip
def test_the_operator_says_which_channels_it_rotates(attributes: str, widened: HeadRange) -> None:
    """Pairs of rotated channels share a range, as positions turn one into the other; others keep their own."""
    model = build(rotary=True)
    (attention,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    for pair in attributes.split(", "):
        name, number = pair.split(" = ")
        attention.attributes[name] = ir.AttrInt64(name, int(number))
    taps = {tap.value: tap.statistic for tap in QuantizeKvCache().taps(model)}
    assert taps["present_key"].key == widened.key
    assert taps["present_value"].key == HeadRange(heads_axis=1).key
