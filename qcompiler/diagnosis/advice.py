"""Proposes what to leave in float, or which recipe to take, from what was measured. Each rule is a function.

Rules, in order; the first one that holds decides the recipe:

1.  A few layers do much of the harm (each 8 times that of the median layer and at least 5 % of all, together a third):
    they are left out. More than a tenth of the layers are not a few. Layers that are only sensitive, and rounded no
    worse than others, wait for rule 4 where there is a better rounding for them, as that costs nothing at run time.
2.  KV-caches make most of the error: 8 bits instead of 4, else they stay in float.
3.  Inputs make most of the error. With loud channels: smoothquant, which moves them into the weights; where they are
    smoothed already or more than 100 times as loud as others, llm-int8, which keeps them in float. With one range for
    all: a range for each token. Else: inputs stay float.
4.  Weights make most of the error. Rounded to nearest in 4 bits or fewer: gptq; already gptq: all of its options, then
    4 bits instead of fewer, narrower groups, 8 bits. In 8 bits: a scale for each channel, or else for each group.

A proposal changes what it is about. What the recipe does to other things (caches, left-out layers) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from qcompiler.diagnosis.report import LayerDiagnosis, Proposal
from qcompiler.formats.scheme import Granularity, PerTensor, PerToken, Scheme
from qcompiler.recipes import Calibration, Recipe, Step

FEW = 0.1
TIMES_MEDIAN = 8.0
LEAST_SHARE = 0.05
LEAST_TOGETHER = 1 / 3
LOUD = 10.0
VERY_LOUD = 100.0
SMALL_GROUP = 32
STANDS_OUT_DB = 6.0
CACHE_PASSES = ("fuse-attention", "quantize-kv-cache")
SUFFIX = "-debugged"
GOOD_DB = 40.0
"""Outputs this near to the float model's need no advice."""


def advise(
    layers: Sequence[LayerDiagnosis], recipe: Recipe | None, output_db: float
) -> tuple[list[Proposal], Recipe | None]:
    """Proposals, and the recipe that does what they say; None where there is nothing to say.

    `recipe` is how the model was made; None where it does not tell, as with models of other tools.
    """
    quantized = [layer for layer in layers if layer.quantized]
    if not quantized:
        return [], None
    worst = worst_layers(quantized)
    base = recipe if recipe is not None else _like(quantized)
    if worst and not (_only_sensitive(worst, quantized) and _rounds_better(worst, base)):
        paths = tuple(dict.fromkeys(_pattern(layer, layers) for layer in worst))
        proposals = [Proposal(f"leave {_pattern(layer, layers)} in float", _blame(layer, quantized),
                              (_pattern(layer, layers),)) for layer in worst]  # fmt: skip
        named = base.model_copy(update={"exclude": (*base.exclude, *(p for p in paths if p not in base.exclude))})
        return proposals, _renamed(named)
    if output_db > GOOD_DB:
        return [], None
    total = sum(harm(layer) for layer in quantized)
    caches = [layer for layer in quantized if layer.cache]
    if sum(harm(layer) for layer in caches) > total / 2:
        return _caches(caches, base)
    layers = [layer for layer in quantized if not layer.cache]
    inputs = [layer for layer in layers if layer.activation_share is not None]
    if sum(harm(layer) * (layer.activation_share or 0.0) for layer in inputs) > total / 2:
        return _inputs([layer for layer in inputs if layer.cause != "weights"], base)
    return _weights(layers, base, recipe)


def harm(layer: LayerDiagnosis) -> float:
    """What a layer does to the outputs: KL, or noise over signal; where that was not measured, to its own output."""
    if layer.kl is not None:
        return max(layer.kl, 0.0) if layer.kl == layer.kl else float("inf")
    decibels = layer.output_db if layer.output_db is not None else layer.alone_db
    return float(10 ** (-decibels / 10)) if decibels == decibels else float("inf")


def worst_layers(layers: Sequence[LayerDiagnosis]) -> list[LayerDiagnosis]:
    """The few that do most of the harm, the worst first; empty where the harm is spread."""
    harms = {layer.name: harm(layer) for layer in layers}
    typical, total = median(harms.values()), sum(harms.values())
    if total == 0:
        return []
    found = [layer for layer in layers
             if harms[layer.name] > TIMES_MEDIAN * typical and harms[layer.name] >= LEAST_SHARE * total]  # fmt: skip
    found.sort(key=lambda layer: -harms[layer.name])
    together = sum(harms[layer.name] for layer in found)
    return found if len(found) <= max(1, FEW * len(layers)) and together >= LEAST_TOGETHER * total else []


def _only_sensitive(worst: Sequence[LayerDiagnosis], layers: Sequence[LayerDiagnosis]) -> bool:
    """Whether the worst layers are rounded as well as others, and the model just depends on them more."""
    return all(layer.alone_db > median(other.alone_db for other in layers) - STANDS_OUT_DB for layer in worst)


