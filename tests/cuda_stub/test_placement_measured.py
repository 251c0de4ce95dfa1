"""Predicted placement against that of the CUDA provider itself: the demo model by every exporter, with every recipe.

Run by `make test-cuda-placement` on stand-ins for the CUDA libraries, or on a GPU. No number is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from qcompiler.errors import TargetError
from qcompiler.graph import files as model_io
from qcompiler.placement import PlacedNode, Placement, compare, measure, predict
from qcompiler.recipes import Recipe, recipe_names
from qcompiler.targets import FOLDER, Target
from qcompiler.targets.host_memory import host_memory
from qcompiler.targets.kernels import installed_kernels, read
from tests import tiny
from tests.placement.test_placement import CONSTANTS, FOLLOWED, INPUTS, QUANTIZED, SHAPES

CUDA = Target.load("ort-cuda")
VARIANTS = ["dynamo", "dynamo-past", "opset23", "optimum", "fp16", pytest.param("genai", marks=pytest.mark.exporters)]
SIXTEEN_BITS_ONLY = "com.microsoft::GroupQueryAttention"  # on CUDA

if CUDA.providers[0] not in ort.get_available_providers():
    pytest.skip("needs onnxruntime-gpu: make test-cuda-placement", allow_module_level=True)


def is_refused(recipe: str) -> bool:
    try:
        CUDA.check(Recipe.load(recipe).resolved("ort-cuda").build())
    except TargetError:
        return True
    return False


RECIPES = [recipe for recipe in recipe_names() if not is_refused(recipe)]


def both(folder: Path, *, optimized: bool) -> tuple[Placement, Placement]:
    """Predicted and measured."""
    predicted = predict(model_io.load(model_io.find_model(folder)), CUDA, optimized=optimized)
    assert predicted is not None
    measured = measure(folder, CUDA, predicted=predicted, optimized=optimized)
    assert measured is not None, "the CUDA provider did not start"
    return predicted, measured


def kinds(nodes: Iterable[PlacedNode]) -> Counter[tuple[str, str]]:
    return Counter((node.op, node.provider) for node in nodes)


def check_as_written(folder: Path) -> None:
    """Without optimizers every node has its counterpart; those of model-local functions have other names."""
    predicted, measured = both(folder, optimized=False)
    difference = compare(predicted, measured)
    assert not difference.moved
    whole = kinds(node for node in difference.removed if node.role != "expanded")
    assert not whole - kinds(difference.made)
    if not predicted.with_role("expanded"):  # whose parts nobody predicted
        # Even then the runtime gives each reader of a DequantizeLinear one of its own.
        assert set(kinds(difference.made) - whole) <= {("DequantizeLinear", "CUDA")}
    assert Counter(copy.to for copy in predicted.copies) == Counter(copy.to for copy in measured.copies)


def check_as_loaded(folder: Path) -> Placement:
    """What optimizers leave is where it was predicted, and what they make is no new reason for a warning."""
    predicted, measured = both(folder, optimized=True)
    difference = compare(predicted, measured)
    assert not difference.moved
    assert difference.copies[0] == difference.copies[1]
    assert {node.role for node in difference.made} <= {"", "shape"}
    assert {node.name for node in predicted.with_role("fallback")} == {
        node.name for node in measured.with_role("fallback")
    }
    return measured


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_of_the_demo_model(recipe: str, variant: str, dtype: str | None, tmp_path: Path) -> None:
    compiled = qcompiler.compile(
        model_path(variant), recipe, target="ort-cuda", dtype=dtype, calibration=str(CHECKPOINT / "calibration.txt"),
        tokenizer=CHECKPOINT / "tokenizer.json", samples=2, sequence_length=16,
    )  # fmt: skip
    model_io.save(compiled.model, tmp_path / "out")
    check_as_written(tmp_path / "out")
    measured = check_as_loaded(tmp_path / "out")
    fallen = {node.op for node in measured.with_role("fallback")}
    assert fallen <= ({SIXTEEN_BITS_ONLY} if variant == "genai" and dtype is None else set())
    assert compiled.report.placement is not None
    assert [node for node in compiled.report.placement.nodes if node.role == "fallback"] == [
        node for node in predict_again(tmp_path / "out").nodes if node.role == "fallback"
    ]


def predict_again(folder: Path) -> Placement:
    found = predict(model_io.load(model_io.find_model(folder)), CUDA)
    assert found is not None
    return found


def large(size: int, dtype: str) -> ir.Model:
    """Arithmetic on a shape with a constant that may keep it on the device."""
    to = 10 if dtype == "float16" else 1
    text = f"""g (float[B,8] x, {dtype}[{size}] c, int64[1] zero, int64[1] one) => ({dtype}[{size}] y) {{
        sizes = Shape(x) first = Slice(sizes, zero, one) cast = Cast<to={to}>(first) y = Add(cast, c) }}"""
    numbers = np.ones(size, np.float16 if dtype == "float16" else np.float32)
    return tiny.build(text, c=numbers, zero=np.array([0]), one=np.array([1]))


def padded(pads: str) -> ir.Model:
    text = f"g (float[1,2,8,8] x, float[2,2,3,3] w) => (float[1,2,A,B] y) {{ y = ConvTranspose<{pads}>(x, w) }}"
    return tiny.build(text, w=np.ones((2, 2, 3, 3), np.float32))


SMALL = {
    "shapes": lambda: tiny.build(SHAPES.replace("(float[B,S,8] x)", f"(float[B,S,8] x, {INPUTS})"), **CONSTANTS),
    "one unsupported node": lambda: tiny.build(QUANTIZED),
    "an unsupported node within shape arithmetic": lambda: tiny.build(FOLLOWED),
    "a constant of 100": lambda: large(100, "float"),
    "a constant of 101": lambda: large(101, "float"),
    "16 bits": lambda: large(4, "float16"),
    "even pads": lambda: padded("pads=[1,1,1,1]"),
    "odd pads": lambda: padded("pads=[1,1,0,0]"),
    "pads of the shape": lambda: padded('auto_pad="SAME_UPPER"'),
    "unsigned integers": lambda: tiny.build(
        "g (uint8[B,8] x, uint8[8,4] w) => (int32[B,4] y) { y = MatMulInteger(x, w) }"
    ),
    "a shape computed on the device": lambda: tiny.build(
        "g (float[B,8] x, int64[2] a, int64[2] b) => (float[M,N] y) { to = Add(a, b) y = Reshape(x, to) }"
    ),
    "an input that both sides read": lambda: tiny.build(
        "g (float[B,8] x) => (uint8[B,8] q, float[B,8] y) { q, s, z = DynamicQuantizeLinear(x) y = Neg(x) }"
    ),
    "repeated shape arithmetic that the device reads": lambda: tiny.build(
        """g (float[B,S] x, int64[B] i, int64[1] a, int64[1] b) => (int64[B] y, int64[B] z) {
        s = Shape(x) t = Shape(x) c = Gather(s, a) d = Gather(t, b) j = Neg(i) y = Mul(j, c) z = Sub(j, d) }""",
        a=np.array([1]),
        b=np.array([1]),
    ),
    "a Dropout without a kernel": lambda: tiny.build(
        "g (float[B,8] x) => (float[B,8] y) { a = Neg(x) d = Dropout(a) y = Exp(d) }", opset=22
    ),
    "an operator of a newer version than the kernel": lambda: tiny.build(
        "g (float[1,2,8,8] x) => (float[1,2,7,7] y) { a = Neg(x) p = MaxPool<kernel_shape=[2,2]>(a) y = Exp(p) }",
        opset=22,
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_of_small_models(case: str, tmp_path: Path) -> None:
    model_io.save(SMALL[case](), tmp_path / "out")
    check_as_written(tmp_path / "out")
    check_as_loaded(tmp_path / "out")


def test_the_table_is_that_of_the_installed_provider() -> None:
    table = read(FOLDER / CUDA.registry)
    if f" {ort.__version__}," not in table.runtime:
        pytest.skip(f"the table is that of {table.runtime}, and {ort.__version__} is installed")
    kernels = installed_kernels(CUDA.providers[0])
    memory = host_memory(kernels)
    known = {(k.domain, k.op, k.since): (k.host_inputs, k.host_outputs) for k in table.kernels}
    assert {key: places for key, places in known.items() if any(places)} == memory
    assert [(k.domain, k.op, k.since, k.types) for k in kernels] == [
        (k.domain, k.op, k.since, k.types) for k in table.kernels
    ]
