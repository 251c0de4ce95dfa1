"""Measures the error of each layer: alone, by its part on the outputs, and in the company of all others.

    sweep 1     the float model: keeps what layers read and write
    sweep 2     the quantized model: the error that has piled up at each layer
    regions     each layer of the quantized model fed with the float model's values: its error alone
    injection   the float model with that error added at one layer: what it alone does to the outputs

No session holds more than a part of a model where memory is limited; what does not fit there goes to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Samples
from qcompiler.calibration.stored_past import Adapted
from qcompiler.diagnosis.channels import Outliers, Rescaling
from qcompiler.diagnosis.effects import Deltas, inject
from qcompiler.diagnosis.regions import STORED, Cut, Region, StoredCache, model_of
from qcompiler.diagnosis.rounded_inputs import Rounded, rounded_input
from qcompiler.errors import DataError, ModelError
from qcompiler.evaluation.difference import Difference, feature_maps
from qcompiler.evaluation.likelihood import Divergence
from qcompiler.progress import progress_bar
from qcompiler.sessions import segments
from qcompiler.sessions.session import Kept, Session
from qcompiler.sites.analyses import caches_of
from qcompiler.sites.caches import Cache
from qcompiler.sites.find import Linear

KEPT_BYTES = 1 << 30
"""What values may take in memory where no limit is given; the rest lies on disk."""
SESSION_BYTES = 1 << 30
"""Constants of the regions that are run together, likewise."""
MOST_REGIONS = 64
ALONE = "alone:"


@dataclass
class LayerErrors:
    """What was measured of one layer."""

    alone: Difference = field(default_factory=Difference)
    """Of its output, where the float model's values go in."""
    activation: Difference | None = None
    """The same where its input is rounded and its weight is not; None where the input is not, or inside a kernel."""
    accumulated: Difference = field(default_factory=Difference)
    """Of its output in the quantized model."""
    before: Difference = field(default_factory=Difference)
    """Of its input in the quantized model."""
    outliers: Outliers | None = None
    outputs: Difference | None = None
    """Of the model's outputs where this layer alone is quantized; None where that was not measured."""
    divergence: Divergence | None = None
    """The same for logits."""


@dataclass
class Measured:
    layers: dict[str, LayerErrors]
    """By the site's name."""
    outputs: Difference
    """Of the model's outputs, all layers quantized."""
    divergence: Divergence
    samples: int
    caches: LayerErrors | None
    """Outputs and divergence with all quantized caches; None where there are none, or that was not measured."""


def measure(
    reference: ir.Model, candidate: ir.Model, regions: Sequence[Region], samples: Samples, *,
    effect_samples: int = 1, rescaled: bool = False, memory_limit: int | None = None, progress: bool = False,
) -> Measured:  # fmt: skip
    """Run both models and the regions on the samples.

    `rescaled` says that an exact pass has scaled channels of values, which is found and taken out. What each layer does
    to the outputs is measured on the first `effect_samples`. Raises ModelError, DataError.
    """
    main = _main_outputs(reference, candidate)
    found = {region.name: LayerErrors() for region in regions}
    capacity = KEPT_BYTES if memory_limit is None else int(memory_limit * segments.KEPT_SHARE)
    with Kept(capacity) as kept:
        count = _run_reference(reference, regions, main, samples, found, kept, memory_limit, progress)
        scales = {name: Rescaling() for name in _names(regions)} if rescaled else {}
        outputs, divergence = _run_candidate(
            reference, candidate, regions, main, samples, found, scales, kept, memory_limit, progress
        )
        deltas = Deltas(kept, min(effect_samples, count))
        with progress_bar("layers alone", progress) as report:
            done = 0
            for group in _groups(regions, memory_limit):
                _run_regions(candidate, reference, group, found, scales, kept, deltas, count, memory_limit)
                done += len(group)
                if report is not None:
                    report(done, len(regions))
        caches = _measure_effects(reference, regions, main, samples, found, kept, deltas, memory_limit, progress)
    return Measured(found, outputs, divergence, count, caches)


def _main_outputs(reference: ir.Model, candidate: ir.Model) -> list[str]:
    """What the models are for: outputs of both that are no caches."""
    caches = {str(cache.present.name) for cache in caches_of(reference) if isinstance(cache, Cache)}
    theirs = {str(value.name) for value in candidate.graph.outputs}
    numbers = (value for value in reference.graph.outputs if value.dtype is None or value.dtype.is_floating_point())
    mine = [str(value.name) for value in numbers if value.name not in caches]
    found = [name for name in mine if name in theirs]
    if not found:
        raise ModelError(
            f"no output of the float model ({', '.join(mine) or 'which has none of floats'}) is one of the quantized "
            f"model ({', '.join(sorted(theirs - caches))}); give outputs the same names"
        )
    return found


def _names(regions: Sequence[Region]) -> set[str]:
    """Values of the float model that regions read or write."""
    return {name for region in regions for name in (*region.shared.values(), str(region.site.output.name))}


# ---------------------------------------------------------------------------------------------------- both models


