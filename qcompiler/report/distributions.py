"""Measures the distributions that the report shows: channels of activations, values of weights, scales of codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.functions.library import block_scales, codebook_format
from qcompiler.graph.edit import constant
from qcompiler.graph.lazy import read
from qcompiler.report.facts import SiteFacts
from qcompiler.report.pictures import ChannelPicture, WeightPicture
from qcompiler.rewriting.contract import PassRun
from qcompiler.sites.find import Linear, weight_decoder
from qcompiler.statistics import ChannelAbsMax, ChannelMoments, ChannelRange, SecondMoment, Statistic, StatisticsStore

BARS = 96  # channels that are drawn apart, at most, for one value
ALL_BARS = 24_000  # for all values together, so that a model of a hundred blocks has a small report, too
FEWEST_BARS = 24
BINS = 31
SAMPLED_ROWS = 48  # of a weight; rows, as a memory-mapped file is read by the page
SAMPLED_VALUES = 65_536
QUANTILES = (0, 5, 25, 50, 75, 95, 100)

Array = npt.NDArray[Any]


def channel_pictures(
    facts: Sequence[SiteFacts], runs: Sequence[PassRun], statistics: StatisticsStore
) -> tuple[ChannelPicture, ...]:
    """Every value that linear layers read and of whose channels something was measured, in graph order.

    `statistics` are those at the end: of the rescaled values.
    """
    readers: dict[str, list[str]] = defaultdict(list)
    for item in facts:
        if isinstance(item.site, Linear):
            readers[item.input].append(item.name)
    measured: dict[str, list[Statistic]] = defaultdict(list)
    for value, statistic in statistics:
        measured[value].append(statistic)
    known = {value: found for value in readers if (found := _magnitudes(measured[value])) is not None}
    bars = max(min(BARS, ALL_BARS // (2 * max(len(known), 1))), FEWEST_BARS)
    pictures = []
    for value, (measure, after) in known.items():
        divisors = [(run.step.name, run.changes.rescaled[value]) for run in runs if value in run.changes.rescaled]
        before = after * np.prod([np.abs(divisor) for _, divisor in divisors], axis=0) if divisors else after
        pictures.append(
            ChannelPicture(
                value=value, sites=tuple(readers[value]), measure=measure, channels=after.size,  # type: ignore[arg-type]
                before=_bars(before, bars), after=_bars(after, bars) if divisors else (),
                spread_before=_spread(before), spread_after=_spread(after) if divisors else None,
                passes=tuple(dict.fromkeys(name for name, _ in divisors)),
            )
        )  # fmt: skip
    return tuple(pictures)


def weight_pictures(facts: Sequence[SiteFacts], reference: ir.Model, portable: ir.Model) -> tuple[WeightPicture, ...]:
    """Every site with a weight; the scales are the portable model's, where each weight has its DequantizeLinear."""
    after = {node.name: node for node in portable.graph.all_nodes()}
    pictures = []
    for item in facts:
        tensor = constant(reference.graph.initializers.get(item.constant))
        if tensor is None or not tensor.dtype.is_floating_point() or 0 in tuple(tensor.shape.numpy()):
            continue
        sample = _sampled(tensor)
        if not sample.size:
            continue
        absmax = float(np.abs(sample).max())
        counts = np.histogram(sample, BINS, (-absmax, absmax))[0] if absmax else np.zeros(BINS, int)
        node = after.get(item.name)
        scales = _scales(weight_decoder(node) if node is not None else None)
        pictures.append(
            WeightPicture(
                site=item.name, absmax=_digits(absmax), rms=_digits(float(np.sqrt(np.mean(np.square(sample))))),
                histogram=tuple(int(count) for count in counts),
                scales=tuple(_digits(float(q)) for q in np.percentile(scales, QUANTILES)) if scales.size else (),
                scale_count=scales.size,
            )
        )  # fmt: skip
    return tuple(pictures)


def _magnitudes(statistics: Iterable[Statistic]) -> tuple[str, Array] | None:
    """(measure, one number a channel), the largest magnitudes where they are known."""
    found: dict[str, Array] = {}
    for statistic in statistics:
        match statistic:
            case ChannelRange(axis=-1):
                lo, hi = statistic.result()
                found["absmax"] = np.maximum(-lo, hi)
            case ChannelAbsMax(axis=-1):
                found["absmax"] = statistic.result()
            case ChannelMoments():
                found["rms"] = np.sqrt(statistic.result())
            case SecondMoment():
                found["rms"] = np.sqrt(np.maximum(np.diagonal(statistic.result()), 0))
    measure = next((name for name in ("absmax", "rms") if name in found), None)
    return (measure, found[measure].astype(np.float64)) if measure is not None else None


def _bars(channels: Array, bars: int) -> tuple[float, ...]:
    width = -(-channels.size // bars)
    starts = np.arange(0, channels.size, width)
    return tuple(_digits(float(largest)) for largest in np.maximum.reduceat(channels, starts))


def _spread(channels: Array) -> float:
    median = float(np.median(channels))
    return _digits(float(channels.max()) / median) if median > 0 else float("inf")


def _sampled(tensor: ir.TensorProtocol) -> Array:
    """Finite numbers of evenly spread rows, at most SAMPLED_VALUES."""

    def compute(data: Array) -> Array:
        rows = data.reshape(len(data), -1) if data.ndim > 1 else data.reshape(1, -1)
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int))]
        step = -(-chosen.size // SAMPLED_VALUES)
        sample: Array = chosen.reshape(-1)[::step].astype(np.float64)
        return sample[np.isfinite(sample)]

    return read(tensor, compute)


def _scales(dequantize: ir.Node | None) -> Array:
    if dequantize is None or len(dequantize.inputs) < 2:
        return np.zeros(0)
    if codebook_format(dequantize) is not None:
        found = block_scales(dequantize)
        return np.zeros(0) if found is None else np.abs(found.reshape(-1).astype(np.float64))
    tensor = constant(dequantize.inputs[1])
    if tensor is None or not tensor.dtype.is_floating_point():
        return np.zeros(0)

    def magnitudes(data: Array) -> Array:
        found: Array = np.abs(data.reshape(-1).astype(np.float64))
        return found

    scales: Array = read(tensor, magnitudes)
    return scales


def _digits(number: float) -> float:
    """Three significant digits, which is more than a drawing shows."""
    return float(f"{number:.3g}")
