"""Finds where the error of a quantized model comes from, and what to do about it.

diagnosis = debug("float.onnx", "out", calibration="text.txt", tokenizer="tokenizer.json")
diagnosis.alone[0]                  the layer that does most harm to the outputs, all others in float
diagnosis.recipe                    what is proposed, as a recipe for `compile`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import onnx_ir as ir
import yaml

from qcompiler.calibration.samples import Samples, from_python, open_samples
from qcompiler.diagnosis.advice import advise, harm
from qcompiler.diagnosis.caches import find_cache_regions
from qcompiler.diagnosis.measure import LayerErrors, measure
from qcompiler.diagnosis.regions import Region, StoredCache, find_regions
from qcompiler.diagnosis.report import Diagnosis, LayerDiagnosis, Proposal
from qcompiler.diagnosis.rounded_inputs import schemes
from qcompiler.driver.inputs import load
from qcompiler.errors import ModelError, RecipeError
from qcompiler.evaluation.difference import Difference
from qcompiler.formats.scheme import Scheme
from qcompiler.graph.metadata import RECIPE
from qcompiler.graph.model_folder import tokenizer_beside
from qcompiler.recipes import Recipe
from qcompiler.recipes.registry import pass_class
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.stored import quantized_weight
from qcompiler.sites.stored.constants import chain
from qcompiler.targets.kernels import missing_on_cpu

if TYPE_CHECKING:
    from qcompiler.driver.inputs import Data

__all__ = ["Diagnosis", "LayerDiagnosis", "Proposal", "debug"]

SAMPLES = 8
LEAST_NOISE = 1e-6
"""Noise over signal (60 dB) that is put down for the typical input where that is better."""


def debug(
    reference: str | Path | ir.Model, quantized: str | Path | ir.Model, *, calibration: Data,
    tokenizer: str | Path | None = None, samples: int | None = SAMPLES, sequence_length: int | None = None,
    effect_samples: int = 1, memory_limit: int | None = None, progress: bool = False,
) -> Diagnosis:  # fmt: skip
    """Measure the error of each layer, alone and accumulated, and propose what to change.

    The quantized model may be ours, portable or lowered, or another tool's, as long as values have kept their names or
    layers their module paths. What a layer alone does to the outputs is measured on the first `effect_samples` (0: not
    at all), which takes a run of the float model each. Raises ModelError, DataError.
    """
    mine, _ = load(reference)
    theirs = quantized.clone() if isinstance(quantized, ir.Model) else load(quantized)[0]
    if isinstance(quantized, ir.Model):
        canonicalize(theirs)
    absent = missing_on_cpu((node.domain, node.op_type) for node in theirs.graph.all_nodes())
    if absent:
        raise ModelError(
            f"the quantized model has {', '.join(absent)}, which ONNX Runtime does not have for CPUs; "
            "compile it with --target portable, and debug that"
        )
    if _has_codes(mine) and not _has_codes(theirs):
        raise ModelError(
            "the first model has quantized weights and the second one has none; give the float model first"
        )
    regions, missing = find_regions(mine, theirs)
    caches, unexamined = find_cache_regions(mine, theirs)
    regions, missing = [*regions, *caches], [*missing, *unexamined]
    if not regions:
        why = f" ({missing[0].name}: {missing[0].reason})" if missing else ", which has none"
        raise ModelError(f"no layer of the float model was found in the quantized model{why}")
    data = _samples(calibration, mine, reference, tokenizer, samples, sequence_length)
    recipe = _recipe(theirs)
    measured = measure(
        mine, theirs, regions, data, effect_samples=effect_samples, rescaled=_rescales(recipe),
        memory_limit=memory_limit, progress=progress,
    )  # fmt: skip
    typical = max(LEAST_NOISE, median(measured.layers[region.name].before.relative_noise for region in regions))
    layers = [_layer(region, measured.layers[region.name], typical) for region in regions]
    if not any(layer.quantized for layer in layers) and measured.outputs.noise == 0:
        raise ModelError(
            "nothing is quantized in the second model, and it answers as the first one does: there is nothing to find"
        )
    worst_first = sorted(layers, key=lambda layer: (-harm(layer), layer.alone_db))
    together = measured.caches
    proposals, proposed = advise(layers, recipe, measured.outputs.sqnr_db)
    return Diagnosis(
        alone=tuple(worst_first),
        accumulated=tuple(sorted(layers, key=lambda layer: -layer.added_db)),
        output_db=measured.outputs.sqnr_db,
        kl=measured.divergence.kl if measured.divergence.positions else None,
        caches_db=together.outputs.sqnr_db if together is not None and together.outputs is not None else None,
        caches_kl=together.divergence.kl if together is not None and together.divergence is not None else None,
        samples=measured.samples,
        effect_samples=min(effect_samples, measured.samples),
        unmatched=tuple((item.module_path or item.name, item.reason) for item in missing),
        proposals=tuple(proposals),
        recipe=proposed,
    )


def _samples(
    data: Data, model: ir.Model, path: str | Path | ir.Model, tokenizer: str | Path | None, limit: int | None,
    sequence_length: int | None,
) -> Samples:  # fmt: skip
    if isinstance(data, Samples):
        return data if limit is None else data.part(0, limit)
    if not isinstance(data, str):
        return from_python(data, model=model, limit=limit)
    beside = None if isinstance(path, ir.Model) else tokenizer_beside(path)
    found = Path(tokenizer) if tokenizer is not None else beside
    return open_samples(data, model=model, tokenizer=found, limit=limit, sequence_length=sequence_length)


def _has_codes(model: ir.Model) -> bool:
    return any(quantized_weight(node) is not None for node in model.graph)


def _recipe(model: ir.Model) -> Recipe | None:
    """How a model of ours was made; None where its metadata does not tell."""
    text = model.metadata_props.get(RECIPE)
    if text is None:
        return None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"the recipe in the model's metadata is no YAML ({error}); compile it again") from error
    if not isinstance(content, Mapping):
        raise ModelError("the recipe in the model's metadata is no mapping; compile it again")
    return Recipe.from_dict(content, "the recipe in the model's metadata")


def _rescales(recipe: Recipe | None) -> bool:
    """Whether one of the recipe's passes moves scales from one value to another."""
    if recipe is None:
        return False
    try:
        return any(pass_class(step.name).kind == "exact" for step in recipe.passes)
    except RecipeError:  # a pass of somebody else's that is not installed here may do anything
        return True


