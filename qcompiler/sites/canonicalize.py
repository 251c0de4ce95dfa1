"""Bring a model into the one form that recognisers and passes expect; what it computes stays the same.

Afterwards

- constants are initializers, no graph input has a default, and no Identity stands between a constant and its readers;
- every node and every value has a name of its own;
- model-local functions are inlined, except for those of qcompiler itself;
- the standard opset is 21 or newer (blocked DequantizeLinear and 4-bit types);
- a weight that is the embedding table, or its transpose, is that table (tied weights are stored once);
- shapes and types are filled in as far as ONNX can tell, and a size of -1, as old exporters write it, is any size.

No weights are read, except where a weight has the size of an embedding table: these are compared tile by tile.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.errors import ModelError
from qcompiler.graph.definitions import definition, is_operator
from qcompiler.graph.edit import Names, insert_before, new_node, remove_unused_constant, unique
from qcompiler.graph.lazy import read
from qcompiler.graph.opset import OPSET, upgrade
from qcompiler.graph.walk import all_nodes, bodies
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Embedding, Linear

TILE = 512  # rows and columns that are compared at once: few enough that few pages of the files are in memory

logger = logging.getLogger(__name__)


def canonicalize(model: ir.Model) -> None:
    """Rewrite the model in place; ModelError where it holds what cannot be brought into this form."""
    model.graph.name = model.graph.name or "graph"  # ONNX wants one, and some tools leave it out
    open_dimensions(model.graph)
    inline_functions(model)
    if model.opset_imports.get("", OPSET) < OPSET:
        upgrade(model)
    model.opset_imports.setdefault("", OPSET)
    if "com.microsoft" in model.opset_imports:
        model.opset_imports["com.microsoft"] = 1  # there is no other, and a model without such nodes may say anything
    model.ir_version = max(model.ir_version, 10)  # the first one with 4-bit types
    name_everything(model.graph)
    lift_constants(model)
    remove_identities(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    infer_shapes(model)
    tie_embeddings(model)


def open_dimensions(graph: ir.Graph) -> None:
    """Let negative sizes be unknown ones, as which onnxruntime takes them."""
    for value in {*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)}:
        if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def inline_functions(model: ir.Model) -> None:
    """Replace calls of the model's functions by their bodies; functions of qcompiler stay, a diff shows them as one."""
    for key in [key for key in model.functions if is_operator(key[1], key[0], model.opset_imports)]:
        del model.functions[key]  # ONNX Runtime does not call it
    if all(domain == "qcompiler" for domain, _, _ in model.functions):
        return
    name_bodies(model)
    inline(model, lambda function: function.domain != "qcompiler")


def inline(model: ir.Model, criteria: Callable[[ir.Function], bool] | None = None) -> None:
    """As `inline_functions`, for the functions that fit the criteria, by default all. Raises ModelError."""
    try:
        common.InlinePass(criteria=criteria)(model)
    except (ir.passes.PassError, ValueError) as error:
        raise ModelError(f"the model's functions cannot be inlined: {error.__cause__ or error}") from error
    for node in model.graph.all_nodes():
        _check_inlined(node, model)


def _check_inlined(node: ir.Node, model: ir.Model) -> None:
    """A call may leave out inputs of a function, which its nodes then lack."""
    known = definition(node.op_type, node.domain, model.opset_imports.get(node.domain, OPSET))
    if known is None or node.op_identifier() in model.functions:
        return
    given = [value is not None for value in node.inputs]
    if len(given) < known.fewest_inputs or not all(there or not known.needs(at) for at, there in enumerate(given)):
        raise ModelError(
            f"the node {node.name!r} ({node.op_type}) of a function lacks an input, which a call of the function "
            "leaves out; export the model again"
        )


def name_bodies(model: ir.Model) -> None:
    """Give the nodes of functions names that tell, once they are inlined, where they are from."""
    for function in model.functions.values():
        for node in function:
            written = next((value.name for value in node.outputs if value.name), "")
            node.name = node.name or f"{function.name}/{node.op_type}_{written}"


def name_everything(graph: ir.Graph) -> None:
    """Give every node and value a name that no other one has; names of the graph's own values stay.

    A node without a name gets ``<operator>_<its first output>``, so that the name is the same in every run.
    """
    main: dict[ir.Value, None] = dict.fromkeys((*graph.inputs, *graph.initializers.values(), *graph.outputs))
    main.update((value, None) for node in graph for value in node.outputs)
    inner: dict[ir.Value, None] = {}
    for body in (body for node in all_nodes(graph) for body in bodies(node)):
        inner.update((value, None) for value in (*body.inputs, *body.initializers.values(), *body.outputs))
        inner.update((value, None) for node in body for value in node.outputs)
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for value in (*main, *(value for value in inner if value not in main)):
        if not value.name and not value.uses() and not value.is_graph_output():
            continue  # an optional output that is left out
        producer = value.producer()
        base = value.name or (f"{producer.op_type}_{value.index()}" if producer is not None else "value")
        name = unique(base, taken, counts)
        if name != value.name:
            value.name = name
    taken, counts = set(), {}
    for node in all_nodes(graph):
        written = next((value.name for value in node.outputs if value.name), "")
        node.name = unique(node.name or f"{node.op_type}_{written}", taken, counts)


