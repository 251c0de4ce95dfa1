"""Which node of one model is which of another: by what they compute, by their neighbours, by name.

What a node computes is its operator over what its inputs are, where the output of a matched layer is the same thing in
both models, and quantizing a value is nothing. What that leaves is matched from neighbour to neighbour, and then by
name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.module_path import module_path
from qcompiler.graph.operators import Role, operator_of
from qcompiler.model_diff.layers import plain_name
from qcompiler.model_diff.pairing import LayerPair, unique
from qcompiler.sites.activations import quantizes

SMALL_CONSTANT = 64
"""Numbers of a constant that are compared; of a larger one only the shape counts."""


def pair_nodes(a: ir.Model, b: ir.Model, layers: Sequence[LayerPair]) -> dict[ir.Node, ir.Node]:
    """Which node of the first model is which of the second."""
    left, right = list(a.graph.all_nodes()), list(b.graph.all_nodes())
    pairs = {pair.before[0].node: pair.after[0].node for pair in layers if len(pair.before) == len(pair.after) == 1}
    first, second = _meanings(a, layers, 0, {}), _meanings(b, layers, 1, _inputs(a, b))
    rest = [node for node in left if node not in pairs]
    taken = set(pairs.values())
    others = [node for node in right if node not in taken]
    _pair_equal(rest, others, lambda node, side: (first, second)[side].get(node), pairs)
    _spread(pairs)
    for key in (lambda n: n.name and (plain_name(n.name), _base(n)), written, lambda n: n.name):
        taken = set(pairs.values())
        open_left = unique((n for n in left if n not in pairs), key)
        open_right = unique((n for n in right if n not in taken), key)
        found = {node: open_right[name] for name, node in open_left.items() if name in open_right}
        pairs.update({node: other for node, other in found.items() if _plausible(node, other, pairs)})
    _spread(pairs)
    return pairs


def _spread(pairs: dict[ir.Node, ir.Node]) -> None:
    """From matched nodes to neighbours of the same operator: what writes the same input, the only one that reads."""
    taken = set(pairs.values())
    pending = list(pairs.items())
    while pending:
        node, other = pending.pop()
        for mine, theirs in (*_writers(node, other), *_readers(node, other, pairs, taken)):
            if mine in pairs or theirs in taken or _base(mine) != _base(theirs):
                continue
            pairs[mine] = theirs
            taken.add(theirs)
            pending.append((mine, theirs))


def _writers(node: ir.Node, other: ir.Node) -> Iterable[tuple[ir.Node, ir.Node]]:
    for a, b in zip(_essence(node)[1], _essence(other)[1], strict=False):
        mine, theirs = _behind(a), _behind(b)
        if mine is not None and theirs is not None:
            yield mine, theirs


def _behind(value: ir.Value | None) -> ir.Node | None:
    """What writes a value, before it was quantized or cast."""
    node = value.producer() if value is not None else None
    while node is not None and transparent(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _readers(
    node: ir.Node, other: ir.Node, pairs: Mapping[ir.Node, ir.Node], taken: set[ir.Node]
) -> Iterable[tuple[ir.Node, ir.Node]]:
    mine = unique((reader for reader in _ahead(node) if reader not in pairs), _base)
    theirs = unique((reader for reader in _ahead(other) if reader not in taken), _base)
    yield from ((reader, theirs[name]) for name, reader in mine.items() if name in theirs)


def _ahead(node: ir.Node) -> list[ir.Node]:
    """What reads a node's results, behind quantization and casts."""
    found: dict[ir.Node, None] = {}
    pending = [use.node for value in node.outputs for use in value.uses()]
    while pending:
        reader = pending.pop()
        if transparent(reader):
            pending.extend(use.node for value in reader.outputs for use in value.uses())
        else:
            found[reader] = None
    return list(found)


def _plausible(a: ir.Node, b: ir.Node, pairs: Mapping[ir.Node, ir.Node]) -> bool:
    """Exporters number their names: modules must not differ, and another operator needs a common neighbour."""
    if not _same_path(a, b):
        return False
    if _base(a) == _base(b):
        return True
    writers = any(_same_source(x, y, pairs) for x, y in zip(a.inputs, b.inputs, strict=False))
    readers = {pairs.get(reader) for reader in _ahead(a)} & set(_ahead(b))
    return writers or bool(readers) or any(value.is_graph_output() for value in a.outputs)


def _same_source(a: ir.Value | None, b: ir.Value | None, pairs: Mapping[ir.Node, ir.Node]) -> bool:
    first, second = _behind(a), _behind(b)
    if first is None or second is None:
        return a is not None and b is not None and first is second and a.name == b.name
    return pairs.get(first) is second


