"""What a report says of speed: the measured figure, a warning where that is slower than float, and the table's rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompiler.benchmarking.speedup import Speedup
from qcompiler.formats.scheme import PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.report import Report, SiteReport, Sizes
from qcompiler.report.pictures import Pictures, SpeedClass
from qcompiler.report.report import Status
from qcompiler.report.speed import by_table, figure, measured_warnings, speed_classes, speed_warnings, with_speed
from qcompiler.rewriting.contract import CacheChange
from qcompiler.targets import Kernel, SchemeRow, SiteRow, Speed, Target
from qcompiler.targets.machines import Cpu, Machine

HASWELL = Cpu("x86_64", frozenset({"avx2"}))
ZEN_4 = Cpu("x86_64", frozenset({"avx2", "avx512_vnni"}))
GRAVITON = Cpu("aarch64", frozenset({"asimd"}))


def speed(ratio: float, case: str = "128 tokens", machine: str = "a machine") -> Speed:
    return Speed(ratio=ratio, against="float32 MatMul", case=case, machine=machine, date="2026-11-24")


def measured(ratio: float, low: float = 0.0, high: float = 0.0, rounds: int = 8) -> Speedup:
    return Speedup(ratio, low or ratio, high or ratio, 0.02, 0.02 / ratio, rounds, 1, "x [4, 16]", "x86_64 (avx2)")


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


def test_rows_for_this_cpu_count_and_others_where_there_are_none() -> None:
    old, new = Machine(has=("avx2",), lacks=("avx512_vnni",)), Machine(has=("avx512_vnni",))
    rows = target(speed(0.5, machine="old"), speed(3.0, machine="new"))
    rows = rows.model_copy(update={"machines": {"old": old, "new": new}})
    (here,) = speed_warnings(rows, [W4], cpu=HASWELL)
    assert "is slower than float32 MatMul on here: 0.5 × with 128 tokens (old, 2026-11-24)" in here
    assert speed_warnings(rows, [W4], cpu=ZEN_4) == []
    (elsewhere,) = speed_warnings(rows, [W4], cpu=GRAVITON)
    assert "is sometimes slower" in elsewhere
    assert "(old, another CPU than this one, 2026-11-24)" in elsewhere


def test_what_was_measured_and_is_not_slower_speaks_for_its_layers() -> None:
    assert speed_warnings(target(speed(0.5)), [W4], measured(1.2)) == []
    assert len(speed_warnings(target(speed(0.5)), [W4], measured(0.9))) == 1
    cached = Scheme("int8", PerToken(), dynamic=True)
    row = SiteRow(kernel=("",), cache=SchemeRow(format=("int8",)))
    change = CacheChange("past", "present", "float32", "int8", 8, 2, cached)
    cache = SiteReport(name="k", module_path="k", op="key cache", status="quantized", cache=change)
    assert len(speed_warnings(target(speed(0.5), sites=row), [cache], measured(1.2))) == 1


@pytest.mark.parametrize(("found", "warned"), [
    (measured(0.8), True), (measured(0.8, 0.7, 0.9), True), (measured(0.98, 0.9, 1.1), False), (measured(1.0), False),
    (measured(1.5, 0.8, 2.0), False), (None, False),
])  # fmt: skip
def test_a_result_that_is_slower_beyond_doubt_is_warned_of(found: Speedup | None, warned: bool) -> None:
    assert bool(measured_warnings(found)) == warned


def test_the_warning_has_the_measured_ratio_and_what_belongs_to_it() -> None:
    (text,) = measured_warnings(measured(0.8, 0.75, 0.85))
    assert text == (
        "the compiled model is slower than the float one: 0.8 × (0.75 … 0.85), 20 ms → 25 ms of CPU a run "
        "(x [4, 16], 1 thread, x86_64 (avx2)); `qcompiler bench FLOAT OUT` tells which operators the time goes to"
    )


def report(*classes: SpeedClass) -> Report:
    return Report("w4", "ort-cpu", [W4], Sizes(8, 2, 8, 2), pictures=Pictures(speed=classes), warnings=["other"])


def test_a_report_has_what_was_measured_or_why_it_was_not() -> None:
    found = report()
    with_speed(found, measured(2.0, 1.9, 2.1))
    assert figure(found) == (
        "2×",
        "20 ms → 10 ms of CPU a run here, x [4, 16], 1 thread; middle half 1.9 … 2.1×",
        "good",
    )
    assert found.warnings == ["other"]
    assert Report.from_json(found.to_json()) == found
    with_speed(found, measured(0.5, rounds=1))
    assert figure(found)[1] == "20 ms → 40 ms of CPU a run here, x [4, 16], 1 thread"
    assert figure(found)[2] == "bad"
    assert found.warnings[0].startswith("the compiled model is slower")
    assert found.warnings[-1] == "other"
    with_speed(found, measured(1.02))
    assert figure(found)[2] == ""


def test_what_was_not_measured_shows_the_table_in_its_place() -> None:
    here = SpeedClass("MatMulNBits", "W4", 1, (2.0, 4.0, 8.0), ("", "", ""), (False, True, True))
    found = report(here)
    with_speed(found, "nobody asked")
    assert found.speed is None
    assert figure(found) == ("not measured", "nobody asked; its kernels by the target's table: 4 … 8×", "")
    with_speed(found, measured(2.0))
    assert "table" not in figure(found)[1]
    assert figure(report())[1] == "a version of qcompiler wrote this that did not"
    with_speed(empty := report(SpeedClass("", "", 1, (), ())), "nobody asked")
    assert figure(empty)[1] == "nobody asked"


@pytest.mark.parametrize(("ratios", "here", "told"), [
    ((), (), "not measured"), ((2.0,), (True,), "2×"), ((2.0, 3.0), (False, False), "2 … 3×, another CPU"),
    ((2.0, 3.0), (False, True), "3×"), ((2.0, 3.0), (), "2 … 3×, another CPU"),
])  # fmt: skip
def test_the_small_print_is_of_this_cpu(ratios: tuple[float, ...], here: tuple[bool, ...], told: str) -> None:
    assert by_table(SpeedClass("MatMulNBits", "W4", 1, ratios, ("",) * len(ratios), here)) == told


def test_classes_say_which_rows_are_of_this_cpu() -> None:
    for cpu, here in (
        (HASWELL, (True, True, False, False)),
        (ZEN_4, (False, False, True, True)),
        (GRAVITON, (False,) * 4),
    ):
        (one,) = speed_classes(Target.load("ort-cpu"), [W4], cpu)
        assert one.here == here


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
def test_what_a_cpu_without_vnni_runs_slower_than_float(
    kernel: str, weight: Scheme, activation: Scheme | None, warned: str | None
) -> None:
    layer = site(weight, kernel, activation=activation)
    warnings = speed_warnings(Target.load("ort-cpu"), [layer, layer], cpu=HASWELL)
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
