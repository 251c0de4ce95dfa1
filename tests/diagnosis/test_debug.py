"""`debug`: a layer that was damaged on purpose comes first, in both orders, in models of ours and of other tools."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml

import qcompiler
from qcompiler.cli import app as cli
from qcompiler.diagnosis import debug
from qcompiler.diagnosis.advice import advise
from qcompiler.diagnosis.channels import Outliers, Rescaling
from qcompiler.diagnosis.report import LayerDiagnosis
from qcompiler.errors import DataError, ModelError
from qcompiler.formats.scheme import PerGroup, PerTensor, PerToken, Scheme
from qcompiler.graph import files as model_io
from qcompiler.recipes import Recipe
from qcompiler.sessions import segments
from tests import decoders, tiny
from tests.oracles.difference import sqnr_db
from tests.there import held, there

Compilations = Callable[[str, str], ir.Model]
WIDTH, LAYERS, DAMAGED = 32, 12, 5


def chain(layers: int = LAYERS, gain: bool = False) -> ir.Model:
    """A residual stream x + relu(x W + b), `layers` times; with `gain` layers read a norm with a loud channel."""
    body, stream, constants = [], "x", {}
    rng = np.random.default_rng(0)
    for i in range(layers):
        source = stream
        if gain:
            body.append(f"n{i} = LayerNormalization<axis=-1>({stream}, g{i}, z{i})")
            constants[f"g{i}"] = np.where(np.arange(WIDTH) == 5, 40, 1).astype(np.float32)
            constants[f"z{i}"] = np.zeros(WIDTH, np.float32)
            source = f"n{i}"
        body.append(f"p{i} = MatMul({source}, w{i}) y{i} = Add(p{i}, b{i}) r{i} = Relu(y{i})")
        body.append(f"s{i} = Add({stream}, r{i})")
        constants[f"w{i}"] = (rng.normal(size=(WIDTH, WIDTH)) / 3 / np.sqrt(WIDTH)).astype(np.float32)
        constants[f"b{i}"] = (0.1 * rng.normal(size=WIDTH)).astype(np.float32)
        stream = f"s{i}"
    inputs = [f"float{list(array.shape)} {name}" for name, array in constants.items()]
    body.append(f"out = Neg({stream})")
    ports = f"(float[B,S,{WIDTH}] x, {', '.join(inputs)}) => (float[B,S,{WIDTH}] out)"
    return tiny.build(f"g {ports} {{ {' '.join(body)} }}", **constants)


def data(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(i).normal(size=(2, 5, WIDTH)).astype(np.float32)} for i in range(count)]


def scale_of(model: ir.Model, layer: str) -> str:
    """The name of the scales of a layer's weight."""
    starts = (f"{layer}.", f"p{layer[1:]}.")
    names = [name for name in model.graph.initializers if name.startswith(starts) and "scale" in name]
    assert len(names) == 1, names
    return names[0]


def damage(model: ir.Model, constant: str, factor: float = 1.2) -> ir.Model:
    copy = model.clone()
    value = copy.graph.initializers[constant]
    value.const_value = ir.tensor((held(value) * factor).astype(np.float32), name=constant)
    return copy


