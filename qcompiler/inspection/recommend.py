"""Recommends a target and a recipe for a model, with reasons: what the model is, what runs here, what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from qcompiler.driver.inputs import load
from qcompiler.errors import QCompilerError, TargetError
from qcompiler.graph.edit import constant
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.inspection.touched import touched
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.find import Convolution, Embedding, Unsupported
from qcompiler.targets import Advice, Speed, Target, usable_targets
from qcompiler.targets.kernels import CPU
from qcompiler.targets.machines import this_cpu

Kind = Literal["decoder", "convolution", "other"]
KINDS = {
    "decoder": "a language model with a cache", "convolution": "a model that is mostly convolutions",
    "other": "a model without a cache",
}  # fmt: skip
SMALL = 1_000_000  # bytes of weights that a processor's cache holds


@dataclass(frozen=True)
class Recommendation:
    """A target and a recipe, with the reasons in the order in which they matter."""

    target: str
    recipe: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    """What matters about a model."""

    kind: Kind
    what: str
    """The kind as a clause."""
    layers: int
    """All that multiply by constants, whether they can be quantized or not."""
    weights: dict[str, ir.TensorProtocol]
    """The float constant of each layer that has one, by the layer's name."""


def recommend(model: str | Path | ir.Model, target: str | None = None) -> list[Recommendation]:
    """What to take, the best first: for each target that gives advice for such a model, or for the one named.

    Nothing where the recipe would quantize no layer of the model. A target whose provider starts here comes before
    others. Raises ModelError; TargetError where the target that is named has no advice.
    """
    graph, _ = load(model)
    known = _look(graph)
    if not known.weights:
        return []
    found = []
    for chosen in [Target.load(target)] if target is not None else usable_targets()[0]:
        advice = next((item for item in chosen.advice if item.models == known.kind), None)
        if advice is None and target is not None:
            raise TargetError(
                f"the target {chosen.name} recommends no recipe for {KINDS[known.kind]}: no kernel of it is known to "
                f"gain from one; leave the target out to see what others recommend"
            )
        gain = _gain(graph, known, advice.recipe, chosen) if advice is not None else ""
        if advice is not None and gain:
            starts, where = _starts(chosen)
            reasons = (gain, where, " ".join(advice.because.split()), *_measured(chosen, advice))
            found.append((not starts, chosen.providers[0] == CPU, Recommendation(chosen.name, advice.recipe, reasons)))
    return [item for _, _, item in sorted(found, key=lambda entry: entry[:2])]


def _look(graph: ir.Model) -> _Known:
    sites = sites_of(graph)
    caches = [cache for cache in caches_of(graph) if not isinstance(cache, Unsupported)]
    weights: dict[str, ir.TensorProtocol] = {}
    of_convolutions: dict[str, bool] = {}
    for site in sites:
        tensor = constant(site.table if isinstance(site, Embedding) else getattr(site, "weight", None))
        if tensor is not None and tensor.dtype.is_floating_point():  # others are quantized already
            weights[site.name], of_convolutions[site.name] = tensor, isinstance(site, Convolution)
    convolutions = _bytes(tensor for name, tensor in weights.items() if of_convolutions[name])
    if caches:
        kind, what = "decoder", f"the model keeps {len(caches)} caches, so it writes token by token"
    elif convolutions > _bytes(weights.values()) - convolutions:
        kind, what = "convolution", "most of the model's weights are convolutions'"
    else:
        kind, what = "other", "the model has no cache, so whole inputs are computed at once"
    return _Known(kind, what, len(sites), weights)  # type: ignore[arg-type]


def _gain(graph: ir.Model, known: _Known, recipe: str, target: Target) -> str:
    """How much of the model the recipe would quantize; empty where that is nothing."""
    rounded = {item.name for item in touched(graph, recipe, target.name, (), ()) if item.does and not item.obstacle}
    weights = [tensor for name, tensor in known.weights.items() if name in rounded]
    if not weights:
        return ""
    size = _bytes(weights)
    layers = f"{known.layers} {'layer' if known.layers == 1 else 'layers'}"
    share = f"{len(weights)} of {layers} can be quantized, {size / 1e6:.3g} MB of weights"
    if size < SMALL:
        share += ", so there is little to save, and steps between the layers may cost more than it"
    return f"{known.what}; {share}"


def _bytes(tensors: Iterable[ir.TensorProtocol]) -> int:
    """Of all together; what several layers share counts once, and so do constants that lie at one place of a file."""
    different: dict[object, int] = {}
    for tensor in tensors:
        external = isinstance(tensor, ir.ExternalTensor)
        different[(str(tensor.path), tensor.offset) if external else id(tensor)] = tensor.nbytes  # type: ignore[attr-defined]
    return sum(different.values())


def _starts(target: Target) -> tuple[bool, str]:
    """Whether the target's first provider starts here, and how that is known."""
    from onnx import parser

    provider = target.providers[0]
    try:
        ort = onnxruntime_library()
    except QCompilerError:  # to recommend, it is not needed
        more = "onnx-qcompiler[cpu] brings it" if provider == CPU else "so compile for another machine"
        return provider == CPU, f"onnxruntime is not installed here; {more}"
    if provider == CPU:
        return True, f"onnxruntime {ort.__version__} is installed"
    if provider not in ort.get_available_providers():
        return False, f"the onnxruntime here ({ort.__version__}) has no {provider}, so compile for another machine"
    tiny = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Neg(x) }')
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(tiny.SerializeToString(), options, providers=[provider, CPU])
    if provider in session.get_providers():
        return True, f"{provider} of onnxruntime {ort.__version__} starts here"
    return False, f"{provider} of onnxruntime {ort.__version__} does not start here, so compile for another machine"


def _measured(target: Target, advice: Advice) -> tuple[str, ...]:
    """What has been measured of the scheme, slowest and fastest, on such CPUs if on any; or that nothing has."""
    speeds = [speed for kernel in target.kernels if kernel.scheme == advice.scheme for speed in kernel.speed]
    if not speeds:
        return (f"how fast {advice.scheme} is on {target.name} has not been measured",)
    here = [speed for speed in speeds if target.is_for(speed, this_cpu())]
    ordered = sorted(here or speeds, key=lambda speed: speed.ratio)
    which = "this CPU" if here else "another CPU than this one"
    return tuple(_figure(advice, speed, which) for speed in dict.fromkeys((ordered[-1], ordered[0])))


def _figure(advice: Advice, speed: Speed, which: str) -> str:
    figure = f"{advice.scheme}: {speed.ratio:g} × {speed.against} with {speed.case}"
    return f"{figure} ({speed.machine}, which is {which}; {speed.date})"
