"""Proposes what to leave in float, or which recipe to take, from what was measured. Each rule is a function.

Rules, in order; the first one that holds decides the recipe:

1.  A few layers do much of the harm (each 8 times that of the median layer and at least 5 % of all, together a third):
    they are left out. More than a tenth of the layers are not a few.
2.  Inputs make most of the error. With loud channels: smoothquant, which moves them into the weights; where they are
    smoothed already or more than 100 times as loud as others, llm-int8, which keeps them in float. With loud tokens and
    one range for all: a range for each token. Else: inputs stay float.
3.  Weights make most of the error. Rounded to nearest in 4 bits or fewer: gptq; already gptq: narrower groups, then 8
    bits. In 8 bits with one scale for the tensor: a scale for each channel; else a scale for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from qcompiler.diagnosis.report import LayerDiagnosis, Proposal
from qcompiler.recipe import Recipe, Step

FEW = 0.1
TIMES_MEDIAN = 8.0
LEAST_SHARE = 0.05
LEAST_TOGETHER = 1 / 3
LOUD = 10.0
VERY_LOUD = 100.0
SMALL_GROUP = 32
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
    if worst:
        paths = tuple(dict.fromkeys(_pattern(layer, layers) for layer in worst))
        proposals = [Proposal(f"leave {_pattern(layer, layers)} in float", _blame(layer, quantized),
                              (_pattern(layer, layers),)) for layer in worst]  # fmt: skip
        named = base.model_copy(update={"exclude": (*base.exclude, *(p for p in paths if p not in base.exclude))})
        return proposals, _renamed(named)
    if output_db > GOOD_DB:
        return [], None
    inputs = [layer for layer in quantized if layer.cause == "activations"]
    blamed, rest = sum(harm(layer) for layer in inputs), sum(harm(layer) for layer in quantized)
    return _inputs(inputs, base, recipe) if blamed > rest / 2 else _weights(quantized, base, recipe)


def harm(layer: LayerDiagnosis) -> float:
    """Noise over signal: of the outputs where that was measured, else of the layer's own output."""
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


def _blame(layer: LayerDiagnosis, layers: Sequence[LayerDiagnosis]) -> str:
    total = sum(harm(other) for other in layers)
    share = harm(layer) / total if total < float("inf") else 1.0
    what = "of the error at the outputs comes" if layer.output_db is not None else "of the layers' errors comes"
    text = f"{share:.0%} {what} from this layer alone ({layer.weights or layer.activations})"
    if layer.cause == "activations":
        text += f", {layer.activation_share:.0%} of its own from rounding its input"
    if layer.cause == "weights" and layer.activation_share is not None:
        text += ", nearly all of its own from rounding its weight"
    return text


def _pattern(layer: LayerDiagnosis, layers: Sequence[LayerDiagnosis]) -> str:
    """What names this layer and no other."""
    path = layer.module_path
    alike = [other for other in layers if path in (other.module_path, other.name)]
    return path if path and len(alike) == 1 else layer.name


# ---------------------------------------------------------------------------------------------------- inputs


