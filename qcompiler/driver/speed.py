"""Times the compiled model beside the float one, on the samples that calibration did not see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.benchmarking.runner import timing_options
from qcompiler.benchmarking.speedup import THREADS, Speedup, speedup
from qcompiler.calibration.samples import Samples
from qcompiler.calibration.stored_past import Adapted
from qcompiler.driver.opening import float_session
from qcompiler.errors import DataError, ModelError
from qcompiler.progress import progress_bar
from qcompiler.targets import Target
from qcompiler.targets.kernels import CPU

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

LARGEST_BYTES = 768 << 20
"""Of a float model that is opened beside the compiled one, each with copies of its weights as its kernels want them."""
NOT_ASKED = "not asked for; `qcompiler bench FLOAT OUT` does it later"


def measured(
    model: str | Path | ir.Model, graph: ir.Model, opened: Callable[[SessionOptions], InferenceSession] | None,
    held_out: Samples | None, target: Target, float_bytes: int, memory_limit: int | None, progress: bool,
) -> Speedup | str:  # fmt: skip
    """How fast `graph`, as `opened` opens it, is beside the `model` that it was made of; or why that is not known.

    `float_bytes` are those of the float model's constants.
    """
    if held_out is None:
        return "there are no samples to run on (--calibration, two or more)"
    if memory_limit is not None:
        return "under a memory limit both models are not opened at once"
    if target.providers[0] != CPU:
        return f"it runs on {target.providers[0]}, and only CPUs are timed"
    if float_bytes > LARGEST_BYTES:
        return "models of this size are not opened at once beside a compilation; `qcompiler bench FLOAT OUT` does that"
    if opened is None:
        return "ONNX Runtime has no kernel for it on this machine"
    try:
        with progress_bar("timing", progress) as report:
            sessions = float_session(model, timing_options(THREADS)), opened(timing_options(THREADS))
            return speedup(*sessions, list(held_out), list(Adapted(held_out, graph)), report)
    except (ModelError, DataError) as error:
        return str(error)