def inner(model: ir.Model, feed: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A value inside of a model."""
    found: list[np.ndarray] = []
    segments.run(model, [feed], {name}, lambda _name, _sample, array: found.append(array))
    return found[0]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return chain()


@pytest.fixture(scope="module")
def compilations(model: ir.Model) -> Compilations:
    """The chain by a recipe for a target, compiled once; it must not be changed."""
    return functools.cache(
        lambda recipe, target: qcompiler.compile(model, recipe, calibration=data(), target=target).model
    )


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("int8-static", "portable"), ("int8-static", "ort-cpu"), ("int8-dynamic", "ort-cpu"), ("rtn-w4", "portable"),
     ("rtn-w4", "ort-cpu")],
)  # fmt: skip
def test_the_damaged_layer_is_first_in_both_orders(
    model: ir.Model, compilations: Compilations, recipe: str, target: str
) -> None:
    compiled = compilations(recipe, target)
    factor = 2.0 if recipe == "rtn-w4" else 1.2
    found = debug(model, damage(compiled, scale_of(compiled, f"w{DAMAGED}"), factor), calibration=data())
    assert len(found.alone) == len(found.accumulated) == LAYERS
    assert found.alone[0].name == found.accumulated[0].name == f"p{DAMAGED}"
    assert not found.unmatched
    assert found.alone[0].alone_db < found.alone[1].alone_db - 3
    assert found.proposals[0].layers == (f"p{DAMAGED}",)
    assert found.recipe is not None
    assert f"p{DAMAGED}" in found.recipe.exclude


def test_a_damaged_range_of_activations_is_told_from_weights(model: ir.Model, compilations: Compilations) -> None:
    compiled = compilations("int8-static", "ort-cpu")
    scale = f"s{DAMAGED - 1}.scale"
    found = debug(model, damage(compiled, scale, 0.25), calibration=data())
    assert found.alone[0].name == found.accumulated[0].name == f"p{DAMAGED}"
    assert found.alone[0].cause == "activations"
    assert there(found.alone[0].activation_share) > 0.95
    assert found.alone[0].activations == "uint8 per-tensor asymmetric"


def test_alone_is_what_only_this_layer_quantized_does(model: ir.Model) -> None:
    """Against a model in which the recipe leaves all layers but one in float."""
    small = chain(4)
    whole = qcompiler.compile(small, "rtn-w4", target="ort-cpu").model
    only = qcompiler.compile(small, "rtn-w4", target="ort-cpu", exclude=["p0", "p1", "p3"]).model
    found = next(layer for layer in debug(small, whole, calibration=data(1)).alone if layer.name == "p2")
    feed = data(1)[0]
    (expected,), (got,) = tiny.run(small, feed), tiny.run(only, feed)
    assert found.output_db == pytest.approx(sqnr_db(expected, got), abs=0.05)
    inside, truth = inner(only, feed, "y2"), inner(small, feed, "y2")
    assert found.alone_db == pytest.approx(sqnr_db(truth, inside), abs=0.05)


def test_rescaled_channels_are_no_error() -> None:
    """smooth-quant divides what the norms give: the layers read other numbers, and answer the same."""
    small = chain(4, gain=True)
    compiled = qcompiler.compile(small, "smoothquant", calibration=data(), target="ort-cpu")
    found = debug(small, compiled.model, calibration=data()[2:])  # which the report was measured on
    assert {layer.name for layer in found.alone} == {f"p{i}" for i in range(4)}
    assert all(layer.before_db > 20 for layer in found.alone)
    expected = {site.name: site.sqnr_db for site in compiled.report.sites}
    assert {layer.name: layer.accumulated_db for layer in found.alone} == pytest.approx(expected, abs=0.01)
    first = next(layer for layer in found.alone if layer.name == "p0")
    assert first.alone_db == pytest.approx(expected["p0"], abs=0.1)  # nothing has piled up before it


def test_loud_channels_ask_for_smoothquant() -> None:
    small = chain(4, gain=True)
    compiled = qcompiler.compile(small, "int8-static", calibration=data()).model
    found = debug(small, compiled, calibration=data())
    assert all(layer.loud_channels == 1 for layer in found.alone)
    assert found.proposals[0].text == "take the recipe smoothquant"
    assert "loudest channel" in found.proposals[0].reason
    better = qcompiler.compile(small, there(found.recipe), calibration=data())
    assert debug(small, better.model, calibration=data()).output_db > found.output_db + 2


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_models_of_onnxruntime(model: ir.Model, tmp_path: Path, form: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(data())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._rest, None)

    small = chain(10)
    ir.save(small, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "quantized.onnx", Reader(), quant_format=QuantFormat[form],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"],
    )  # fmt: skip
    theirs = model_io.load(tmp_path / "quantized.onnx")
    name = next(name for name in theirs.graph.initializers if name.startswith("w7") and "scale" in name)
    value = theirs.graph.initializers[name]
    value.const_value = ir.tensor((held(value) * 1.2).astype(np.float32), name=name)
    found = debug(tmp_path / "float.onnx", theirs, calibration=data())
    assert len(found.alone) == 10
    assert found.alone[0].name == found.accumulated[0].name == "p7"
    assert found.recipe is not None
    assert found.recipe.name == "int8-static-debugged"


def test_renamed_values_are_found_by_module_path(model: ir.Model) -> None:
    small = chain(3)
    for i, node in enumerate(node for node in small.graph if node.op_type == "MatMul"):
        node.name = f"/layers.{i}/fc/MatMul"
    compiled = qcompiler.compile(small, "int8-static", calibration=data(), target="portable").model
    ports = {*compiled.graph.inputs, *compiled.graph.outputs}
    for node in compiled.graph:
        for value in node.outputs:
            if value not in ports:
                value.name = f"renamed.{value.name}"
    found = debug(small, compiled, calibration=data())
    assert {layer.module_path for layer in found.alone} == {"layers.0.fc", "layers.1.fc", "layers.2.fc"}
    assert all(layer.alone_db > 30 and layer.weights for layer in found.alone)


def test_memory_limits_change_no_number(model: ir.Model) -> None:
    small = chain(3)
    compiled = qcompiler.compile(small, "int8-static", calibration=data(), target="portable").model
    free = debug(small, compiled, calibration=data())
    limited = debug(small, compiled, calibration=data(), memory_limit=60_000)
    assert [layer.name for layer in free.alone] == [layer.name for layer in limited.alone]
    assert [layer.output_db for layer in limited.alone] == pytest.approx([layer.output_db for layer in free.alone])


def test_without_effects_the_own_error_decides(model: ir.Model) -> None:
    small = chain(4)
    compiled = qcompiler.compile(small, "rtn-w4").model
    found = debug(small, compiled, calibration=data(), effect_samples=0)
    assert all(layer.output_db is None for layer in found.alone)
    own = [layer.alone_db for layer in found.alone]
    assert own == sorted(own)


def test_a_model_of_another_kind_is_refused(model: ir.Model) -> None:
    other = tiny.build("g (float[B,4] a, float[4,4] q) => (float[B,4] b) { b = MatMul(a, q) }", q="normal")
    with pytest.raises(ModelError, match="no layer of the float model was found"):
        debug(model, other, calibration=data())
    with pytest.raises(DataError):
        debug(model, model, calibration=[{"z": np.zeros(3)}])


def test_models_in_the_wrong_order_or_without_quantization_are_refused(model: ir.Model) -> None:
    small = chain(4)
    compiled = qcompiler.compile(small, "rtn-w4").model
    with pytest.raises(ModelError, match="give the float model first"):
        debug(compiled, small, calibration=data(1))
    with pytest.raises(ModelError, match="there is nothing to find"):
        debug(small, small, calibration=data(1))
    compiled.graph.outputs[0].name = "other"
    with pytest.raises(ModelError, match=r"no output of the float model \(out\) is one of"):
        debug(small, compiled, calibration=data(1))


# ---------------------------------------------------------------------------------------------------- kinds of damage


def louder(array: np.ndarray, live: np.ndarray, factor: float = 1.3) -> np.ndarray:
    """The scale of the loudest channel."""
    array.reshape(-1)[live[0]] *= np.float32(factor)
    return array


def swapped(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    array[rows[:16]] = array[rows[15::-1]]
    return array


# Recipe, target, the constant ({} is the layer, {-} the one before), and what happens to it: the array, and the output
# channels, the loudest first. What a Relu swallows would harm nothing.
DAMAGES: dict[str, tuple[str, str, str, Callable[..., np.ndarray]]] = {
    "a channel": ("int8-static", "ort-cpu", "p{}.weight_scale", louder),
    "a channel, dynamic": ("int8-dynamic", "ort-cpu", "p{}.weight_scale", louder),
    "a channel, portable": ("int8-static", "portable", "w{}.scale", louder),
    "a channel of 4 bits": ("rtn-w4", "ort-cpu", "w{}.codes.block_scales", lambda array, live: louder(array, live, 4)),
    "the scales of NF4": ("nf4", "portable", "w{}.scale.mean", lambda array, _: array * np.float32(2)),
    "a zero point of inputs": ("int8-static", "portable", "s{-}.zero_point", lambda array, _: array + np.uint8(32)),
    "zero points of 4 bits": ("hqq-w4", "ort-cpu", "w{}.codes.block_zero_points", lambda array, _: array ^ np.uint8(3)),
    "swapped inputs": ("int8-static", "ort-cpu", "w{}.codes", lambda array, _: swapped(array, np.arange(WIDTH))),
    "swapped outputs of 4 bits": ("rtn-w4", "ort-cpu", "w{}.codes.blocks", swapped),
    "clipped inputs": ("int8-static", "portable", "s{-}.scale", lambda array, _: array / np.float32(4)),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("place", [2, 9])
def test_every_kind_of_damage_is_found(model: ir.Model, compilations: Compilations, kind: str, place: int) -> None:
    """An early layer's error goes through all others, and they are not taken for its cause."""
    recipe, target, pattern, how = DAMAGES[kind]
    live = np.argsort(-inner(model, data(1)[0], f"r{place}").mean((0, 1)))
    copy = compilations(recipe, target).clone()
    constant = copy.graph.initializers[pattern.replace("{}", str(place)).replace("{-}", str(place - 1))]
    constant.const_value = ir.tensor(how(held(constant).copy(), live), name=constant.name)
    found = debug(model, copy, calibration=data(2))
    assert found.alone[0].name == found.accumulated[0].name == f"p{place}"
    if pattern.startswith("s"):
        assert found.alone[0].cause == "activations"


def test_what_kernels_round_inside_is_told_from_weights() -> None:
    """Against the weight alone: kernels that take the input as it is, and a weight that is as good as float."""
    small = chain(4)
    whole = qcompiler.compile(small, "int8-weights", target="ort-cpu").model
    inside = debug(small, whole, calibration=data(1))
    # Its blocks are as wide as the layer.
    assert {layer.activations for layer in inside.alone} == {"int8 per-token symmetric dynamic"}
    exact = whole.clone()
    for node in exact.graph:
        node.attributes.pop("accuracy_level", None)
    outside = {layer.name: layer for layer in debug(small, exact, calibration=data(1)).alone}
    for layer in inside.alone:
        weight = 10 ** (-outside[layer.name].alone_db / 10)
        share = 1 - weight / 10 ** (-layer.alone_db / 10)
        assert layer.activation_share == pytest.approx(share, abs=0.15)


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("form", ["concat", "scatter", "attention-past", "fused"])
def test_a_cache_alone_is_what_only_this_cache_quantized_does(form: str) -> None:
    """Against a model in which the other layers' caches stay float."""
    scatter = form == "scatter"
    model = decoders.build(form, layers=3, opset=24 if scatter else 23, room=8 if scatter else 0)
    samples = decoders.calibration(model, 8)
    if scatter:
        samples = [sample | {"at": np.zeros(2, np.int64)} for sample in samples]

    def compiled(**options: Any) -> ir.Model:
        recipe = Recipe.from_dict({"name": "caches", "passes": [{"quantize-kv-cache": options}]})
        return qcompiler.compile(model, recipe, calibration=samples, target="portable").model

    found = debug(model, compiled(), calibration=samples, effect_samples=2)
    caches = [layer for layer in found.alone if layer.cache]
    assert len(caches) == (6 if form in ("concat", "scatter") else 3)
    assert found.caches_db == pytest.approx(found.output_db, abs=2)  # their errors added, each made by itself
    one = next(cache for cache in caches if ".1." in cache.name)
    only = debug(model, compiled(targets=[one.module_path]), calibration=samples, effect_samples=0)
    assert one.output_db == pytest.approx(only.output_db, abs=0.05)


# ---------------------------------------------------------------------------------------------------- advice


UINT8 = Scheme("uint8", PerTensor(), symmetric=False)


def layer(name: str, decibels: float, **more: Any) -> LayerDiagnosis:
    plain = LayerDiagnosis(
        name=name, module_path=name, block="", op="MatMul", kernel="", weights="int4 group(128) symmetric",
        activations="", cache="", alone_db=decibels, output_db=decibels, kl=None, before_db=60.0,
        accumulated_db=decibels,
        added_db=0.0, activation_share=None, channel_outliers=2.0, loud_channels=0, token_outliers=1.5,
        weight_schemes=(Scheme("int4", PerGroup(128)),),
    )  # fmt: skip
    return replace(plain, **more)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("rtn-w4", "take the recipe gptq-w4-act-order"),
     ("gptq-w4", "set gptq.act_order=True, gptq.refine=4: the loudest inputs first, and four more sweeps"),
     ("gptq-w2", "set gptq.format=int4: 4 bits instead of 2"),
     ("gptq-w4-act-order", "set gptq.granularity=group, gptq.group_size=32: groups of 32 instead of 128")],
)  # fmt: skip
def test_weights_ask_for_better_rounding(recipe: str, expected: str) -> None:
    bits = "int2" if recipe == "gptq-w2" else "int4"
    layers = [layer(f"l{i}", 30 + i % 3, weight_schemes=(Scheme(bits, PerGroup(128)),)) for i in range(20)]
    proposals, proposed = advise(layers, Recipe.load(recipe), 15.0)
    assert proposals[0].text == expected
    there(proposed).resolved()


