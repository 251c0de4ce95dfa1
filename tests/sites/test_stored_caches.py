"""Caches are told in the words of the pass that quantized them: by report, inspect, diff and debug alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.diagnosis import debug
from qcompiler.formats.scheme import PerChannel, PerTensor, PerToken, Scheme
from qcompiler.graph.operators import has
from qcompiler.recipes import Recipe
from qcompiler.report import Report
from qcompiler.sites.stored_caches import stored_cache
from tests import decoders

DYNAMIC = Scheme("int8", PerToken(), dynamic=True)
KEYS = Scheme("int8", PerToken(), dynamic=True, normalized=True)
CASES: list[tuple[str, dict[str, Any], Scheme, Scheme]] = [
    ("concat", {}, KEYS, DYNAMIC),
    ("concat", {"normalize": False}, DYNAMIC, DYNAMIC),
    ("concat", {"format": "int4", "symmetric": False},
     Scheme("uint4", PerToken(), False, True, normalized=True), Scheme("uint4", PerToken(), False, True)),
    ("concat", {"key_granularity": "channel", "value_granularity": "tensor"},
     Scheme("int8", PerChannel()), Scheme("int8", PerTensor())),
    ("scatter", {"format": "int4", "value_granularity": "channel"},
     Scheme("int4", PerToken(), dynamic=True, normalized=True), Scheme("int4", PerChannel())),
    ("attention-past", {}, KEYS, DYNAMIC),
    ("fused", {}, Scheme("int8", PerChannel()), Scheme("int8", PerChannel())),
    ("fused", {"format": "int4", "key_granularity": "tensor", "value_granularity": "tensor"},
     Scheme("int4", PerTensor()), Scheme("int4", PerTensor())),
]  # fmt: skip


@pytest.mark.parametrize(("form", "options", "key", "value"), CASES)
def test_four_views_say_the_same(form: str, options: dict[str, Any], key: Scheme, value: Scheme) -> None:
    scatter = form == "scatter"
    model = decoders.build(form, layers=1, opset=24 if scatter else 23, room=8 if scatter else 0)
    samples = [sample | ({"at": np.zeros(2, np.int64)} if scatter else {}) for sample in decoders.calibration(model, 8)]
    recipe = Recipe.from_dict({"name": "caches", "passes": [{"quantize-kv-cache": options}]})
    compiled = qcompiler.compile(model, recipe, calibration=samples, target="portable")

    reported = schemes(compiled.report)
    assert list(reported.values()) == [key, value]
    inputs = {str(item.name): item for item in compiled.model.graph.inputs}
    assert {name: stored_cache(inputs[name]) for name in reported} == reported

    words = {name: str(scheme) for name, scheme in reported.items()}
    assert {site.name: site.scheme for site in compiled.report.sites if site.is_cache} == words
    assert {port.name: port.cache for port in qcompiler.inspect(compiled.model).inputs if port.cache} == words
    stories = [story for story in qcompiler.diff(model, compiled.model).layers if story.kind == "cache"]
    assert {story.after.name: story.after.weight for story in stories if story.after is not None} == words
    found = [
        layer for layer in debug(model, compiled.model, calibration=samples, effect_samples=0).alone if layer.cache
    ]
    assert found
    assert all(layer.cache == words[layer.name] for layer in found)
    assert all(layer.cache_scheme == reported[layer.name] for layer in found)

    again = Report.from_json(compiled.report.to_json())
    assert schemes(again) == reported


def schemes(report: Report) -> dict[str, Scheme]:
    return {site.name: site.cache.scheme.numbers for site in report.sites if site.cache and site.cache.scheme}


def test_floats_have_no_scheme_and_codes_that_nothing_decodes_have_no_grain() -> None:
    model = decoders.build("concat", layers=1, opset=23)
    past = next(value for value in model.graph.inputs if any(has(node, "joins") for node, _ in value.uses()))
    assert stored_cache(past) is None
    past.dtype = ir.DataType.INT8
    assert str(stored_cache(past)) == "int8"
