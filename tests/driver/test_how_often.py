"""What a compilation does more than once: searching the graph, copying it, reading a weight, parsing its own data."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from types import FrameType

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.smooth_quant import SmoothQuant
from qcompiler.driver.observers import Snapshots
from qcompiler.sites import analyses
from qcompiler.sites.caches import Cache
from qcompiler.sites.kinds import Unsupported
from qcompiler.statistics import StatisticsStore
from tests import tiny

THREE = """g (float[M,64] x, float[64] gain, float[64,64] W, float[64,32] V) => (float[M,32] y) {
    n = LayerNormalization<axis=-1, epsilon=0.00001>(x, gain)  [a] h = MatMul(n, W)  [b] y = MatMul(h, V) }"""


def three() -> ir.Model:
    return tiny.build(THREE, gain="gain", W="normal", V="normal")


def calls(names: set[str]) -> Counter[str]:
    """How often functions of these names run while a model of three nodes is compiled, for a second time."""
    model, samples = three(), tiny.feeds(three())
    qcompiler.compile(model, "smoothquant", calibration=samples)
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name in names:
            kind = type(frame.f_locals.get("self")).__name__
            found[f"{kind}.{frame.f_code.co_name}" if kind != "NoneType" else frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        qcompiler.compile(model, "smoothquant", calibration=samples)
    finally:
        sys.setprofile(None)
    return found


def test_a_graph_is_searched_and_copied_a_few_times() -> None:
    found = calls({"find_sites", "clone", "safe_load", "_help_texts"})
    assert 0 < found["find_sites"] <= 3
    assert 0 < found["Model.clone"] <= 6
    assert found["safe_load"] == found["_help_texts"] == 0  # parsed once a process


def test_smooth_quant_reads_a_weight_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = three()
    reads: Counter[str] = Counter()
    for name in ("W", "V"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()

        def counted(array: np.ndarray = array, name: str = name) -> ir.TensorProtocol:
            reads[name] += 1
            return ir.tensor(array)

        value.const_value = ir.LazyTensor(counted, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name)
    store, step = StatisticsStore(), SmoothQuant()
    tiny.measure(model, [step], tiny.feeds(model), store)
    reads.clear()
    step.apply(model, store)
    assert 0 < reads["W"] <= 2
    assert reads["V"] == 0  # nothing writes its input that could take a factor


def test_what_was_found_holds_until_the_graph_changes() -> None:
    model = three()
    first = analyses.sites_of(model)
    assert analyses.sites_of(model) is first
    assert analyses.norm_groups_of(model)[0].linears[0] is first.linears[0]
    value = model.graph.initializers["W"]
    value.const_value = ir.tensor(np.ones((64, 64), np.float32), name="W")
    assert analyses.sites_of(model) is first  # only numbers have changed
    for change in CHANGES:
        before = analyses.sites_of(model)
        change(model)
        assert analyses.sites_of(model) is not before, change.__name__


def another_attribute(model: ir.Model) -> None:
    model.graph[0].attributes["axis"] = ir.AttrInt64("axis", 1)


def another_name(model: ir.Model) -> None:
    model.graph[1].name = "c"


def another_input(model: ir.Model) -> None:
    node = model.graph[1]
    node.replace_input_with(0, model.graph.inputs[0])


def another_shape(model: ir.Model) -> None:
    model.graph[1].outputs[0].shape = ir.Shape([None, 64])


def one_node_less(model: ir.Model) -> None:
    model.graph.outputs[0] = model.graph[1].outputs[0]
    model.graph.remove(model.graph[2], safe=True)


def another_path(model: ir.Model) -> None:
    model.graph[1].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'mlp.up_proj', 'matmul']"


def another_name_of_a_weight(model: ir.Model) -> None:
    model.graph.initializers["W"].name = "mlp.up_proj.weight"


def a_weight_that_is_given(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["V"])


def a_weight_without_numbers(model: ir.Model) -> None:
    model.graph.initializers["V"].const_value = None


def another_size_in_place(model: ir.Model) -> None:
    shape = ir.Shape([None, 32])
    model.graph[-1].outputs[0].shape = shape
    analyses.sites_of(model)
    shape[0] = 5


CHANGES = [
    another_attribute, another_name, another_input, another_shape, another_path, another_name_of_a_weight,
    another_size_in_place, one_node_less,
]  # fmt: skip


@pytest.mark.parametrize("change", [a_weight_that_is_given, a_weight_without_numbers])
def test_a_layer_goes_with_its_constant(change: Callable[[ir.Model], None]) -> None:
    model = three()
    assert len(analyses.sites_of(model).linears) == 2
    change(model)
    assert len(analyses.sites_of(model).linears) == 1


CACHE = """g (float[B,2,P,8] past_key, float[B,2,1,8] k, float[B,2,1,8] q)
    => (float[B,2,1,L] y, float[B,2,L,8] present_key) {
    present_key = Concat<axis=-2>(past_key, k)  t = Transpose<perm=[0,1,3,2]>(present_key)  y = MatMul(q, t) }"""


def test_a_cache_is_what_the_graphs_input_is_now() -> None:
    model = tiny.build(CACHE)
    past = model.graph.inputs[0]
    (cache,) = analyses.caches_of(model)
    past.name = "past_key_0"
    past.shape = ir.Shape(["B", 3, "P", 8])
    (now,) = analyses.caches_of(model)
    assert isinstance(cache, Cache)
    assert isinstance(now, Cache)
    assert (cache.name, cache.heads, now.name, now.heads) == ("past_key", 2, "past_key_0", 3)
    past.dtype = ir.DataType.INT8
    (now,) = analyses.caches_of(model)
    assert isinstance(now, Unsupported)


def test_a_copy_keeps_no_weight_of_the_model_alive() -> None:
    model = three()
    analyses.sites_of(model)
    copy, weight = Snapshots().of(model), weakref.ref(model.graph.initializers["V"])
    del model
    gc.collect()
    assert weight() is None
    assert len(analyses.sites_of(copy).linears) == 2


def test_a_copy_finds_its_own() -> None:
    model = three()
    found, copy = analyses.sites_of(model), model.clone()
    assert analyses.sites_of(copy).linears[0].node is not found.linears[0].node
    assert analyses.sites_of(model) is found
