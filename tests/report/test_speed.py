"""A layer on a kernel that was measured slower than float is warned of, with the measurement, and no other."""

from __future__ import annotations

import re

import pytest

from qcompiler.report import SiteReport
from qcompiler.report.speed import speed_warnings
from qcompiler.targets import Kernel, Speed, Target, target_names


def speed(ratio: float, case: str = "128 tokens") -> Speed:
    return Speed(ratio=ratio, against="float32 MatMul", case=case, machine="a machine", date="2026-11-24")


def target(*speeds: Speed, sites: str = "^MatMulNBits: int4 ") -> Target:
    kernel = Kernel(scheme="W4", operator="MatMulNBits", types="", sites=sites, speed=speeds, source="measured")
    return Target(name="here", title="", description="", runtime="", providers=(), kernels=(kernel,))


def site(scheme: str, kernel: str = "", status: str = "quantized") -> SiteReport:
    return SiteReport(name="fc", module_path="fc", op="MatMul", status=status, scheme=scheme, kernel=kernel)  # type: ignore[arg-type]


W4 = site("int4 group(32) symmetric", "MatMulNBits")


def test_the_slowest_case_is_told_with_where_and_when() -> None:
    (one,) = speed_warnings(target(speed(0.5)), [W4])
    assert one == "1 layer as W4 is slower than float32 MatMul on here: 0.5 × with 128 tokens (a machine, 2026-11-24)"
    (two,) = speed_warnings(target(speed(0.5), speed(0.25, "1 token")), [W4, W4])
    assert two == (
        "2 layers as W4 are slower than float32 MatMul on here: 0.25 × with 1 token (a machine, 2026-11-24); "
        "`qcompiler targets here` lists all cases"
    )
    (three,) = speed_warnings(target(speed(3.0, "1 token"), speed(0.5)), [W4])
    assert three.startswith("1 layer as W4 is sometimes slower than float32 MatMul on here: 0.5 × with 128 tokens")


@pytest.mark.parametrize("found", [
    target(speed(1.0), speed(2.0)),  # never slower
    target(),  # never measured
    target(speed(0.5), sites=""),  # no report tells
    target(speed(0.5), sites="^: int4"),  # not lowered
])  # fmt: skip
def test_what_is_not_known_to_be_slower_is_not_warned_of(found: Target) -> None:
    assert speed_warnings(found, [W4]) == []


def test_only_quantized_layers_count() -> None:
    others = [
        site("int8 per-channel symmetric", "MatMulNBits"),
        site("", status="skipped"),
        site("", status="excluded"),
    ]
    assert speed_warnings(target(speed(0.5)), others) == []


@pytest.mark.parametrize("name", target_names())
def test_what_finds_layers_is_a_regular_expression(name: str) -> None:
    for kernel in Target.load(name).kernels:
        re.compile(kernel.sites)


@pytest.mark.parametrize(("kernel", "scheme", "warned"), [
    ("", "fp8_e4m3 per-channel symmetric, activations fp8_e4m3 per-token symmetric dynamic", "FP8 are slower"),
    ("", "fp8_e5m2 per-tensor symmetric", "FP8 are slower"),
    ("MatMulBnb4", "nf4 blocks of 64", "NF4 or FP4 are slower"),
    ("MatMulNBits", "uint8 group(128) symmetric", "W8 are sometimes slower"),
    ("MatMulNBits", "int8 per-channel symmetric", "W8 are sometimes slower"),
    ("MatMulNBits", "int4 group(128) symmetric", None),
    ("MatMulNBits", "uint4 group(32) asymmetric", None),
    ("GatherBlockQuantized", "uint8 per-channel symmetric", None),
    ("MatMulIntegerToFloat", "int8 per-channel symmetric, activations uint8 per-tensor asymmetric", None),
])  # fmt: skip
def test_what_this_cpu_runs_slower_than_float(kernel: str, scheme: str, warned: str | None) -> None:
    warnings = speed_warnings(Target.load("ort-cpu"), [site(scheme, kernel), site(scheme, kernel)])
    assert [warned is not None and warned in warning for warning in warnings] == [True] * (warned is not None)
