"""Recommends a target and a recipe for a model, with reasons: what the model is, what runs here, what was measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from qcompiler.driver.inputs import load
from qcompiler.errors import TargetError
from qcompiler.graph.edit import constant
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.find import Convolution, Unsupported
from qcompiler.targets import Advice, Speed, Target, usable_targets
from qcompiler.targets.kernels import CPU

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
    layers: int
    text: str


def recommend(model: str | Path | ir.Model, target: str | None = None) -> list[Recommendation]:
    """What to take, the best first: for each target that gives advice for such a model, or for the one named.

    Nothing where the model has no layers that can be quantized. A target whose provider starts here comes before
    others. Raises ModelError; TargetError where the target that is named has no advice.
    """
    graph, _ = load(model)
    known = _look(graph)
    if not known.layers:
        return []
    found = []
    for chosen in [Target.load(target)] if target is not None else usable_targets()[0]:
        advice = next((item for item in chosen.advice if item.models == known.kind), None)
        if advice is None and target is not None:
            raise TargetError(
                f"the target {chosen.name} recommends no recipe for {KINDS[known.kind]}: no kernel of it is known to "
                f"gain from one; leave the target out to see what others recommend"
            )
        if advice is not None:
            starts, where = _starts(chosen)
            reasons = (known.text, where, " ".join(advice.because.split()), *_measured(chosen, advice))
            found.append((not starts, chosen.providers[0] == CPU, Recommendation(chosen.name, advice.recipe, reasons)))
    return [item for _, _, item in sorted(found, key=lambda entry: entry[:2])]


def _look(graph: ir.Model) -> _Known:
    sites = sites_of(graph)
    caches = [cache for cache in caches_of(graph) if not isinstance(cache, Unsupported)]
    weights: Counter[str] = Counter()
    for site in sites:
        tensor = constant(getattr(site, "weight", None))
        if tensor is not None:
            weights["convolutions" if isinstance(site, Convolution) else "linear layers"] += tensor.nbytes
    layers, size = len(list(sites)), sum(weights.values())
    share = f"{layers} {'layer' if layers == 1 else 'layers'} that can be quantized, {size / 1e6:.3g} MB of weights"
    if size < SMALL:
        share += ", so there is little to save, and steps between the layers may cost more than it"
    if caches:
        return _Known("decoder", layers, f"the model keeps {len(caches)} caches, so it writes token by token; {share}")
    if weights["convolutions"] > weights["linear layers"]:
        return _Known("convolution", layers, f"most of the model's weights are convolutions'; {share}")
    return _Known("other", layers, f"the model has no cache, so whole inputs are computed at once; {share}")


def _starts(target: Target) -> tuple[bool, str]:
    """Whether the target's first provider starts here, and how that is known."""
    import onnxruntime as ort
    from onnx import parser

    provider = target.providers[0]
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
    """What has been measured of the scheme, slowest and fastest; or that nothing has."""
    speeds = [speed for kernel in target.kernels if kernel.scheme == advice.scheme for speed in kernel.speed]
    if not speeds:
        return (f"how fast {advice.scheme} is on {target.name} has not been measured",)
    ordered = sorted(speeds, key=lambda speed: speed.ratio)
    return tuple(_figure(advice, speed) for speed in dict.fromkeys((ordered[-1], ordered[0])))


def _figure(advice: Advice, speed: Speed) -> str:
    return f"{advice.scheme}: {speed.ratio:g} × {speed.against} with {speed.case} ({speed.machine}, {speed.date})"
