"""A layer on a kernel that was measured slower than float is warned of, with the measurement, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompiler.formats.scheme import PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.report import SiteReport
from qcompiler.report.report import Status
from qcompiler.report.speed import speed_classes, speed_warnings
from qcompiler.targets import Kernel, SchemeRow, SiteRow, Speed, Target


def speed(ratio: float, case: str = "128 tokens") -> Speed:
    return Speed(ratio=ratio, against="float32 MatMul", case=case, machine="a machine", date="2026-11-24")


NBITS_4 = SiteRow(kernel=("MatMulNBits",), weight=SchemeRow(bits=(4,)))
NOT_LOWERED = SiteRow(kernel=("",), weight=SchemeRow(bits=(4,)))


def target(*speeds: Speed, sites: SiteRow | None = NBITS_4) -> Target:
    kernel = Kernel(scheme="W4", operator="MatMulNBits", types="", sites=sites, speed=speeds, source="measured")
    return Target(name="here", title="", description="", runtime="", providers=(), kernels=(kernel,))


def site(
    weight: Scheme | None, kernel: str = "", status: Status = "quantized", activation: Scheme | None = None
) -> SiteReport:
    return SiteReport(
        name="fc", module_path="fc", op="MatMul", status=status, weight=weight, activation=activation, kernel=kernel
    )


W4 = site(Scheme("int4", PerGroup(32)), "MatMulNBits")


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
    target(speed(0.5), sites=None),  # no report tells
    target(speed(0.5), sites=NOT_LOWERED),  # not lowered
])  # fmt: skip
def test_what_is_not_known_to_be_slower_is_not_warned_of(found: Target) -> None:
    assert speed_warnings(found, [W4]) == []


def test_only_quantized_layers_count() -> None:
    others = [
        site(Scheme("int8", PerChannel()), "MatMulNBits"),
        site(None, status="skipped"),
        site(None, status="excluded"),
    ]
    assert speed_warnings(target(speed(0.5)), others) == []


PER_TOKEN = Scheme("int8", PerToken(), dynamic=True)
UINT8 = Scheme("uint8", PerTensor(), symmetric=False)
FP8_ROWS = Scheme("fp8_e4m3", PerToken(), dynamic=True)
INTEGERS, FUSED = "MatMulIntegerToFloat", "DynamicQuantizeMatMul"


@pytest.mark.parametrize(("kernel", "weight", "activation", "warned"), [
    ("", Scheme("fp8_e4m3", PerChannel()), FP8_ROWS, "FP8 are slower"),
    ("", Scheme("fp8_e5m2", PerTensor()), None, "FP8 are slower"),
    ("MatMulBnb4", Scheme("nf4", PerGroup(64)), None, "NF4 or FP4 are slower"),
    ("MatMulNBits", Scheme("uint8", PerGroup(128)), None, "W8 are sometimes slower"),
    ("MatMulNBits", Scheme("int8", PerChannel()), None, "W8 are sometimes slower"),
    ("MatMulNBits", Scheme("int4", PerGroup(128)), None, None),
    ("MatMulNBits", Scheme("uint4", PerGroup(32), symmetric=False), None, None),
    ("GatherBlockQuantized", Scheme("uint8", PerChannel()), None, None),
    ("MatMulIntegerToFloat", Scheme("int8", PerChannel()), UINT8, None),
])  # fmt: skip
def test_what_this_cpu_runs_slower_than_float(
    kernel: str, weight: Scheme, activation: Scheme | None, warned: str | None
) -> None:
    layer = site(weight, kernel, activation=activation)
    warnings = speed_warnings(Target.load("ort-cpu"), [layer, layer])
    assert [warned is not None and warned in warning for warning in warnings] == [True] * (warned is not None)


@pytest.mark.parametrize(("kernel", "weight", "activation", "family"), [
    (INTEGERS, Scheme("int8", PerChannel()), UINT8, "W8A8 static"),
    (INTEGERS, Scheme("uint8", PerChannel()), UINT8, "W8A8 static, uint8 weights"),
    (INTEGERS, Scheme("int8", PerChannel()), replace(UINT8, dynamic=True), "W8A8 dynamic, per tensor"),
    (FUSED, Scheme("uint8", PerChannel()), replace(UINT8, dynamic=True), "W8A8 dynamic, per tensor"),
    (INTEGERS, Scheme("int8", PerTensor()), PER_TOKEN, "W8A8 dynamic, per token"),
    (INTEGERS, Scheme("int4", PerChannel()), PER_TOKEN, "W4A8, a scale for each output channel"),
    (INTEGERS, Scheme("binary", PerChannel()), PER_TOKEN, "W1A8, a scale for each output channel"),
    ("MatMulNBits", Scheme("int3", PerGroup(32)), None, "W4"),
    ("MatMulNBits", Scheme("int2", PerGroup(32)), None, "W2"),
    ("MatMulNBits", Scheme("binary", PerGroup(32)), None, "W2"),
    ("MatMulNBits", None, None, ""),  # its schemes are not known: a report of an older version
    ("", Scheme("int4", PerGroup(32)), None, ""),
])  # fmt: skip
def test_the_row_of_a_layer(kernel: str, weight: Scheme | None, activation: Scheme | None, family: str) -> None:
    (one,) = speed_classes(Target.load("ort-cpu"), [site(weight, kernel, activation=activation)])
    assert one.scheme == family


@pytest.mark.parametrize(("scheme", "family"), [
    (Scheme("int8", PerToken(), dynamic=True), "KV-cache int8, joined by Concat"),
    (Scheme("int4", PerToken(), symmetric=False, dynamic=True, normalized=True), "KV-cache int4, joined by Concat"),
    (Scheme("int8", PerChannel()), None),
])  # fmt: skip
def test_the_row_of_a_cache(scheme: Scheme, family: str | None) -> None:
    rows = [row for row in Target.load("ort-cpu").kernels if row.sites and row.sites.matches("", cache=scheme)]
    assert [row.scheme for row in rows] == ([family] if family else [])