def _inputs(
    layers: Sequence[LayerDiagnosis], base: Recipe, recipe: Recipe | None
) -> tuple[list[Proposal], Recipe | None]:
    layers = _worst_half(layers)
    worst = max(layers, key=harm)
    channels = max(layer.channel_outliers or 1.0 for layer in layers)
    share = _share(layers)
    smoothed = recipe is not None and any(step.name == "smooth-quant" for step in recipe.passes)
    loudest = f"their loudest channel is {channels:.0f} times as loud as the median one"
    blame = f"rounding inputs makes {share} of the error of the worst layers"
    if channels >= LOUD and not smoothed and channels < VERY_LOUD:
        return _take("smoothquant", base, f"{blame}, and {loudest}: smoothing moves such channels into the weights")
    if channels >= LOUD:
        why = "smoothing has not been enough" if smoothed else "too much for smoothing"
        return _take("llm-int8", base, f"{blame}, and {loudest} ({why}): llm-int8 keeps such channels in float")
    if "per-tensor" in worst.activations:
        tokens = max(layer.token_outliers or 1.0 for layer in layers)
        return _take("int8-dynamic", base, f"{blame} with one range for all tokens (the loudest token is {tokens:.1f} "
                     "times the median one): give each token a scale")  # fmt: skip
    return _take("int8-weights", base, f"{blame}, without outliers that could be moved: leave the inputs in float")


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
    worst = max(layers, key=harm)
    step = next((step for step in base.passes if step.name == "gptq"), None)
    if _bits(worst) > 4 or not worst.weights:
        if not any(step.name == "quantize-activations" for step in base.passes):
            return _take("w8", base, f"rounding weights to {worst.weights} makes the error: give groups of input "
                         "features scales of their own")  # fmt: skip
        return _changed(base, "quantize-weights", {"granularity": "channel"}, "one scale for each output channel",
                        f"rounding weights to {worst.weights} makes most of the error") \
            if "per-tensor" in worst.weights else ([], None)  # fmt: skip
    if step is None or recipe is None:
        return _take("gptq-w4-act-order", base, f"rounding weights to {worst.weights} makes the error: gptq lets "
                     "weights that are still in float make up for those already rounded")  # fmt: skip
    if not step.options.get("act_order"):
        return _take("gptq-w4-act-order", base, f"rounding weights to {worst.weights} makes the error: with act_order "
                     "and refine, gptq comes nearer to the float model")  # fmt: skip
    size = step.options.get("group_size") or 128
    if size > SMALL_GROUP:
        return _changed(base, "gptq", {"group_size": SMALL_GROUP}, f"groups of {SMALL_GROUP} instead of {size}",
                        f"rounding weights to {worst.weights} makes the error, with all of gptq's options")  # fmt: skip
    return _take("w8", base, f"rounding weights to {worst.weights} makes the error, with all of gptq's options and "
                 "narrow groups: take 8 bits")  # fmt: skip


def _bits(layer: LayerDiagnosis) -> int:
    digits = "".join(char for char in layer.weights.split(" ")[0].split("_")[0] if char.isdigit())
    return {"binary": 1, "nf4": 4, "fp4": 4}.get(layer.weights.split(" ")[0].split("_")[0], int(digits or 8))


# ---------------------------------------------------------------------------------------------------- recipes


def _like(layers: Sequence[LayerDiagnosis]) -> Recipe:
    """The built-in recipe nearest to what another tool has made."""
    if any(layer.activations for layer in layers):
        return Recipe.load("int8-static")
    return Recipe.load("rtn-w4" if any(_bits(layer) <= 4 for layer in layers) else "int8-weights")


def _take(name: str, base: Recipe, reason: str) -> tuple[list[Proposal], Recipe]:
    """Another recipe, with what the model's own left out, its calibration and its target."""
    update = {"exclude": base.exclude, "target": base.target, "calibration": base.calibration, "gates": base.gates}
    return [Proposal(f"take the recipe {name}", reason)], _renamed(Recipe.load(name).model_copy(update=update))


def _changed(
    base: Recipe, name: str, options: dict[str, object], what: str, reason: str
) -> tuple[list[Proposal], Recipe]:
    steps = tuple(
        Step(name=name, options={**step.options, **options}) if step.name == name else step for step in base.passes
    )
    settings = ", ".join(f"{name}.{key}={value}" for key, value in options.items())
    return [Proposal(f"set {settings}: {what}", reason)], _renamed(base.model_copy(update={"passes": steps}))


def _renamed(recipe: Recipe) -> Recipe:
    suffix = "-debugged"
    name = recipe.name if recipe.name.endswith(suffix) else f"{recipe.name}{suffix}"
    return recipe.model_copy(update={"name": name})