def test_inputs_ask_by_what_is_loud() -> None:
    def named(recipe: str, **more: Any) -> str:
        layers = [
            layer(
                f"l{i}",
                30,
                activations="uint8 per-tensor asymmetric",
                activation_schemes=(UINT8,),
                activation_share=0.9,
                **more,
            )
            for i in range(20)
        ]
        return advise(layers, Recipe.load(recipe), 15.0)[0][0].text

    assert named("int8-static", channel_outliers=40.0) == "take the recipe smoothquant"
    assert named("int8-static", channel_outliers=400.0) == "take the recipe llm-int8"
    assert named("smoothquant", channel_outliers=40.0) == "take the recipe llm-int8"
    assert named("smoothquant").startswith("set quantize-activations.granularity=token")  # and the smoothing stays
    assert named("int8-static") == "take the recipe int8-dynamic"


def test_advice_about_layers_leaves_caches_alone() -> None:
    layers = [layer(f"l{i}", 30) for i in range(20)]
    _, proposed = advise(layers, Recipe.load("gptq-w4-kv8"), 15.0)
    assert [step.name for step in there(proposed).passes] == ["gptq", "quantize-weights", "quantize-kv-cache"]
    rounded = Recipe.load("rtn-w4").passes + Recipe.load("kv-int8").passes
    _, proposed = advise(layers, Recipe.load("rtn-w4").model_copy(update={"passes": rounded}), 15.0)
    assert [step.name for step in there(proposed).passes] == ["gptq", "quantize-weights", "quantize-kv-cache"]
    there(proposed).resolved()