def _layer(region: Region, errors: LayerErrors, typical: float) -> LayerDiagnosis:
    site = region.site
    stored = site.scheme if isinstance(site, StoredCache) else None
    coded, inputs = ((), ()) if isinstance(site, StoredCache) else (_weights(region), schemes(region))
    kernels = [node.op_type for node in region.nodes if node.op_type == site.node.op_type or node.domain]
    share = None
    if errors.activation is not None and errors.alone.relative > 0:
        share = min(1.0, errors.activation.relative / errors.alone.relative)
    outliers = errors.outliers
    return LayerDiagnosis(
        name=site.name, module_path=site.module_path, block=site.block, op=site.node.op_type,
        kernel=kernels[-1] if kernels else region.nodes[-1].op_type,
        weights=", ".join(map(str, coded)), activations=", ".join(map(str, inputs)),
        cache=str(stored or ""), weight_schemes=coded, activation_schemes=inputs, cache_scheme=stored,
        alone_db=errors.alone.sqnr_db,
        output_db=errors.outputs.sqnr_db if errors.outputs is not None else None,
        kl=errors.divergence.kl if errors.divergence is not None else None,
        before_db=errors.before.sqnr_db, accumulated_db=errors.accumulated.sqnr_db,
        added_db=_added(errors.before, errors.accumulated, typical), activation_share=share,
        channel_outliers=outliers.channels if outliers is not None else None,
        loud_channels=outliers.loud if outliers is not None else None,
        token_outliers=outliers.tokens if outliers is not None else None,
    )  # fmt: skip


def _weights(region: Region) -> tuple[Scheme, ...]:
    """The schemes of the codes that a layer reads, but for codes that are scales of others."""
    found = [weight for node in region.nodes if (weight := quantized_weight(node)) is not None]
    inner = {node for weight in found for node in chain(weight.scale)}
    return tuple(dict.fromkeys(
        weight.scheme for weight in found if weight.node not in inner and weight.scheme is not None
    ))  # fmt: skip


def _added(before: Difference, after: Difference, typical: float) -> float:
    """10 log10 of how much larger relative noise is after than before, both on top of what is typical of inputs."""
    if math.isinf(before.relative_noise):
        return 0.0
    return 10 * math.log10((after.relative_noise + typical) / (before.relative_noise + typical))
