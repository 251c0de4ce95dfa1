"""Whole compilations of small models of many kinds, as plain ONNX Runtime runs the result."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from pydantic.dataclasses import dataclass as options

import qcompiler
from qcompiler.api import Changed, ChannelRange, Rewriter, Tap, WeightPass, array, sites_of
from qcompiler.errors import DataError, ModelError, PassError
from qcompiler.evaluation.evaluate import evaluate
from qcompiler.recipes import Recipe, Step
from qcompiler.recipes.registry import pass_class
from qcompiler.rewriting.contract import OPTIONS, Changes, Kind, Pass
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.there import held, operand

RECIPES, TARGETS = ("int8-static", "smoothquant", "int8-weights"), ("ort-cpu", "portable")

# Linear layers that read one another, residual sums, a bias on the output, norms: each one line of ONNX text.
MODELS = {
    "chain": """g (float[M,32] x, float[32,16] A, float[24,16] B, float[24] b, float[24,8] C)
        => (float[M,24] y, float[M,8] z) {
        [a] p = MatMul(x, A)  [b] y = Gemm<transB=1>(p, B, b)  [c] z = MatMul(y, C) }""",
    "norm": """g (float[B,S,32] x, float[32] G, float[32] b, float[32,64] A, float[64] c, float[64,32] C)
        => (float[B,S,32] y) {
        n = LayerNormalization(x, G, b)  [up] p = MatMul(n, A)  q = Add(p, c)  r = Relu(q)
        [down] s = MatMul(r, C)  y = Add(x, s) }""",
    "half": """g (float16[M,32] x, float16[32,24] A, float16[8,24] B, float16[8] b) => (float16[M,8] y) {
        [a] p = MatMul(x, A)  t = Tanh(p)  [b] y = Gemm<transB=1>(t, B, b) }""",
    "tied": """g (int64[B,S] ids, float[32,32] E, float[32,32] A) => (float[B,S,32] y) {
        [embed] e = Gather(E, ids)  [mix] h = MatMul(e, A)  T = Transpose<perm=[1,0]>(E)  [head] y = MatMul(h, T) }""",
    "residual": """g (float[2,4,9,9] x, float[4,4,3,3] A, float[4] b, float[4,1,3,3] D) => (float[2,4,9,9] y) {
        [a] p = Conv<pads=[1,1,1,1]>(x, A, b)  r = Relu(p)  [d] q = Conv<pads=[1,1,1,1], group=4>(r, D)
        y = Add(q, x) }""",
}


def build(kind: str) -> ir.Model:
    """Of the inputs, capital letters and biases are constants."""
    names = [word.strip("(),") for word in MODELS[kind][: MODELS[kind].index("=>")].split() if word[-1] in ",)"]
    recipes = {name: "gain" if name == "G" else "normal" for name in names}
    return tiny.build(MODELS[kind], **{name: recipe for name, recipe in recipes.items() if name not in ("x", "ids")})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_saved_folder_runs_and_stays_close(tmp_path: Path, kind: str, recipe: str, target: str) -> None:
    import onnxruntime as ort

    model = build(kind)
    samples = tiny.feeds(model, count=8)
    compiled = qcompiler.compile(model, recipe, target=target, calibration=samples)
    assert {site.status for site in compiled.report.sites} == {"quantized"}
    compiled.save(tmp_path / "out")
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for sample in samples[-2:]:
        for got, wanted in zip(session.run(None, sample), tiny.run(model, sample), strict=True):
            assert got.dtype == wanted.dtype
            assert tiny.relative_error(got, wanted) < 0.03


def test_what_is_quantized_already_is_said(tmp_path: Path) -> None:
    model = build("chain")
    once = qcompiler.compile(model, "int8-weights")
    twice = qcompiler.compile(once.model, "int8-weights", strict=True)
    assert len(twice.report.sites) == 3
    assert {site.status for site in twice.report.sites} == {"skipped"}
    assert {site.reason for site in twice.report.sites} == {"it is quantized already (MatMulNBits)"}
    assert twice.report.exit_code == 1


def test_evaluating_what_is_no_language_model_says_so(tmp_path: Path) -> None:
    model = build("chain")
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="no language model"):
        evaluate(tmp_path / "model.onnx", "random")


@options(frozen=True, config=OPTIONS)
class Explode(Pass):
    name: ClassVar[str] = "explode"
    kind: ClassVar[Kind] = "rounding"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        raise KeyError("boom")


@options(frozen=True, config=OPTIONS)
class ForgetToMultiply(Pass):
    """Moves a scale that was measured out of a layer's input, says so, and not quite into its weight."""

    name: ClassVar[str] = "forget-to-multiply"
    kind: ClassVar[Kind] = "exact"

    def taps(self, model: ir.Model) -> list[Tap]:
        return [Tap("x", ChannelRange())]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        scale, linear = statistics.get("x", ChannelRange()).result()[1], sites_of(model).linears[0]
        Rewriter(model, self.name).set_constant(linear.node, 1, array(linear.weight) * scale[:, None])
        return Changes(changed=[Changed(linear.name, detail=f"peak {scale.max():.6f}")], rescaled={"x": scale})