def _run_reference(
    model: ir.Model, regions: Sequence[Region], main: Sequence[str], samples: Samples, found: dict[str, LayerErrors],
    kept: Kept, memory_limit: int | None, progress: bool,
) -> int:  # fmt: skip
    readers: dict[str, list[Region]] = {}
    for region in regions:
        if isinstance(region.site, Linear):
            readers.setdefault(str(region.site.input.name), []).append(region)
    seen: dict[str, Outliers] = {}
    ran = 0

    def keep(name: str, sample: int, array: np.ndarray) -> None:
        nonlocal ran
        ran = max(ran, sample + 1)
        kept.put(name, sample, array)
        if name in readers:
            seen.setdefault(name, Outliers()).update(array)

    with progress_bar("running the float model", progress) as report:
        wanted = _names(regions) | set(main) | set(readers)
        segments.run(model, samples, wanted, keep, memory_limit=memory_limit, progress=report)
    for name, outliers in seen.items():
        for region in readers[name]:
            found[region.name].outliers = outliers
    return ran


def _run_candidate(
    reference: ir.Model, model: ir.Model, regions: Sequence[Region], main: Sequence[str], samples: Samples,
    found: dict[str, LayerErrors], scales: Mapping[str, Rescaling], kept: Kept, memory_limit: int | None,
    progress: bool,
) -> tuple[Difference, Divergence]:  # fmt: skip
    """Compare the quantized model with what was kept, value by value."""
    outputs, divergence = Difference(), Divergence()
    names = {str(value.name): original for region in regions for value, original in region.shared.items()}
    names |= {str(region.output.name): str(region.site.output.name) for region in regions}
    errors = {original: Difference() for original in names.values()}
    maps = feature_maps(reference)
    stored = {str(value.name) for region in regions for value in region.inputs.keys() - region.shared.keys()}

    def compare(name: str, sample: int, array: np.ndarray) -> None:
        if name in stored:
            kept.put(STORED + name, sample, array)
        if name in main:
            expected = _same_shape(name, kept.get(name, sample), array)
            outputs.update(expected, array, whole=name in maps)
            if _is_logits(name, array):
                divergence.update(expected, array)
        original = names.get(name)
        if original is None or array.dtype.kind not in "fV":
            return
        expected = _same_shape(name, kept.get(original, sample), array)
        errors[original].update(expected, array, whole=original in maps)
        if original in scales:
            scales[original].update(expected, array)

    with progress_bar("running the quantized model", progress) as report:
        read = Adapted(samples, model)
        segments.run(model, read, {*names, *main, *stored}, compare, memory_limit=memory_limit, progress=report)
    for original, scaling in scales.items():
        if scaling.found:
            errors[original] = scaling.difference()
    for region in regions:
        mine = found[region.name]
        mine.accumulated = errors[str(region.site.output.name)]
        floats = [errors[name] for name in region.shared.values() if errors[name].signal]
        mine.before = max(floats, key=lambda error: error.relative_noise, default=Difference())
    return outputs, divergence


def _same_shape(name: str, expected: np.ndarray, array: np.ndarray) -> np.ndarray:
    if expected.shape != array.shape:
        raise DataError(
            f"{name!r} has the shape {list(expected.shape)} in the float model and {list(array.shape)} in the "
            "quantized one; give the float model that it was made from"
        )
    return expected


def _is_logits(name: str, array: np.ndarray) -> bool:
    return name == "logits" and array.ndim == 3


# ---------------------------------------------------------------------------------------------------- layers alone


def _groups(regions: Sequence[Region], memory_limit: int | None) -> Iterator[list[Region]]:
    """Regions that are run together: their constants fit the budget."""
    budget = SESSION_BYTES if memory_limit is None else int(memory_limit * segments.WEIGHT_SHARE)
    group: list[Region] = []
    total = 0
    for region in regions:
        constants = {value for node in region.nodes for value in node.inputs if value is not None}
        size = sum(value.const_value.nbytes for value in constants if value.const_value is not None)
        if group and (total + size > budget or len(group) == MOST_REGIONS):
            yield group
            group, total = [], 0
        group.append(region)
        total += size
    if group:
        yield group


def _run_regions(
    candidate: ir.Model, reference: ir.Model, regions: Sequence[Region], found: dict[str, LayerErrors],
    scales: Mapping[str, Rescaling], kept: Kept, deltas: Deltas, count: int, memory_limit: int | None,
) -> None:  # fmt: skip
    rounded = {region.name: rounded_input(region) for region in regions}
    maps = feature_maps(reference)
    cuts = []
    for region in regions:
        extra = rounded[region.name]
        outputs = {region.output: ALONE + region.name}
        outputs |= {value: f"{region.name}:{value.name}" for value in (extra.values if extra else ())}
        cuts.append(Cut(region.nodes, region.inputs, outputs))
    quantized = _session(model_of(cuts, candidate, kept.types), kept, memory_limit)
    sites = [region for region in regions if rounded[region.name] is not None]
    floats = _float_session(reference, sites, kept, memory_limit) if sites else None
    for sample in range(count):
        results = dict(quantized.run(_feed(quantized, scales, kept, sample), sample))
        for region in regions:
            name = str(region.site.output.name)
            expected = kept.get(name, sample)
            alone = _restored(results[ALONE + region.name], scales.get(name))
            found[region.name].alone.update(expected, alone, whole=name in maps)
            deltas.put(region.name, sample, (alone - expected.astype(alone.dtype)).astype(expected.dtype))
        if floats is not None:
            _measure_activations(floats, sites, rounded, results, found, scales, kept, sample)