@pytest.mark.parametrize("symmetric", [True, False])
def test_caches_of_4_bits_ask_for_8(symmetric: bool) -> None:
    scheme = Scheme("int4", PerToken(), symmetric, dynamic=True)
    stored = {"weights": "", "weight_schemes": (), "cache": str(scheme), "cache_scheme": scheme}
    layers = [*(layer(f"c{i}", 30, **stored) for i in range(8)), layer("l", 60)]
    proposals, proposed = advise(layers, Recipe.load("kv-int4"), 15.0)
    assert proposals[0].text == "set quantize-kv-cache.format=int8: 8 bits for caches instead of 4"
    there(proposed).resolved()


def test_sensitive_layers_are_rounded_better_before_they_are_left_out() -> None:
    """They are rounded as well as others, and gptq costs nothing at run time; a layer that is rounded worse is out."""
    layers = [layer("l0", 20, alone_db=30.0), *(layer(f"l{i}", 40, alone_db=30.0) for i in range(1, 20))]
    assert advise(layers, Recipe.load("rtn-w4"), 15.0)[0][0].text == "take the recipe gptq-w4-act-order"
    damaged = [replace(layers[0], alone_db=15.0), *layers[1:]]
    assert advise(damaged, Recipe.load("rtn-w4"), 15.0)[0][0].text == "leave l0 in float"


