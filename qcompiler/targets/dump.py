"""Write the kernel table of the installed onnxruntime: `python -m qcompiler.targets.dump FILE [PROVIDER]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from qcompiler.targets.host_memory import host_memory
from qcompiler.targets.kernels import CPU, KernelTable, installed_kernels, installed_signatures, write


def main(path: Path, provider: str = CPU) -> None:
    """Write the table of the installed onnxruntime."""
    import onnxruntime

    kernels = installed_kernels(provider)
    signatures = installed_signatures(kernels)
    if provider != CPU:
        memory = host_memory(kernels)
        none: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        for index, kernel in enumerate(kernels):
            inputs, outputs = memory.get((kernel.domain, kernel.op, kernel.since), none)
            kernels[index] = replace(kernel, host_inputs=inputs, host_outputs=outputs)
    distribution = "onnxruntime" if provider == CPU else "onnxruntime-gpu"
    write(path, KernelTable(f"{distribution} {onnxruntime.__version__}, {provider}", tuple(kernels), signatures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
