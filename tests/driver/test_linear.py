"""Work grows as the number of nodes does: told by how often each function is called, not by a clock."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import FrameType

import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.errors import PassError
from qcompiler.graph import check
from qcompiler.graph.check import check_structure
from tests import tiny

SIZE = 40
LEVELS = 8
BEGIN = "g (float[M,16] x, float[16,16] W, float[16] c) => (float[M,16] y) {"


def model(steps: str) -> ir.Model:
    return tiny.build(f"{BEGIN} {steps} }}", W="normal", c="normal")


def chain(count: int) -> ir.Model:
    """One value after the other."""
    steps = "".join(f"v{i} = Neg(v{i - 1})\n" for i in range(1, count))
    return model(f"v0 = MatMul(x, W)\n {steps} y = Add(v{count - 1}, c)")


def fan(count: int) -> ir.Model:
    """One value that all read."""
    steps = "".join(f"v{i} = Neg(h)\n w{i + 1} = Add(w{i}, v{i})\n" for i in range(count // 2))
    return model(f"h = MatMul(x, W)\n w0 = Add(h, c)\n {steps} y = Neg(w{count // 2})")


def layers(count: int) -> ir.Model:
    """Products with one weight, which all want the same names."""
    steps = "".join(f"m{i} = MatMul(v{i}, W)\n v{i + 1} = Tanh(m{i})\n" for i in range(count // 2))
    return model(f"v0 = Add(x, c)\n {steps} y = Neg(v{count // 2})")


def constants(count: int) -> ir.Model:
    """As many constants as nodes."""
    steps = "".join(f"c{i} = Constant<value_float={i}.5>()\n v{i + 1} = Add(v{i}, c{i})\n" for i in range(count // 2))
    return model(f"v0 = MatMul(x, W)\n {steps} y = Add(v{count // 2}, c)")


def branches(count: int) -> ir.Model:
    """One If after the other."""
    steps = "".join(
        f"""v{i + 1} = If (yes) <then_branch = t{i} () => (float[M,16] a{i}) {{ a{i} = Neg(v{i}) }},
            else_branch = e{i} () => (float[M,16] b{i}) {{ b{i} = Tanh(v{i}) }}>\n"""
        for i in range(count // 2)
    )
    return model(
        f"v0 = MatMul(x, W)\n s = ReduceSum<keepdims=0>(x)\n yes = Greater(s, s)\n {steps} y = Add(v{count // 2}, c)"
    )


def deep(count: int) -> ir.Model:
    """Ifs within Ifs, with nodes on every level."""

    def level(depth: int, begin: str) -> str:
        names = [begin, *(f"v{depth}_{i}" for i in range(count // LEVELS))]
        steps = "".join(f"{name} = Neg({before})\n" for before, name in pairwise(names))
        if depth == LEVELS:
            return f"{steps} o{depth} = Neg({names[-1]})\n"
        inner = level(depth + 1, names[-1])
        return f"""{steps} o{depth} = If (yes) <
            then_branch = t{depth} () => (float[M,16] o{depth + 1}) {{ {inner} }},
            else_branch = e{depth} () => (float[M,16] e{depth}) {{ e{depth} = Neg({names[-1]}) }}>\n"""

    begin = "v = MatMul(x, W)\n s = ReduceSum<keepdims=0>(x)\n yes = Greater(s, s)\n"
    return model(f"{begin} {level(0, 'v')} y = Add(o0, c)")


def calls(of: ir.Model, recipe: str) -> Counter[str]:
    """How often each function is called in a compilation."""
    found: Counter[str] = Counter()
    feeds = None if recipe == "int8-weights" else tiny.feeds(of)

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        qcompiler.compile(of, recipe, calibration=feeds)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [*((shape, "int8-weights") for shape in (chain, fan, layers, constants, branches, deep)), (layers, "smoothquant")],
)
def test_every_function_is_called_as_often_as_there_are_nodes(shape: Callable[[int], ir.Model], recipe: str) -> None:
    qcompiler.compile(shape(SIZE), recipe, calibration=None if recipe == "int8-weights" else tiny.feeds(shape(SIZE)))
    few, more, most = (calls(shape(SIZE * times), recipe) for times in (1, 2, 3))
    grown = {name: (few[name], more[name], most[name]) for name in most if most[name] > SIZE}
    # A call for each pair of nodes would make the second step 5/3 of the first.
    assert grown
    assert {name: seen for name, seen in grown.items() if seen[2] - seen[1] > 1.25 * (seen[1] - seen[0]) + SIZE} == {}


def test_only_what_has_changed_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = chain(SIZE)
    looked_at: list[str] = []
    look = check._check_node

    def counted(node: ir.Node, model: ir.Model) -> None:
        looked_at.append(str(node.name))
        look(node, model)

    monkeypatch.setattr(check, "_check_node", counted)
    check_structure(graph)
    looked_at.clear()
    check_structure(graph)
    assert looked_at == []
    node = graph.graph[5]
    node.op_type = "Tanh"
    check_structure(graph)
    assert looked_at == [node.name]


def changed_type(graph: ir.Graph) -> None:
    graph[5].outputs[0].dtype = ir.DataType.BOOL


def changed_attribute(graph: ir.Graph) -> None:
    graph[5].attributes["alpha"] = ir.AttrInt64("alpha", 1)


def changed_operator(graph: ir.Graph) -> None:
    graph[5].op_type = "Negg"


def changed_version(graph: ir.Graph) -> None:
    del graph.opset_imports[""]


def changed_output(graph: ir.Graph) -> None:
    graph.outputs[0].type = None


def in_a_body(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "If").attributes["else_branch"].as_graph()[0].op_type = "Negg"


CHANGES = [changed_type, changed_attribute, changed_operator, changed_version, changed_output, in_a_body]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked_again(change: Callable[[ir.Graph], None]) -> None:
    graph = branches(SIZE)
    graph.graph.insert_after(graph.graph[4], [node := ir.node("Neg", [graph.graph[4].outputs[0]], name="between")])
    node.outputs[0].name = "between"
    check_structure(graph)
    change(graph.graph)
    with pytest.raises(PassError):
        check_structure(graph)
    with pytest.raises(PassError):  # it is not taken to be right because it was looked at
        check_structure(graph)
