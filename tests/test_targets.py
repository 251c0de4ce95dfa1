"""Targets as data: complete, consistent with the registries, and firm about what they refuse."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from qcompiler.errors import TargetError
from qcompiler.recipe import Recipe
from qcompiler.registry import options_of, pass_class
from qcompiler.targets import FOLDER, Target, target_names
from qcompiler.targets.kernels import RegisteredKernel, installed_kernels, read, select, write

ALL = ("ort-cpu", "ort-cuda", "portable")


def test_names() -> None:
    assert target_names() == list(ALL)
    with pytest.raises(TargetError, match="no target 'ort-cdua'; did you mean 'ort-cuda'"):
        Target.load("ort-cdua")


@pytest.mark.parametrize("name", ALL)
def test_what_a_target_names_exists(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert target.kernels
    assert all(speed.date and speed.machine for kernel in target.kernels for speed in kernel.speed)
    for lowering in target.lowering:
        assert pass_class(lowering).kind == "lowering"
    for name_, options in target.pass_defaults.items():
        assert set(options) <= {option.name for option in options_of(pass_class(name_))}
        pass_class(name_)(**options)
    if target.registry:
        assert json.loads((FOLDER / target.registry).read_text())["runtime"].startswith(target.runtime)


@pytest.mark.parametrize("recipe", ["int8-static", "smoothquant", "smoothquant-o3"])
def test_cuda_refuses_static_int8_and_says_what_to_take(recipe: str) -> None:
    passes = Recipe.load(recipe).resolved("ort-cuda").build()
    with pytest.raises(TargetError) as caught:
        Target.load("ort-cuda").check(passes)
    message = str(caught.value)
    assert "no int8 kernel" in message
    assert "dequantizes the whole weight on every run" in message
    assert "--recipe int8-weights" in message
    assert "--target ort-cpu" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("target", "recipe"),
    [
        ("ort-cuda", "int8-weights"),
        ("ort-cuda", "int8-dynamic"),
        ("ort-cuda", "smoothquant-o2"),
        ("ort-cuda", "fp8"),
        ("ort-cpu", "smoothquant"),
        ("portable", "smoothquant"),
        ("portable", "int8-static"),
    ],
)
def test_what_is_not_refused(target: str, recipe: str) -> None:
    Target.load(target).check(Recipe.load(recipe).resolved(target).build())


def has(kernels: list[RegisteredKernel], op: str, provider: str, **types: str) -> bool:
    return any(
        kernel.op == op
        and kernel.provider == provider
        and all(wanted in dict(kernel.types).get(name, ()) for name, wanted in types.items())
        for kernel in kernels
    )


def test_the_cpu_registry_has_what_the_lowering_needs() -> None:
    kernels = read(FOLDER / "kernels-ort-cpu-1.32.0.json")
    cpu = "CPUExecutionProvider"
    assert has(kernels, "MatMulIntegerToFloat", cpu, T1="uint8", T2="uint8", T3="float")
    assert has(kernels, "MatMulNBits", cpu, T1="float", T2="uint8")
    assert has(kernels, "QuantizeLinear", cpu, T1="float", T2="uint8")


def test_the_cuda_registry_explains_the_refusal() -> None:
    kernels = read(FOLDER / "kernels-ort-cuda-1.31.1.json")
    cuda = "CUDAExecutionProvider"
    assert {kernel.provider for kernel in kernels} == {cuda}
    for absent in ("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLinear", "QLinearConv", "QGemm"):
        assert not has(kernels, absent, cuda)
    assert has(kernels, "MatMulNBits", cuda, T1="float16", T2="uint8")
    assert has(kernels, "MatMulInteger", cuda, T1="int8", T2="int8")
    assert not has(kernels, "MatMulInteger", cuda, T1="uint8")


def test_the_cuda_registry_has_what_the_lowering_needs() -> None:
    kernels, cuda = read(FOLDER / "kernels-ort-cuda-1.31.1.json"), "CUDAExecutionProvider"
    for dtype in ("float16", "bfloat16"):
        assert has(kernels, "MatMulBlockQuantizedFp8Weight", cuda, T=dtype, T1="float8e4m3fn", T2="float")
    assert not has(kernels, "MatMulBlockQuantizedFp8Weight", cuda, T="float")
    for left, right in (("float8e4m3fn", "float8e5m2"), ("float8e5m2", "float8e4m3fn")):
        assert has(kernels, "GemmFloat8", cuda, TA=left, TB=right, TS="float")
    assert has(kernels, "QuantizeLinear", cuda, T1="float", T2="int8")


def test_the_cpu_registry_is_that_of_the_installed_runtime() -> None:
    installed = importlib.metadata.version("onnxruntime")
    if installed != "1.32.0":
        pytest.skip(f"the table is that of onnxruntime 1.32.0, and {installed} is installed")
    assert installed_kernels() == read(FOLDER / "kernels-ort-cpu-1.32.0.json")


def test_select_keeps_what_concerns_quantization_once_and_sorted(tmp_path) -> None:
    def entry(op: str, ep: str = "CPUExecutionProvider", domain: str = "") -> dict:
        return {
            "op": op,
            "domain": domain,
            "ep": ep,
            "ver": [10, 2**31 - 1],
            "tc": {"T": ["tensor(uint8)", "tensor(int8)"]},
        }

    kernels = select(
        [
            entry("QGemm"),
            entry("MatMulInteger"),
            entry("Abs"),
            entry("QGemm"),
            entry("QGemm", ep="TensorrtExecutionProvider"),
        ]
    )
    assert [kernel.op for kernel in kernels] == ["MatMulInteger", "QGemm"]
    assert kernels[0].until is None
    assert kernels[0].types == (("T", ("int8", "uint8")),)
    write(tmp_path / "table.json", kernels, "a runtime")
    assert read(tmp_path / "table.json") == kernels