def lift_constants(model: ir.Model) -> None:
    """Make every Constant node an initializer, and every initializer that a caller could feed a plain one."""
    for node in all_nodes(model.graph):
        if node.op_type == "Constant" and node.domain == "" and "sparse_value" in node.attributes:
            raise ModelError(
                f"the constant {node.name!r} is sparse, which no pass can read; export it as a dense tensor"
            )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)


def remove_identities(graph: ir.Graph) -> None:
    """Let readers of an Identity read what it reads; one that gives a graph output its name stays where it must."""
    for node in all_nodes(graph):
        if node.op_type != "Identity" or node.domain or node.graph is None:
            continue
        source, copy = node.inputs[0], node.outputs[0]
        if source is None:
            continue
        producer = source.producer()
        if copy.is_graph_output():
            if producer is None or producer.graph is not node.graph or source.is_graph_output():
                continue
            name = copy.name
            copy.replace_all_uses_with(source, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
            source.name = name
        else:
            copy.replace_all_uses_with(source)
            node.graph.remove(node, safe=True)
        source.type = source.type or copy.type
        source.shape = source.shape or copy.shape


def infer_shapes(model: ir.Model) -> None:
    """Fill in types and shapes as far as ONNX can tell; operators that it does not know hide what follows them."""
    constants = list(model.graph.initializers.values())
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    model.graph.initializers.clear()  # inference moves large ones to the end
    for value in constants:
        model.graph.initializers.add(value)


def tie_embeddings(model: ir.Model) -> None:
    """Where a linear layer's weight equals an embedding table or its transpose, let it read the table.

    Exporters fold the transpose of a tied table into a second array: twice the memory, and two arrays that
    quantization would round apart.
    """
    sites = sites_of(model)
    tables = [site for site in sites.embeddings if not site.transposed]
    names = Names(model.graph)
    transposes: dict[ir.Value, ir.Value] = {}
    for linear in sites.linears:
        if linear.dequantize is not None or linear.transpose is not None:
            continue
        for embedding in tables:
            if _same_table(linear, embedding):
                _tie(linear, embedding, names, transposes)
                break


def _tie(linear: Linear, embedding: Embedding, names: Names, transposes: dict[ir.Value, ir.Value]) -> None:
    table, old = embedding.table, linear.weight
    if linear.transposed:
        linear.node.replace_input_with(1, table)
    else:
        if table not in transposes:
            shape = ir.Shape((linear.in_features, linear.out_features))
            name = names.fresh(f"{table.name}.transposed")
            node = new_node("Transpose", [table], name, like=table, shape=shape, attributes={"perm": [1, 0]})
            insert_before(linear.node, [node])
            transposes[table] = node.outputs[0]
        linear.node.replace_input_with(1, transposes[table])
    logger.info("%s is tied to %s", linear.name, embedding.name)
    remove_unused_constant(old)


def _same_table(linear: Linear, embedding: Embedding) -> bool:
    """Whether the weight holds the bits of the table, or of its transpose."""
    weight, table = linear.weight.const_value, embedding.table.const_value
    if weight is None or table is None or linear.weight is embedding.table or weight.dtype != table.dtype:
        return False
    rows, features = (int(size) for size in table.shape.numpy())
    if (rows, features) != (linear.out_features, linear.in_features):
        return False
    return all(  # most pairs differ in their first tile
        np.array_equal(_bits(table, row, column), _bits(weight, row, column, transposed=not linear.transposed))
        for row, column in itertools.product(_slices(rows), _slices(features))
    )


def _slices(size: int) -> list[slice]:
    return [slice(begin, min(size, begin + TILE)) for begin in range(0, size, TILE)]


def _bits(tensor: ir.TensorProtocol, row: slice, column: slice, transposed: bool = False) -> np.ndarray:
    """The bytes of a part of a matrix, or of its transpose; the file that holds it is let go again."""

    def copy(array: np.ndarray) -> np.ndarray:
        block = array[column, row].T if transposed else array[row, column]
        return np.array(block, order="C", copy=True).view(np.uint8)

    return read(tensor, copy)