@options(frozen=True, config=OPTIONS)
class FewBits(WeightPass):
    name: ClassVar[str] = "few-bits"
    kind: ClassVar[Kind] = "rounding"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        if self.bits:
            raise KeyError(f"{len(self.bits)} layers in bits of their own")
        return Changes()


WRONG = {step.name: step for step in (Explode, ForgetToMultiply, FewBits)}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["quantize-weights", "quantize-activations", "explode"], "boom"),
        (["forget-to-multiply"], r"output 'y' now differs from before by [-\d.]+ dB"),
        ([{"mixed-precision": {"layers": ["linear"]}}, "few-bits"], "3 layers in bits of their own"),
    ],
)
def test_the_reproducer_shows_the_failure_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[object], message: str
) -> None:
    monkeypatch.setattr("qcompiler.recipes.pass_class", lambda name: WRONG.get(name) or pass_class(name))
    model = build("chain")
    recipe = Recipe.from_dict({"name": "r", "passes": steps})
    with pytest.raises(PassError, match=message) as first:
        qcompiler.compile(model, recipe, calibration=tiny.feeds(model, 8), dump_dir=tmp_path)
    (folder,) = tmp_path.glob("reproduce-*")
    said = str(first.value).partition("--calibration ")[2].split()[0]
    with pytest.raises(PassError, match=message) as again:
        qcompiler.compile(
            folder, folder / "recipe.yaml", statistics=folder / "statistics.safetensors", calibration=said,
            dump_dir=tmp_path / "again",
        )  # fmt: skip
    assert str(again.value).partition("(this")[0] == str(first.value).partition("(this")[0]


def test_a_reproducer_that_cannot_be_written_hides_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qcompiler.recipes.pass_class", lambda name: Explode if name == "explode" else pass_class(name))
    (tmp_path / "reproduce-explode").touch()
    model = build("chain")
    with pytest.raises(PassError, match=r"explode failed: .*boom.*no reproducer"):
        qcompiler.compile(model, Recipe(name="r", passes=(Step(name="explode"),)), dump_dir=tmp_path)


def test_hooks_see_every_sample_once() -> None:
    model = build("norm")
    seen: list[tuple[str, tuple[int, ...]]] = []
    hook = qcompiler.Hook("r", lambda name, batch: seen.append((name, batch.shape)))
    qcompiler.compile(model, "int8-weights", calibration=tiny.feeds(model, 4), hooks=[hook])
    # Of four samples two are held out, and hooks see what is calibrated on.
    assert seen == [("r", (2, 5, 64))] * 2


def test_hooks_without_data_are_an_error() -> None:
    model = tiny.build(
        "g (float[M,8] x, float[8,4] W) => (float[M,4] y) { y = MatMul(x, W) }", W=np.ones((8, 4), np.float32)
    )
    with pytest.raises(DataError, match="hooks need data"):
        qcompiler.compile(model, "int8-weights", hooks=[qcompiler.Hook("*", print)])


def test_a_model_without_layers_is_said_to_have_none() -> None:
    model = tiny.build("g (float[M,8] x) => (float[M,8] y) { y = Relu(x) }")
    assert any("no layer" in warning for warning in qcompiler.compile(model, "int8-weights").report.warnings)


@options(frozen=True, config=OPTIONS)
class Halve(Pass):
    """Changes a constant that belongs to no layer, and so names none."""

    name: ClassVar[str] = "halve"
    kind: ClassVar[Kind] = "rounding"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        node = model.graph[0]
        Rewriter(model, self.name).set_constant(node, 1, array(operand(node, 1)) / 2)
        return Changes()


def test_a_pass_that_names_no_layer_has_changed_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = {"halve": Halve, "explode": Explode}
    monkeypatch.setattr("qcompiler.recipes.pass_class", lambda name: steps.get(name) or pass_class(name))
    model = tiny.build(
        "g (float[M,2] x, float[2] a) => (float[M,2] y) { y = Mul(x, a) }", a=np.array([2, 4], np.float32)
    )
    with pytest.raises(PassError, match="boom"):
        qcompiler.compile(model, Recipe.from_dict({"name": "r", "passes": ["halve", "explode"]}), dump_dir=tmp_path)
    before = ir.load(tmp_path / "reproduce-explode" / "model.onnx").graph.initializers["a"]
    assert held(before).tolist() == [1, 2]