def _measure_activations(
    floats: _Part, sites: Sequence[Region], rounded: Mapping[str, Rounded | None], results: Mapping[str, np.ndarray],
    found: dict[str, LayerErrors], scales: Mapping[str, Rescaling], kept: Kept, sample: int,
) -> None:  # fmt: skip
    """What rounding the input alone does to each layer: the float layer fed with the rounded input."""
    feeds = {}
    for region in sites:
        extra = rounded[region.name]
        assert extra is not None
        source = kept.get(extra.source, sample)
        arrays = [results[f"{region.name}:{value.name}"] for value in extra.values]
        scaling = scales.get(extra.source)
        theirs = source * scaling.factor if scaling is not None and scaling.found else source
        array = _restored(extra.dequantized(arrays, theirs), scaling)
        feeds[region.name] = array.reshape(source.shape).astype(source.dtype)
    for name, array in floats.session.run(feeds, sample):
        region = next(region for region in sites if ALONE + region.name == name)
        expected = kept.get(str(region.site.output.name), sample)
        errors = found[region.name]
        errors.activation = errors.activation or Difference()
        errors.activation.update(expected, array)


@dataclass(frozen=True)
class _Part:
    """A session of cuts, and the types of what it reads."""

    session: Session
    inputs: Mapping[str, ir.DataType]

    def run(self, feeds: Mapping[str, np.ndarray], sample: int) -> Iterator[tuple[str, np.ndarray]]:
        return self.session.run(feeds, sample)


def _session(model: ir.Model, kept: Kept, memory_limit: int | None) -> _Part:
    inputs = {str(value.name): value.dtype or ir.DataType.FLOAT for value in model.graph.inputs}
    outputs = [str(value.name) for value in model.graph.outputs]
    return _Part(Session.of_part(model, list(inputs), outputs, kept, limited=memory_limit is not None), inputs)


def _float_session(reference: ir.Model, sites: Sequence[Region], kept: Kept, memory_limit: int | None) -> _Part:
    cuts, types = [], {}
    for region in sites:
        site = region.site
        assert isinstance(site, Linear)
        nodes = [node for node in (site.transpose, site.node, site.bias_node) if node is not None]
        cuts.append(Cut(tuple(nodes), {site.input: region.name}, {site.output: ALONE + region.name}))
        types[region.name] = kept.types[str(site.input.name)]
    return _session(model_of(cuts, reference, types), kept, memory_limit)


def _feed(part: _Part, scales: Mapping[str, Rescaling], kept: Kept, sample: int) -> dict[str, np.ndarray]:
    feeds = {}
    for name, dtype in part.inputs.items():
        array = kept.get(name, sample)
        if name in scales and scales[name].found:
            array = array * scales[name].factor
        feeds[name] = array.astype(dtype.numpy())
    return feeds


def _restored(array: np.ndarray, scaling: Rescaling | None) -> np.ndarray:
    """An array of the quantized model in the float model's scale."""
    wide = array.astype(np.float32)
    return wide / scaling.factor.astype(np.float32) if scaling is not None and scaling.found else wide


# ---------------------------------------------------------------------------------------------------- on the outputs


def _measure_effects(
    reference: ir.Model, regions: Sequence[Region], main: Sequence[str], samples: Samples,
    found: Mapping[str, LayerErrors], kept: Kept, deltas: Deltas, memory_limit: int | None, progress: bool,
) -> LayerErrors | None:  # fmt: skip
    """What each region alone does to the outputs, and what all caches do together, which is returned."""
    if not deltas.samples:
        return None
    caches = [region for region in regions if isinstance(region.site, StoredCache)]
    for errors in found.values():
        errors.outputs = Difference()
    together = LayerErrors(outputs=Difference())
    maps = feature_maps(reference)

    def measure(sites: tuple[str, ...], name: str, sample: int, array: np.ndarray) -> None:
        errors = together if len(sites) > 1 else found[sites[0]]
        expected = kept.get(name, sample)
        assert errors.outputs is not None
        errors.outputs.update(expected, array, whole=name in maps)
        if _is_logits(name, array):
            errors.divergence = errors.divergence or Divergence()
            errors.divergence.update(expected, array)

    feeds = list(samples.part(0, deltas.samples))
    with progress_bar("one layer quantized at a time", progress) as report:
        inject(reference, regions, caches, main, feeds, kept, deltas, measure, memory_limit, report)
    if len(caches) == 1:
        return found[caches[0].name]
    return together if caches else None