def _pair_equal(
    left: Sequence[ir.Node], right: Sequence[ir.Node], key: Callable[[ir.Node, int], Hashable],
    pairs: dict[ir.Node, ir.Node],
) -> None:  # fmt: skip
    """Nodes that mean the same; where several do, those of the same name, then in order if there are as many."""
    groups: dict[Hashable, tuple[list[ir.Node], list[ir.Node]]] = defaultdict(lambda: ([], []))
    for side, nodes in enumerate((left, right)):
        for node in nodes:
            meaning = key(node, side)
            if meaning is not None:
                groups[meaning][side].append(node)
    for mine, theirs in groups.values():
        named = {node.name: node for node in theirs}
        for node in list(mine):
            other = named.get(node.name)
            if other is not None:
                pairs[node] = other
                mine.remove(node)
                theirs.remove(other)
        if len(mine) == len(theirs):
            pairs.update(zip(mine, theirs, strict=True))


def _same_path(a: ir.Node, b: ir.Node) -> bool:
    paths = [module_path(node) for node in (a, b)]
    told = all("name_scopes" in " ".join(node.metadata_props) for node in (a, b))
    return not told or paths[0] == paths[1]


def written(node: ir.Node) -> str:
    """The name of the first value that the node writes."""
    return next((value.name for value in node.outputs if value.name), "")


def _inputs(a: ir.Model, b: ir.Model) -> dict[str, str]:
    """What the first model calls the inputs of the second: by name, then by type in their order."""
    mine = {str(value.name): value for value in a.graph.inputs}
    names = {str(value.name): str(value.name) for value in b.graph.inputs if value.name in mine}
    free = [value for name, value in mine.items() if name not in names]
    for value in b.graph.inputs:
        if str(value.name) in names:
            continue
        other = next((item for item in free if item.dtype == value.dtype), None)
        if other is not None:
            free.remove(other)
            names[str(value.name)] = str(other.name)
    return names


def _meanings(
    model: ir.Model, layers: Sequence[LayerPair], side: int, names: dict[str, str]
) -> dict[ir.Node, Hashable]:  # fmt: skip
    """A number for what each node computes, the same in both models where the operators and constants are the same."""
    results: dict[ir.Value, Hashable] = {}
    members: set[ir.Node] = set()
    for index, pair in enumerate(layers):
        if not pair.before or not pair.after:
            continue
        for place, layer in enumerate((pair.before, pair.after)[side]):
            results[layer.output] = hash(("layer", index, place if len(pair.before) == len(pair.after) else -1))
            members.add(layer.node)
    meanings: dict[ir.Node, Hashable] = {}

    def of(value: ir.Value | None) -> Hashable:
        if value is None:
            return None
        if value not in results:
            tensor = constant(value)
            if tensor is None:
                results[value] = hash(("input", names.get(str(value.name), str(value.name))))
            elif isinstance(tensor, ir.StringTensor):
                results[value] = hash(("strings", tuple(tensor.string_data())))
            elif tensor.size <= SMALL_CONSTANT and not isinstance(tensor, ir.LazyTensor):
                results[value] = hash((tensor.dtype.is_integer(), tensor.numpy().astype(np.float64).tobytes()))
            else:
                results[value] = hash(("constant", tuple(int(size) for size in tensor.shape.numpy())))
        return results[value]

    for node in model.graph.all_nodes():
        known = [value for value in node.outputs if value in results]
        if transparent(node):
            meanings[node] = hash((node.op_type, _settings(node), tuple(of(value) for value in node.inputs)))
            through = of(node.inputs[0])
            results.update({value: through for value in node.outputs if value not in results})
            continue
        operator, inputs = _essence(node)
        parts = [of(value) for value in inputs]
        if operator in ("Add", "Mul"):
            parts.sort(key=str)
        meaning = hash((operator, _settings(node), tuple(parts)))
        if node not in members:
            meanings[node] = meaning
        for index, value in enumerate(node.outputs):
            if value not in known:
                results[value] = hash((meaning, index)) if index else meaning
    return meanings


def transparent(node: ir.Node) -> bool:
    """Whether a node changes how numbers are stored and nothing else."""
    if quantizes(node):
        return True
    if node.domain or node.op_type != "Cast" or node.inputs[0] is None:
        return False
    before, after = node.inputs[0].dtype, node.attributes.get_int("to", 0)
    return ir.DataType(after or 0).is_floating_point() and (before is None or before.is_floating_point())


_SETTINGS: tuple[Role, ...] = ("scale", "zero", "bias")  # a bias is of other numbers than the float operator's


def _essence(node: ir.Node) -> tuple[str, list[ir.Value | None]]:
    """The operator and its data, without the scales and zero points that a quantized one takes."""
    row = operator_of(node)
    if not node.op_type.startswith("QLinear") or row is None:
        return _base(node), list(node.inputs)
    data = [index for index in range(len(node.inputs)) if (slot := row.input(index)) and slot.role not in _SETTINGS]
    return _base(node), [node.inputs[index] for index in data]


def _base(node: ir.Node) -> str:
    if node.op_type.startswith("QLinear"):
        return node.op_type.removeprefix("QLinear")
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _settings(node: ir.Node) -> Hashable:
    if node.op_type.startswith("QLinear"):
        return ()
    return tuple(
        sorted(
            (name, str(attribute.value))
            for name, attribute in node.attributes.items()
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR)
            and (node.op_type, name) != ("Cast", "to")
        )
    )
