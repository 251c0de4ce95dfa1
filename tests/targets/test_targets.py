"""Targets as data: complete, consistent with the registries, and firm about what they refuse."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import TargetError
from qcompiler.recipes import Recipe
from qcompiler.recipes.registry import options_of, pass_class
from qcompiler.targets import FOLDER, Target, target_names
from qcompiler.targets.conditions import CONDITIONS, FUSED, conditions
from qcompiler.targets.kernels import (
    KernelTable,
    OperatorSignature,
    RegisteredKernel,
    installed_kernels,
    installed_signatures,
    read,
    select,
    write,
)

ALL = ("ort-cpu", "ort-cuda", "portable", "tensorrt")


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


def has(table: KernelTable, op: str, provider: str, **types: str) -> bool:
    return any(
        kernel.op == op
        and kernel.provider == provider
        and all(wanted in dict(kernel.types).get(name, ()) for name, wanted in types.items())
        for kernel in table.kernels
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
    assert {kernel.provider for kernel in kernels.kernels} == {cuda}
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
    table = read(FOLDER / "kernels-ort-cpu-1.32.0.json")
    assert tuple(installed_kernels()) == table.kernels
    assert installed_signatures(table.kernels) == table.signatures


def test_the_cuda_registry_knows_what_lies_in_host_memory() -> None:
    table = read(FOLDER / "kernels-ort-cuda-1.31.1.json")
    newest = {kernel.op: kernel for kernel in table.kernels if kernel.domain == ""}
    assert newest["Shape"].host_outputs == (0,)
    assert newest["Reshape"].host_inputs == (1,)
    assert newest["Slice"].host_inputs == (1, 2, 3, 4)
    assert newest["MatMulInteger"].host_inputs == (2, 3)  # the zero points
    assert newest["Gather"].host_inputs == newest["Gather"].host_outputs == ()
    assert table.signatures["com.microsoft", "MatMulNBits"].inputs[1] == ("B", "T2")


def entry(op: str, ep: str = "CPUExecutionProvider", domain: str = "", **types: str) -> dict[str, Any]:
    allowed = types or {"T": "uint8 int8"}
    return {
        "op": op, "domain": domain, "ep": ep, "ver": [10, 2**31 - 1],
        "tc": {name: [f"tensor({item})" for item in text.split()] for name, text in allowed.items()},
    }  # fmt: skip


def test_select_keeps_a_provider_once_and_sorted(tmp_path: Path) -> None:
    kernels = select(
        [
            entry("QGemm"), entry("MatMulInteger"), entry("QGemm"), entry("QGemm", ep="TensorrtExecutionProvider"),
            entry("Abs", domain="ai.onnx"), entry("Conv", domain="com.ms.internal.nhwc"),
        ]
    )  # fmt: skip
    assert [kernel.op for kernel in kernels] == ["Abs", "MatMulInteger", "QGemm"]
    assert kernels[0].until is None
    assert kernels[0].domain == ""
    assert kernels[0].types == (("T", ("int8", "uint8")),)
    written = RegisteredKernel("", "Reshape", "X", 1, 4, (("T", ("float",)),), host_inputs=(1,))
    signature = {("com.microsoft", "MatMulNBits"): OperatorSignature((("A", "T1"), ("B", "T2")), (("Y", "T1"),))}
    table = KernelTable("a runtime", (*kernels, written), signature)
    write(tmp_path / "table.json", table)
    assert read(tmp_path / "table.json") == table


def test_select_merges_types_that_vary_alone() -> None:
    pairs = [("float", "int8"), ("float", "uint8"), ("float16", "int8"), ("float16", "uint8"), ("double", "int8")]
    kernels = select(entry("Op", T1=a, T2=b) for a, b in pairs)
    assert len(kernels) < len(pairs)
    taken = {(a, b) for kernel in kernels for a in dict(kernel.types)["T1"] for b in dict(kernel.types)["T2"]}
    assert taken == set(pairs)


@pytest.mark.parametrize("name", ALL)
def test_rules_and_advice_can_be_followed(name: str) -> None:
    target = Target.load(name)
    for rule in target.rules:
        assert rule.source
        assert rule.otherwise or not rule.requires
        assert len(rule.conditions) == (len(conditions(rule.requires)) if rule.requires else 0)
    schemes = {kernel.scheme for kernel in target.kernels}
    for advice in target.advice:
        assert advice.scheme in schemes
        target.check(Recipe.load(advice.recipe).resolved(name).build())


def test_the_words_of_a_rule_say_what_its_conditions_do() -> None:
    rules = {rule.requires: rule for rule in Target.load("ort-cuda").rules}
    for bits, fused in FUSED.items():
        assert rules[f"fpA_intB-{bits}"].otherwise.startswith(f"from {fused.tokens} tokens on")
        assert rules[f"fpA_intB-{bits}"].when == {"bits": bits}


def test_every_condition_is_of_use() -> None:
    rules = [rule for name in ALL for rule in Target.load(name).rules]
    used = {rule.requires for rule in rules} | {rule.fallback.requires for rule in rules if rule.fallback}
    assert used - {""} == CONDITIONS.keys()


def test_a_target_is_read_once() -> None:
    assert Target.load("ort-cuda") is Target.load("ort-cuda")
