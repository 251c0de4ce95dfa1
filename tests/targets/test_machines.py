"""Which kind of machine a processor is, by its instruction sets, and that every measured speed says of which it is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from qcompiler.targets import Target, machines, target_names
from qcompiler.targets.machines import Cpu, Machine, this_cpu

HASWELL = Cpu("x86_64", frozenset({"avx2", "fma"}))
ALDER_LAKE = Cpu("x86_64", frozenset({"avx2", "fma", "avx_vnni"}))
ZEN_4 = Cpu("x86_64", frozenset({"avx2", "fma", "avx512f", "avx512_vnni"}))
GRAVITON = Cpu("aarch64", frozenset({"asimd", "asimddp"}))
UNTOLD = Cpu("x86_64")


@pytest.mark.parametrize("name", target_names())
def test_every_speed_names_a_machine_that_the_target_describes(name: str) -> None:
    target = Target.load(name)
    assert {speed.machine for kernel in target.kernels for speed in kernel.speed} == set(target.machines)


@pytest.mark.parametrize(("cpu", "kinds"), [
    (HASWELL, ["x86, AVX2 without VNNI"]), (ZEN_4, ["x86, AVX512-VNNI"]),
    (ALDER_LAKE, []), (GRAVITON, []), (UNTOLD, []),
])  # fmt: skip
def test_a_processor_is_of_one_of_the_kinds_or_of_none(cpu: Cpu, kinds: list[str]) -> None:
    target = Target.load("ort-cpu")
    assert [name for name, machine in target.machines.items() if machine.fits(cpu)] == kinds
    speeds = [speed for kernel in target.kernels for speed in kernel.speed]
    assert {speed.machine for speed in speeds if target.is_for(speed, cpu)} == set(kinds)


def test_an_architecture_is_asked_for() -> None:
    assert Machine(architectures=("aarch64",), has=("asimd",)).fits(GRAVITON)
    assert not Machine(architectures=("aarch64",)).fits(ZEN_4)


def test_a_processor_is_read_where_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for text, shown in (
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni avx512f\n", "x86_64 (avx2, avx512f, avx512_vnni)"),
        ("Features\t: asimd\n", "x86_64 (no vector extensions known)"),
        (None, "x86_64 (no vector extensions known)"),
    ):
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(machines, "CPU_INFO", file)
        this_cpu.cache_clear()
        assert str(this_cpu()) == shown
    this_cpu.cache_clear()
