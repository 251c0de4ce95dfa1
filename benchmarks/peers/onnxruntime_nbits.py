"""onnxruntime's own weight-only quantization, `matmul_nbits_quantizer`, with 4 bits.

It takes MatMuls whose weight is an initializer, so a lm_head that reads a Transpose of the embedding stays float; the
products compute in float32 (no accuracy level).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx


class Reader:
    """onnxruntime's CalibrationDataReader over samples in memory."""

    def __init__(self, samples: Sequence[dict[str, np.ndarray]]) -> None:
        self._samples = samples

    def __iter__(self) -> Any:
        return iter(self._samples)


Make = Callable[[Any, int, bool, Sequence[dict[str, np.ndarray]]], Any]
ALGORITHMS: dict[str, Make] = {
    "default": lambda q, group, symmetric, samples: q.DefaultWeightOnlyQuantConfig(
        block_size=group, is_symmetric=symmetric
    ),
    "RTN": lambda q, group, symmetric, samples: q.RTNWeightOnlyQuantConfig(),
    "GPTQ": lambda q, group, symmetric, samples: q.GPTQWeightOnlyQuantConfig(Reader(samples)),
    "HQQ": lambda q, group, symmetric, samples: q.HQQWeightOnlyQuantConfig(block_size=group),
    "k_quant": lambda q, group, symmetric, samples: q.KQuantWeightOnlyQuantConfig(),
}
ASYMMETRIC_ONLY = ("HQQ", "k_quant")


def quantize(
    source: Path, output: Path, algorithm: str, group: int, symmetric: bool, samples: Sequence[dict[str, np.ndarray]]
) -> None:
    """Write `source` with its linear layers in 4 bits. `samples` are inputs of the model, which GPTQ alone reads."""
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.disable(logging.INFO)  # it tells of each node
    model = onnx.load(source)
    config = ALGORITHMS[algorithm](matmul_nbits_quantizer, group, symmetric, samples)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        model, block_size=group, is_symmetric=symmetric, algo_config=config
    )
    quantizer.process()
    output.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(quantizer.model.model, output)