def _rounds_better(worst: Sequence[LayerDiagnosis], base: Recipe) -> bool:
    """Whether weights of 4 bits or fewer could be rounded better than they are, in the same format."""
    step = next((step for step in base.passes if step.name == "gptq"), None)
    best = step is not None and bool(step.options.get("act_order"))
    return not best and all(layer.cause == "weights" and _bits(layer) <= 4 for layer in worst)


def _blame(layer: LayerDiagnosis, layers: Sequence[LayerDiagnosis]) -> str:
    total = sum(harm(other) for other in layers)
    share = harm(layer) / total if total < float("inf") else 1.0
    what = "of the error at the outputs comes" if layer.output_db is not None else "of the layers' errors comes"
    text = f"{share:.0%} {what} from this layer alone ({layer.cache or layer.weights or layer.activations})"
    if layer.cause == "activations":
        text += f", {layer.activation_share:.0%} of its own from rounding its input"
    if layer.cause == "weights" and layer.activation_share is not None:
        text += f", {1 - layer.activation_share:.0%} of its own from rounding its weight"
    return text


def _pattern(layer: LayerDiagnosis, layers: Sequence[LayerDiagnosis]) -> str:
    """What names this layer and no other."""
    path = layer.module_path
    alike = [other for other in layers if path in (other.module_path, other.name)]
    return path if path and len(alike) == 1 else layer.name


# ---------------------------------------------------------------------------------------------------- caches


def _caches(layers: Sequence[LayerDiagnosis], base: Recipe) -> tuple[list[Proposal], Recipe | None]:
    worst = max(layers, key=harm)
    reason = f"storing keys and values as {worst.cache} makes most of the error"
    if worst.cache_scheme is not None and worst.cache_scheme.number_format.bits < 8:
        return _changed(base, "quantize-kv-cache", {"format": "int8"}, "8 bits for caches instead of 4", reason)
    rest = tuple(step for step in base.passes if step.name != "quantize-kv-cache")
    if not rest or len(rest) == len(base.passes):  # nothing would be left of the recipe, or it is not known
        return [Proposal("leave the KV-caches in float", reason)], None
    return [Proposal("leave the KV-caches in float", reason)], _renamed(base.model_copy(update={"passes": rest}))


# ---------------------------------------------------------------------------------------------------- inputs


def _inputs(layers: Sequence[LayerDiagnosis], base: Recipe) -> tuple[list[Proposal], Recipe | None]:
    layers = _worst_half(layers)
    worst = max(layers, key=harm)
    channels = max(layer.channel_outliers or 1.0 for layer in layers)
    smoothed = any(step.name == "smooth-quant" for step in base.passes)
    blame = f"rounding inputs makes {_share(layers)} of the error of the worst layers"
    loudest = f"their loudest channel is {channels:.0f} times as loud as the median one"
    if worst.kernel == "MatMulNBits":
        return _float_inputs(base, f"{blame}, which {worst.kernel} does in its kernel")
    if channels >= LOUD and not smoothed and channels < VERY_LOUD:
        name = "smoothquant-o1" if _has(PerToken, worst.activation_schemes) else "smoothquant"
        return _take(name, base, f"{blame}, and {loudest}: smoothing moves such channels into the weights")
    if channels >= LOUD and base.name.removesuffix(SUFFIX) != "llm-int8":
        why = "smoothing has not been enough" if smoothed else "too much for smoothing"
        return _take("llm-int8", base, f"{blame}, and {loudest} ({why}): llm-int8 keeps such channels in float")
    if _has(PerTensor, worst.activation_schemes):
        tokens = max(layer.token_outliers or 1.0 for layer in layers)
        reason = f"{blame} with one range for all tokens (the loudest token is {tokens:.1f} times the median one)"
        if smoothed:
            return _per_token(base, reason)
        return _take("int8-dynamic", base, f"{reason}: give each token a scale")
    return _take("int8-weights", base, f"{blame}, without outliers that could be moved: leave the inputs in float")


def _per_token(base: Recipe, reason: str) -> tuple[list[Proposal], Recipe]:
    """The same recipe with a scale for each token; other options of how inputs are rounded do not go with that."""
    kept = ("layers", "targets", "ignore")
    steps = tuple(
        Step(name=step.name, options={key: step.options[key] for key in kept if key in step.options}
             | {"granularity": "token"}) if step.name == "quantize-activations" else step
        for step in base.passes
    )  # fmt: skip
    text = "set quantize-activations.granularity=token: a scale for each token"
    return [Proposal(text, reason)], _renamed(base.model_copy(update={"passes": steps, "lowering": None}))


def _float_inputs(base: Recipe, reason: str) -> tuple[list[Proposal], Recipe | None]:
    """The same recipe with kernels that read inputs as they are."""
    name = "lower-weight-only"
    text = f"set {name}.accuracy_level=0: inputs stay in float, at some cost in speed"
    lowering = base.lowering or ()
    if all(step.name != name for step in lowering):
        return [Proposal(text, reason)], None
    steps = tuple(
        Step(name=name, options={**step.options, "accuracy_level": 0}) if step.name == name else step
        for step in lowering
    )  # fmt: skip
    return [Proposal(text, reason)], _renamed(base.model_copy(update={"lowering": steps}))


