"""Which passes touched a node, as its metadata tells."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph.metadata import PROVENANCE
from qcompiler.recipes.registry import pass_class


def passes_of(node: ir.Node) -> tuple[str, ...]:
    """In the order in which they ran; empty for a model of another quantizer."""
    return tuple(name for name in node.metadata_props.get(PROVENANCE, "").split(",") if name)


def exact_passes(node: ir.Node) -> tuple[str, ...]:
    return tuple(name for name in passes_of(node) if _kind(name) == "exact")


def rounding_passes(node: ir.Node) -> tuple[str, ...]:
    """Also those that this installation does not know: somebody else's plugins."""
    return tuple(name for name in passes_of(node) if _kind(name) in ("rounding", ""))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Exact passes first, lowering ones last, as recipes have them."""
    order = ("analysis", "exact", "rounding", "tuning", "", "lowering")
    return tuple(sorted(names, key=lambda name: order.index(_kind(name))))


@functools.cache
def _kind(name: str) -> str:
    try:
        return pass_class(name).kind
    except QCompilerError:
        return ""  # a plugin that is not installed here; its name is all that is known
