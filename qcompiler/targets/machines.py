"""Kinds of machines that speeds are measured on, and which of them this one is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

CPU_INFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "AMD64")
TOLD = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
"""Instruction sets that decide which integer kernels run."""


@dataclass(frozen=True)
class Cpu:
    """What of a processor matters for speed."""

    architecture: str
    """As `platform.machine` says it."""
    flags: frozenset[str] = frozenset()
    """Its instruction sets, by the names that Linux has for them; empty where the system does not tell."""

    def __str__(self) -> str:
        sets = [name for name in TOLD if name in self.flags]
        return f"{self.architecture} ({', '.join(sets) or 'no vector extensions known'})"


class Machine(BaseModel):
    """A kind of machine, by instruction sets that it has and others that it lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architectures: tuple[str, ...] = X86
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def fits(self, cpu: Cpu) -> bool:
        """Whether the processor is of this kind; one that does not tell its instruction sets is of none."""
        return cpu.architecture in self.architectures and cpu.flags >= set(self.has) and not cpu.flags & set(self.lacks)


@cache
def this_cpu() -> Cpu:
    """The processor of this machine."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return Cpu(platform.machine(), frozenset(flags.split()))
