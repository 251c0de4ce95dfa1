"""What a person calls a layer: the path of its module, as each exporter keeps it."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir


def module_path(node: ir.Node, weight: ir.Value | None = None) -> str:
    """The module path of a node, e.g. ``model.layers.0.mlp.down_proj``.

    It comes from the first of these that says something: the scopes that torch.onnx or onnxscript noted on the node,
    a node name that is a path (``/model/layers.0/mlp/down_proj/MatMul``), the name of the weight
    (``fc1.weight``), the node name itself.
    """
    name = node.name or ""
    return _from_scopes(node) or _from_name(name) or _from_weight(weight) or name


def block_of(path: str) -> str:
    """The path up to and including its first number (``model.layers.0``); empty where there is none."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return ""


def _from_scopes(node: ir.Node) -> str:
    torch = _strings(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
    if len(torch) > 1 and torch[-2]:
        return torch[-2]  # full paths from the root inward; the last one is the operation's own name
    return ".".join(part for part in _strings(node.metadata_props.get("pkg.onnxscript.name_scopes")) if part)


def _strings(text: str | None) -> list[str]:
    """The list that an exporter wrote down with repr(); empty where it is anything else."""
    if not text:
        return []
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return []
    return [str(part) for part in value] if isinstance(value, list) else []


def _from_name(name: str) -> str:
    if "/" not in name:
        return ""
    parts = [part for part in name.split("/") if part]
    if parts and parts[-1][0].isupper():  # an operator (MatMul_1, SkipLayerNorm); attributes of modules are lower case
        parts.pop()
    return ".".join(parts)


def _from_weight(weight: ir.Value | None) -> str:
    """The name without ``.weight``, and without what a pass that replaced the constant appended to that."""
    found = re.fullmatch(r"(.+)\.weight([.@].*)?", (weight.name or "") if weight is not None else "")
    return found[1] if found else ""