def test_good_models_get_no_advice() -> None:
    assert advise([layer(f"l{i}", 60) for i in range(20)], Recipe.load("int8-static"), 55.0) == ([], None)


def test_what_is_left_out_stays_left_out() -> None:
    layers = [layer(f"l{i}", 50 if i else 20) for i in range(20)]
    recipe = Recipe.load("rtn-w4").model_copy(update={"exclude": ("lm_head",)})
    assert there(advise(layers, recipe, 15.0)[1]).exclude == ("lm_head", "l0")


# ---------------------------------------------------------------------------------------------------- parts


def test_rescaling_is_told_from_errors() -> None:
    rng = np.random.default_rng(0)
    x, factor = rng.normal(size=(100, 8)), np.linspace(0.1, 3, 8)
    noise = 1e-3 * rng.normal(size=x.shape)
    scaled, broken = Rescaling(), Rescaling()
    scaled.update(x.astype(np.float32), (x * factor + noise).astype(np.float32))
    broken.update(x.astype(np.float32), (x + rng.normal(size=x.shape)).astype(np.float32))
    assert scaled.found
    assert not broken.found
    assert scaled.factor == pytest.approx(factor, abs=1e-3)
    own = np.sum((noise / factor) ** 2)
    assert scaled.difference().noise == pytest.approx(own, rel=0.1)