def _worst_half(layers: Sequence[LayerDiagnosis]) -> list[LayerDiagnosis]:
    """The worst layers, which do half of the harm together: loud channels of harmless layers matter to nobody."""
    left = sum(harm(layer) for layer in layers) / 2
    found: list[LayerDiagnosis] = []
    for layer in sorted(layers, key=harm, reverse=True):
        found.append(layer)
        left -= harm(layer)
        if left <= 0:
            break
    return found


def _share(layers: Sequence[LayerDiagnosis]) -> str:
    shares = [layer.activation_share for layer in layers if layer.activation_share is not None]
    return f"{sum(shares) / len(shares):.0%}"


# ---------------------------------------------------------------------------------------------------- weights


def _weights(
    layers: Sequence[LayerDiagnosis], base: Recipe, recipe: Recipe | None
) -> tuple[list[Proposal], Recipe | None]:
    worst = max(layers, key=harm, default=None)
    if worst is None or not worst.weights:
        return [], None
    reason = f"rounding weights to {worst.weights} makes most of the error"
    if _bits(worst) > 4:
        if _has(PerTensor, worst.weight_schemes) and any(step.name == "quantize-weights" for step in base.passes):
            return _changed(base, "quantize-weights", {"granularity": "channel"},
                            "one scale for each output channel", reason)  # fmt: skip
        floats = " (which needs inputs in float)" if worst.activations else ""
        return _take("w8", base, f"{reason}: give groups of input features scales of their own{floats}")
    step = next((step for step in base.passes if step.name == "gptq"), None)
    if step is None or recipe is None:
        return _take("gptq-w4-act-order", base, f"{reason}: gptq lets weights that are still in float make up for "
                     "those already rounded")  # fmt: skip
    if not step.options.get("act_order"):
        options: dict[str, object] = {"act_order": True, "refine": 4}
        return _changed(base, "gptq", options, "the loudest inputs first, and four more sweeps", reason)
    reason += ", with all of gptq's options"
    if _bits(worst) < 4:
        return _changed(base, "gptq", {"format": "int4"}, f"4 bits instead of {_bits(worst)}", reason)
    size = step.options.get("group_size") or 128
    if size > SMALL_GROUP:
        return _changed(base, "gptq", {"granularity": "group", "group_size": SMALL_GROUP},
                        f"groups of {SMALL_GROUP} instead of {size}", reason)  # fmt: skip
    return _take("w8", base, f"{reason} and narrow groups: take 8 bits")


def _bits(layer: LayerDiagnosis) -> int:
    """Of the weight's codes; the fewest where it has several."""
    return min((scheme.number_format.bits for scheme in layer.weight_schemes), default=8)


def _has(granularity: type[Granularity], schemes: Sequence[Scheme]) -> bool:
    return any(isinstance(scheme.granularity, granularity) for scheme in schemes)


# ---------------------------------------------------------------------------------------------------- recipes


def _like(layers: Sequence[LayerDiagnosis]) -> Recipe:
    """The built-in recipe nearest to what another tool has made."""
    if any(layer.activations for layer in layers):
        return Recipe.load("int8-static")
    return Recipe.load("rtn-w4" if any(_bits(layer) <= 4 for layer in layers) else "int8-weights")


def _take(name: str, base: Recipe, reason: str) -> tuple[list[Proposal], Recipe]:
    """Another recipe, with what the model's own left out and did to caches, its calibration and its target."""
    taken = Recipe.load(name)
    kept = tuple(step for step in base.passes if step.name in CACHE_PASSES)
    update = {"exclude": base.exclude, "target": base.target, "calibration": _enough(base), "gates": base.gates,
              "passes": (*taken.passes, *kept)}  # fmt: skip
    return [Proposal(f"take the recipe {name}", reason)], _renamed(taken.model_copy(update=update))


def _enough(base: Recipe) -> Calibration:
    """No less data than recipes take by themselves: the model may have been made by passes that need little or none."""
    least, given = Calibration(), base.calibration
    return given.model_copy(update={"samples": max(least.samples, given.samples),
                                    "sequence_length": max(least.sequence_length, given.sequence_length)})  # fmt: skip


def _changed(
    base: Recipe, name: str, options: dict[str, object], what: str, reason: str
) -> tuple[list[Proposal], Recipe]:
    steps = tuple(
        Step(name=name, options={**step.options, **options}) if step.name == name else step for step in base.passes
    )
    settings = ", ".join(f"{name}.{key}={value}" for key, value in options.items())
    return [Proposal(f"set {settings}: {what}", reason)], _renamed(
        base.model_copy(update={"passes": steps, "calibration": _enough(base)})
    )


def _renamed(recipe: Recipe) -> Recipe:
    name = recipe.name if recipe.name.endswith(SUFFIX) else f"{recipe.name}{SUFFIX}"
    return recipe.model_copy(update={"name": name})
