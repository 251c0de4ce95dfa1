"""The diff tells of every recipe's output, for every target, what the report of the compilation says."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.calibration.samples import from_python
from qcompiler.driver.compiled import Compiled
from qcompiler.formats.scheme import Scheme
from qcompiler.model_diff import LayerStory, diff
from qcompiler.recipes import recipe_names
from qcompiler.report import SiteReport
from tests import decoders, tiny
from tests.oracles.difference import sqnr_db
from tests.there import held, there

BLOCK = """
  p{n} = Pow(x{n}, two)  m{n} = ReduceMean<keepdims=1>(p{n}, last)  e{n} = Add(m{n}, tiny)  r{n} = Sqrt(e{n})
  i{n} = Div(x{n}, r{n})  ["/model/layers.{n}/norm/Mul"] n{n} = Mul(i{n}, G{n})
  ["/model/layers.{n}/mlp/gate_proj/MatMul"] g{n} = MatMul(n{n}, gate{n})  s{n} = Sigmoid(g{n})  a{n} = Mul(g{n}, s{n})
  ["/model/layers.{n}/mlp/up_proj/MatMul"] u{n} = MatMul(n{n}, up{n})  h{n} = Mul(a{n}, u{n})
  ["/model/layers.{n}/mlp/down_proj/MatMul"] d{n} = MatMul(h{n}, down{n})  x{m} = Add(x{n}, d{n})"""
BLOCKS = 3
GRID = 4
OTHERS = {
    "ort-cuda": ("int8-dynamic-tensor", "int8-weights", "rtn-w4", "nf4", "fp8", "fp8-tensor", "llm-int8", "kv-int8"),
    "tensorrt": ("int8-static", "smoothquant-o3", "rtn-w4"),
}
SAME_KERNELS = ("awq-gptq-w4", "gptq-w4-act-order", "gptq-w4-kv8", "gptq-w3")  # as gptq-w4 and awq-w4
CASES = [("portable", recipe) for recipe in recipe_names()]
CASES += [("ort-cpu", recipe) for recipe in recipe_names() if recipe not in SAME_KERNELS]
CASES += [(target, recipe) for target, recipes in OTHERS.items() for recipe in recipes]
CACHES = tuple(name for name in recipe_names() if name.startswith("kv-"))

DOWN = "model.layers.1.mlp.down_proj"
STORIES = {  # of that layer, where no other test tells one
    ("portable", "awq-gptq-w4"): "MatMul int4 group(128) symmetric, gptq; "
                                 "input scaled by awq into model.layers.1.mlp.up_proj",
    ("portable", "binary"): "MatMul binary per-channel symmetric, activations int8 per-token symmetric dynamic, "
                            "quantize-weights",
    ("portable", "fp8"): "MatMul fp8_e4m3 per-channel symmetric, activations fp8_e4m3 per-token symmetric dynamic, fp8",
    ("portable", "fp8-tensor"): "MatMul fp8_e4m3 per-tensor symmetric, activations fp8_e4m3 per-tensor symmetric, fp8",
    ("portable", "gptq-w3"): "MatMul int3 group(128) symmetric, gptq",
    ("portable", "nf4"): "MatMul nf4 group(64) symmetric, scales int8 per-tensor, nf4",
    ("portable", "w4a8"): "MatMul int4 group(128) symmetric, activations int8 per-token symmetric dynamic, gptq",
    ("ort-cpu", "gptq-w2"): "MatMulNBits int2 group(128) symmetric, activations int8 group(128) symmetric dynamic, "
                            "gptq; computed in 8-bit integers",
    ("ort-cpu", "hqq-w4"): "MatMulNBits uint4 group(128) asymmetric, activations int8 group(128) symmetric dynamic, "
                            "hqq; computed in 8-bit integers",
    ("ort-cpu", "int8-dynamic-tensor"): "DynamicQuantizeMatMul int8 per-channel symmetric, "
                                        "activations uint8 per-tensor asymmetric dynamic, "
                            "quantize-weights",
    ("ort-cpu", "w4a8"): "MatMulNBits int4 group(128) symmetric, activations int8 group(128) symmetric dynamic, "
                            "gptq; computed in 8-bit integers",
    ("ort-cpu", "w8"): "MatMulNBits int8 group(128) symmetric, activations int8 group(128) symmetric dynamic, "
                            "quantize-weights; computed in 8-bit integers",
    ("ort-cuda", "int8-dynamic-tensor"): "MatMulInteger int8 per-channel symmetric, "
                                         "activations uint8 per-tensor asymmetric dynamic, "
                            "quantize-weights",
    ("tensorrt", "smoothquant-o3"): "MatMul int8 per-channel symmetric, activations int8 per-tensor symmetric, "
                                    "quantize-weights; input scaled by smooth-quant into model.layers.1.mlp.up_proj",
}  # fmt: skip


@cache
def decoder() -> ir.Model:
    """Three gated blocks between a table and its transpose: what recipes treat apart is there."""
    weights = {f"{name}{n}": shape for n in range(BLOCKS)
               for name, shape in {"G": "64", "gate": "64,256", "up": "64,256", "down": "256,64"}.items()}  # fmt: skip
    constants = ["float[40,64] E", "float two", "float tiny", "int64[1] last"]
    constants += [f"float[{shape}] {name}" for name, shape in weights.items()]
    body = "".join(BLOCK.format(n=n, m=n + 1) for n in range(BLOCKS))
    return tiny.build(
        f"""g (int64[B,S] input_ids, {", ".join(constants)}) => (float[B,S,40] logits) {{
  ["/model/embed_tokens/Gather"] x0 = Gather(E, input_ids) {body}
  T = Transpose<perm=[1,0]>(E)  ["/lm_head/MatMul"] logits = MatMul(x{BLOCKS}, T) }}""",
        E="normal", two=np.float32(2), tiny=np.float32(1e-6), last=[-1],
        **{name: "outliers" if name[0] == "G" else "normal" for name in weights},
    )  # fmt: skip


def compiled(model: ir.Model, recipe: str, target: str) -> Compiled:
    samples = decoders.calibration(model) if "x" in {value.name for value in model.graph.inputs} else None
    options = [f"awq.grid={GRID}"] if "awq" in recipe else []
    return qcompiler.compile(
        model, recipe, target=target, calibration=samples or tiny.feeds(model, count=2, ids=40), options=options
    )


def assert_form(story: LayerStory, site: SiteReport) -> None:
    """The scheme that the pass reported is what the graph shows, as data and in words."""
    reported = site.cache.scheme if site.cache is not None else site.weight
    after = there(story.after)
    assert (after.scheme, after.activation_scheme) == (_numbers(reported), _numbers(site.activation))
    assert ", ".join(filter(None, (after.weight, after.activations))) == site.scheme


def _numbers(scheme: Scheme | None) -> Scheme | None:
    return scheme.numbers if scheme is not None else None


def assert_bytes(story: LayerStory) -> None:
    """Codes as wide as they are stored, scales and zero points: never as much as the float weight."""
    before, after = there(story.before), there(story.after)
    bits = there(after.scheme).number_format.bits
    numbers = after.shape[0] * after.shape[1]
    assert numbers * bits // 8 <= after.bytes < before.bytes
    assert before.bytes == numbers * 4


@pytest.mark.parametrize(("target", "recipe"), CASES)
def test_stories_say_what_the_report_says(target: str, recipe: str) -> None:
    model = decoders.build(layers=2) if recipe in CACHES else decoder()
    result = compiled(model, recipe, target)
    found = diff(model, result.model)
    told = {story.module_path: story for story in found.layers}
    assert len(told) == len(found.layers)
    sites = {site.module_path: site for site in result.report.sites}
    assert set(sites) <= set(told)
    assert "quantized" in {site.status for site in sites.values()}
    scaled = set()
    for path, story in told.items():
        site = sites.get(path)
        if target == "tensorrt" and story.fate == "changed":  # rounded, and stored as numbers again
            assert there(story.after).weight == "float32"
            assert path in ("model.embed_tokens", "lm_head")
            continue
        if site is None or site.status != "quantized":
            assert story.fate in ("untouched", "scaled")
            assert (story.method, there(story.after).weight) == ("", there(story.before).weight)
            continue
        assert story.fate == "quantized"
        assert story.method == site.pass_name
        if story.kind == "cache":
            assert_form(story, site)
            assert there(story.after).bytes < there(story.before).bytes / 2
            continue
        assert_form(story, site)
        assert_bytes(story)
        assert 0 < there(story.weight_error) < (1.5 if recipe in ("binary", "gptq-w2") else 0.8)
        into = {name for text in site.details.values() for name in re.findall(r"folded into ([\w.]+)", text)}
        assert {note.rsplit(" into ", 1)[1] for note in story.notes if note.startswith("input scaled by")} == into
        scaled |= into
        columns = {text for note in story.notes for text in re.findall(r"(\d+) outlier columns? stay", note)}
        assert columns == {text for line in site.details.values() for text in re.findall(r"^(\d+) .*column", line)}
    assert {move.into for move in found.scales} == scaled
    assert bool(scaled) == recipe.startswith(("smoothquant", "awq"))
    if (target, recipe) in STORIES:
        assert told[DOWN].text == f"{DOWN}: MatMul float32 256×64 → {STORIES[target, recipe]}"


def test_outlier_columns_in_half_precision() -> None:
    samples = tiny.feeds(decoder(), count=2, ids=40)
    half = qcompiler.compile(decoder(), "llm-int8", target="ort-cuda", dtype="fp16", calibration=samples).model
    split = [story for story in diff(decoder(), half).layers if any("outlier column" in note for note in story.notes)]
    assert len(split) > 3
    for story in split:
        assert re.fullmatch(r"\d+ outlier columns? stays? float", story.notes[-1])
        assert there(story.weight_error) < 0.02


@pytest.mark.parametrize(("target", "recipe"), [("ort-cpu", "llm-int8"), ("ort-cuda", "int8-dynamic-tensor")])
def test_what_is_measured_of_a_layer_is_its_whole_output(target: str, recipe: str) -> None:
    """Also where several kernels compute it: the sum with the outlier columns, and no sums of codes."""
    model, samples = decoder(), tiny.feeds(decoder(), count=2, ids=40)
    quantized = compiled(model, recipe, target).model
    found = diff(model, quantized, calibration=from_python(samples, model=model))
    told = {story.module_path: story for story in found.layers}
    if recipe == "llm-int8":
        assert any("stay float" in note for note in told["model.layers.1.mlp.up_proj"].notes)
    for path, value in (("model.layers.1.mlp.up_proj", "u1"), (DOWN, "d1")):
        pairs = [[_value_of(graph, value, feeds) for graph in (model, quantized)] for feeds in samples]
        expected, got = (np.concatenate([array.reshape(-1, array.shape[-1]) for array in side])
                         for side in zip(*pairs, strict=True))  # fmt: skip
        assert there(told[path].measures).sqnr_db == pytest.approx(sqnr_db(expected, got), abs=0.05)


def _value_of(model: ir.Model, name: str, feeds: tiny.Feeds) -> np.ndarray:
    copy = model.clone()
    value = next(value for node in copy.graph for value in node.outputs if value.name == name)
    copy.graph.outputs[:] = [value]
    return tiny.run(copy, feeds)[0].astype(np.float64)


def test_another_gain_alone_is_no_moved_scale() -> None:
    model = decoder()
    other = model.clone()
    gain = other.graph.initializers["G1"]
    gain.const_value = ir.tensor(held(gain) * 3, name="G1")
    found = diff(model, other)
    assert not found.scales
    assert {story.fate for story in found.layers} == {"untouched"}
    assert ("scaled", "Mul", 1) in {(fate.fate, fate.op, fate.count) for fate in found.fates}