def test_outliers_of_channels_and_tokens() -> None:
    seen = Outliers()
    array = np.ones((2, 10, 16), np.float32)
    array[..., 3] = -12
    array[1, 4] *= 5
    seen.update(array)
    assert seen.channels == 12
    assert seen.loud == 1
    assert seen.tokens == 5


# ---------------------------------------------------------------------------------------------------- command line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qcompiler", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_the_command_writes_a_recipe_that_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = chain(12)
    ir.save(small, tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([sample["x"] for sample in data()]))
    compiled = qcompiler.compile(small, "rtn-w4", target="ort-cpu").model
    ir.save(damage(compiled, scale_of(compiled, "w5"), 2.0), tmp_path / "quantized.onnx")
    command = ("debug", tmp_path / "float.onnx", tmp_path / "quantized.onnx", "--calibration", tmp_path / "data.npz")
    recipe = tmp_path / "better.yaml"
    assert run(monkeypatch, *command, "--apply", recipe) == 0
    printed = capsys.readouterr().out
    assert "leave p5 in float" in printed
    assert "accumulated" in printed
    assert yaml.safe_load(recipe.read_text())["exclude"] == ["p5"]
    assert run(monkeypatch, *command, "--apply", recipe) == 2  # which exists
    capsys.readouterr()
    assert run(monkeypatch, *command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["name"] == found["accumulated"][0] == "p5"
    out = tmp_path / "out"
    assert run(monkeypatch, "compile", tmp_path / "float.onnx", "--recipe", recipe, "-o", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert {site["name"]: site["status"] for site in report["sites"]}["p5"] == "excluded"


def test_a_layer_is_as_good_as_the_worst_of_its_inputs() -> None:
    """`last` reads the sum of two branches, which the second model has under another name: one of them is damaged."""
    model = tiny.build(
        """g (float[M,8] x, float[8,8] A, float[8,8] B, float[8,8] C) => (float[M,8] y) {
        [left] u = MatMul (x, A)  [right] v = MatMul (x, B)  sum = Add (u, v)  [last] y = MatMul (sum, C) }""",
        A="normal", B="normal", C="normal",
    )  # fmt: skip
    damaged = damage(model, "A", 1.1)
    next(node.outputs[0] for node in damaged.graph if node.op_type == "Add").name = "renamed"
    found = {layer.name: layer for layer in debug(model, damaged, calibration=tiny.feeds(model)).alone}
    assert found["last"].before_db == pytest.approx(20, abs=1e-3)  # a tenth too much is 20 dB
    assert found["right"].accumulated_db == np.inf
