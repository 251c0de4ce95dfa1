"""Where nodes run, predicted from the kernel tables: what goes to the CPU and why, what is warned of, what is copied.

What a CUDA provider really decides is compared in `cuda_stub/`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import qcompiler
from passes.lower_weight_only import fused_obstacle
from qcompiler.cli.app import app
from qcompiler.errors import TargetError
from qcompiler.graph import files as model_io
from qcompiler.inspection.recommend import recommend
from qcompiler.placement import Copy, PlacedNode, Placement, compare, measure, predict
from qcompiler.placement.rules import path_of
from qcompiler.report import Report, Sizes
from qcompiler.targets import Target
from tests import tiny

CUDA, CPU = Target.load("ort-cuda"), Target.load("ort-cpu")
SHAPES = """g (float[B,S,8] x) => (float[B,S,8] y, float[N,8] z) {
    sizes = Shape(x) batch = Gather(sizes, zero) two = Mul(batch, length) row = Unsqueeze(two, zero_axis)
    to = Concat<axis=0>(row, eight) z = Reshape(x, to) y = Neg(x) }"""
CONSTANTS = {"zero": np.array(0), "length": np.array(5), "zero_axis": np.array([0]), "eight": np.array([8])}
INPUTS = "int64 zero, int64 length, int64[1] zero_axis, int64[1] eight"


def shape_model() -> ir.Model:
    return tiny.build(SHAPES.replace("(float[B,S,8] x)", f"(float[B,S,8] x, {INPUTS})"), **CONSTANTS)


def placed(model: ir.Model, target: Target = CUDA, **options: bool) -> Placement:
    found = predict(model, target, **options)
    assert found is not None
    return found


def where(found: Placement) -> dict[str, str]:
    return {node.op: node.provider for node in found.nodes}


# ---------------------------------------------------------------------------------------------------- shape arithmetic


def test_arithmetic_on_shapes_goes_to_the_cpu_without_a_word() -> None:
    found = placed(shape_model())
    assert where(found) == {
        "Shape": "CUDA", "Gather": "CPU", "Mul": "CPU", "Unsqueeze": "CPU", "Concat": "CPU", "Reshape": "CUDA",
        "Neg": "CUDA",
    }  # fmt: skip
    assert {node.role for node in found.nodes} == {"", "shape"}
    assert found.copies == ()
    assert found.warnings == []
    assert not found.measured
    assert (
        found.summary()
        == "3 nodes on CUDA, 4 nodes on CPU (4 of them shape arithmetic), 0 copies between host and device"
    )


def test_the_same_arithmetic_on_data_stays() -> None:
    model = tiny.build("g (int64[B] x, int64 c) => (int64[B] y) { y = Mul(x, c) }", c=np.array(2))
    assert where(placed(model)) == {"Mul": "CUDA"}


def test_values_of_sixteen_bits_and_large_constants_stay() -> None:
    text = """g (float[B,8] x, {kind}[{size}] c) => ({kind}[{size}] y) {{
        sizes = Shape(x) first = Slice(sizes, zero, one) cast = Cast<to={to}>(first) y = Add(cast, c) }}"""
    for kind, to, size, provider in (("float16", 10, 4, "CUDA"), ("float", 1, 100, "CPU"), ("float", 1, 101, "CUDA")):
        code = text.format(kind=kind, to=to, size=size).replace(") =>", ", int64[1] zero, int64[1] one) =>", 1)
        numbers = np.zeros(size, np.float16 if kind == "float16" else np.float32)
        model = tiny.build(code, c=numbers, zero=np.array([0]), one=np.array([1]))
        assert where(placed(model))["Add"] == provider, kind


def test_what_the_runtime_computes_once_is_not_placed() -> None:
    text = """g (float[B,8] x, float[8] c, int64[3] three) => (float[B,8] y, int64[3] z) {
        twice = Add(c, c) y = Mul(x, twice) known = Shape(three) z = ConstantOfShape(known) }"""
    model = tiny.build(text, c=np.ones(8, np.float32), three=np.array([1, 2, 3]))
    assert set(where(placed(model))) == {"Mul"}
    assert set(where(placed(model, optimized=False))) == {"Add", "Mul", "Shape", "ConstantOfShape"}


# ---------------------------------------------------------------------------------------------------- fallbacks, copies

QUANTIZED = """g (float[B,8] x) => (uint8[B,8] q, float s, uint8 z, float[B,8] y) {
    a = Neg(x) [dql] q, s, z = DynamicQuantizeLinear(a) y = Exp(a) }"""


def test_one_unsupported_node_gives_one_warning_that_names_it() -> None:
    found = placed(tiny.build(QUANTIZED))
    assert where(found) == {"Neg": "CUDA", "DynamicQuantizeLinear": "CPU", "Exp": "CUDA"}
    assert found.warnings == ["dql (DynamicQuantizeLinear) runs on the CPU: CUDA has no kernel for this operator"]
    assert found.copies == (Copy("a", "host"),)


FOLLOWED = """g (float[B,8] x) => (float[2] y, float[B,8] z) { sizes = Shape(x) f = Cast<to=1>(sizes)
    [dql] q, s, zp = DynamicQuantizeLinear(f) y = DequantizeLinear(q, s, zp) z = Neg(x) }"""


def test_what_reads_only_an_unsupported_node_follows_it() -> None:
    """And is part of the same warning. The runtime gets there from values in host memory, such as a shape."""
    found = placed(tiny.build(FOLLOWED))
    assert [node.role for node in found.nodes] == ["", "shape", "fallback", "follows", ""]
    (warning,) = found.warnings
    assert "dql (DynamicQuantizeLinear) runs on the CPU, as does the node that reads only what it gives: " in warning


def test_the_reason_is_the_type_or_the_version() -> None:
    model = tiny.build("g (uint8[B,8] x, uint8[8,4] w) => (int32[B,4] y) { [mm] y = MatMulInteger(x, w) }")
    (warning,) = placed(model).warnings
    assert warning == "mm (MatMulInteger) runs on the CPU: CUDA's kernel takes int8 as T1, and not uint8"
    with_opset = tiny.build("g (float[B] x) => (float[B] y) { [neg] y = Neg(x) }")
    with_opset.graph.node(0).op_type = "Nothing"
    (warning,) = placed(with_opset).warnings
    assert (
        warning == "neg (Nothing) has no kernel at all, so no session will start: CUDA has no kernel for this operator"
    )


def test_nodes_with_the_same_reason_share_a_warning() -> None:
    lines = "a0 = Neg(x) " + " ".join(
        f"[dql{n}] q{n}, s{n}, z{n} = DynamicQuantizeLinear(a{n}) a{n + 1} = Exp(a{n})" for n in range(5)
    )
    outputs = ", ".join(f"uint8[B] q{n}" for n in range(5))
    (warning,) = placed(tiny.build(f"g (float[B] x) => ({outputs}) {{ {lines} }}")).warnings
    assert warning.startswith("5 × DynamicQuantizeLinear (dql0, dql1, dql2 and 2 more) run on the CPU: ")


def test_a_number_of_the_gpu_that_a_kernel_reads_from_the_host_is_warned_of() -> None:
    text = """g (float[B,8] x, int64[2] a, int64[2] b) => (float[M,N] y) {
        to = Add(a, b) r = Mul(to, to) [back] y = Reshape(x, r) }"""
    found = placed(tiny.build(text))
    assert found.copies[0].to == "host"
    assert found.warnings == [
        "r is computed on the GPU and read from host memory by back (Reshape, input 1), so each run copies it and "
        "waits for it"
    ]


def test_an_input_that_both_sides_read_is_copied() -> None:
    text = "g (float[B,8] x) => (uint8[B,8] q, float[B,8] y) { q, s, z = DynamicQuantizeLinear(x) y = Neg(x) }"
    assert placed(tiny.build(text)).copies == (Copy("x", "device"),)


def test_a_node_that_the_provider_declines_or_fails_on() -> None:
    text = """g (float[1,2,8,8] x, float[2,2,3,3] w) => (float[1,2,A,B] y) {{ [up] y = ConvTranspose<{pads}>(x, w) }}"""
    weights = {"w": np.ones((2, 2, 3, 3), np.float32)}
    even = placed(tiny.build(text.format(pads="pads=[1,1,1,1]"), **weights))
    assert (where(even), even.warnings) == ({"ConvTranspose": "CUDA"}, [])
    for pads in ("pads=[1,1,0,0]", 'auto_pad="SAME_UPPER"'):
        odd = placed(tiny.build(text.format(pads=pads), **weights))
        assert where(odd) == {"ConvTranspose": "CPU"}
        assert "cuDNN pads both sides alike" in odd.warnings[0]
    blocked = tiny.build(
        """g (float[4,64] x, float[4,2] s) => (int8[4,64] q) {
        [q] q = QuantizeLinear<block_size=32,axis=1,output_dtype=3>(x, s) }""",
        s=np.ones((4, 2), np.float32),
    )
    (warning,) = placed(blocked).warnings
    assert warning.startswith("q (QuantizeLinear) fails when it runs: ")
    assert placed(blocked).nodes[0].provider == "CUDA"


# ------------------------------------------------------------------------------------------------------- other targets


def test_the_cpu_runs_half_precision_through_float() -> None:
    model = tiny.build("g (float16[B,8] x, float16[8,8] w) => (float16[B,8] y) { y = MatMul(x, w) }", w="normal")
    found = placed(model, CPU)
    assert (where(found), found.warnings, found.copies) == ({"MatMul": "CPU"}, [], ())


def test_what_is_defined_by_other_operators_needs_no_kernel() -> None:
    model = tiny.build("g (float[B,8] x) => (float[B,8] y) { y = Mish(x) }")
    (node,) = placed(model).nodes
    assert (node.role, node.provider, placed(model).warnings) == ("expanded", "CUDA", [])


def test_a_target_without_a_table_predicts_nothing() -> None:
    assert predict(shape_model(), Target.load("portable")) is None


# --------------------------------------------------------------------------------------------------- kernels and rules


def blocked(bits: int, block: int, features: int, outputs: int, dtype: str, zero_points: bool) -> ir.Node:
    blocks = -(-features // block)
    extra = ", z" if zero_points else ""
    kinds = f", uint8[{outputs},{blocks}] z" if zero_points else ""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g ({dtype}[B,{features}] x, uint8[{outputs},{blocks},{block * bits // 8}] w,
           {dtype}[{outputs},{blocks}] s{kinds})
        => ({dtype}[B,{outputs}] y) {{
        y = com.microsoft.MatMulNBits<bits={bits},block_size={block},K={features},N={outputs}>(x, w, s{extra}) }}"""
    )
    return model.graph.node(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_rules_of_the_fused_kernel_are_those_of_the_pass(bits: int) -> None:
    """The pass chooses what the kernel takes; the target's rules tell what it takes. Both must say the same."""
    cases = itertools.product((32, 64), (128, 160), (96, 128), ("float16", "float"), (False, True))
    seen = set()
    for block, features, outputs, dtype, zero_points in cases:
        node = blocked(bits, block, features, outputs, dtype, zero_points)
        kind = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.FLOAT
        expected = fused_obstacle(bits, block, features, outputs, kind, zero_points)
        path = path_of(node, CUDA)
        assert path is not None
        assert bool(path.unmet) == bool(expected), (block, features, outputs, dtype, zero_points)
        seen.add(bool(expected))
    assert seen == {False, True}


def test_a_path_says_what_it_wants_and_what_is_there() -> None:
    taken = path_of(blocked(4, 32, 128, 128, "float16", False), CUDA)
    assert taken is not None
    assert taken.text().startswith("fpA_intB")
    missed = path_of(blocked(4, 32, 128, 96, "float", False), CUDA)
    assert missed is not None
    assert missed.text() == (
        "not fpA_intB, which wants that activations have 16 bits (here float) and that N is a multiple of 64 (here "
        "96): from 17 tokens on the weight is dequantized on every run and multiplied by cuBLAS"
    )
    without = path_of(blocked(4, 32, 128, 128, "float16", False), CUDA.model_copy(update={"session_options": {}}))
    assert without is not None
    assert without.unmet == ("the session option ep.cuda.fpa_intb_gemm is 1",)


# --------------------------------------------------------------------------------------------------- comparing, report


def test_compare_tells_what_moved_and_what_optimizers_did() -> None:
    a, b, c = (PlacedNode(name, "Add", "CUDA") for name in "abc")
    predicted = Placement(False, "", (a, b), (Copy("x", "host"),))
    found = compare(predicted, Placement(True, "", (replace(a, provider="CPU"), c), ()))
    assert found.moved == ((a, replace(a, provider="CPU")),)
    assert (found.removed, found.made, found.copies) == ((b,), (c,), (1, 0))


def test_strict_fails_on_misplaced_nodes_and_the_report_survives_json() -> None:
    report = Report("r", "ort-cuda", [], Sizes(0, 0, 0, 0), placement=placed(tiny.build(QUANTIZED)))
    assert report.exit_code == 0
    report.strict = True
    assert report.failures == ["1 warning about where nodes run (--strict)"]
    assert Report.from_json(report.to_json()) == report
    shape = Report("r", "ort-cuda", [], Sizes(0, 0, 0, 0), placement=placed(shape_model()), strict=True)
    assert shape.exit_code == 0


def test_a_compilation_tells_of_every_site_what_runs_it_and_names_the_node_that_falls_back() -> None:
    text = """g (float[B,64] x, float[64,64] w) => (float[B,64] y) {
        [fc] h = MatMul(x, w) [odd] o = Hardmax(h) y = Add(o, h) }"""
    report = qcompiler.compile(tiny.build(text, w="normal"), "w8", target="ort-cuda", strict=True).report
    (site,) = report.with_status("quantized")
    assert (site.kernel, site.provider) == ("MatMulNBits", "CUDA")
    assert site.conditions.startswith("not fpA_intB, which wants that activations have 16 bits (here float): ")
    named = [warning for warning in report.warnings if "CPU" in warning]
    assert named == ["odd (Hardmax) runs on the CPU: CUDA has no kernel for this operator"]
    assert report.failures == ["1 warning about where nodes run (--strict)"]
    assert report.placement is not None
    assert len(report.placement.copies) == 2  # there and back


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_predicts_where_no_provider_starts(tmp_path: Path) -> None:
    model = tiny.build(QUANTIZED)
    model.metadata_props["qcompiler.target"] = "ort-cuda"
    model_io.save(model, tmp_path / "out")
    if measure(tmp_path / "out", CUDA) is not None:
        pytest.skip("a CUDA provider starts here")
    done = CliRunner().invoke(app, ["placement", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "predicted from the kernel table of onnxruntime-gpu 1.31.1" in done.output
    assert "warning: dql (DynamicQuantizeLinear) runs on the CPU" in done.output
    strict = CliRunner().invoke(app, ["placement", str(tmp_path / "out"), "--strict", "--json"])
    assert strict.exit_code == 1
    data = json.loads(strict.stdout)
    assert (data["measured"], data["target"], len(data["warnings"])) == (False, "ort-cuda", 1)
    assert {"name": "dql", "op": "DynamicQuantizeLinear"}.items() <= data["nodes"][1].items()


def test_a_session_on_the_cpu_agrees_with_the_prediction(tmp_path: Path) -> None:
    """The one provider that every test machine has."""
    model = shape_model()
    model_io.save(model, tmp_path / "out")
    measured = measure(tmp_path / "out", CPU, optimized=False)
    assert measured is not None
    assert measured.measured
    difference = compare(placed(model, CPU, optimized=False), measured)
    assert (difference.moved, difference.removed, difference.made) == ((), (), ())


# -------------------------------------------------------------------------------------- models that nobody prepared


def test_a_node_without_a_name_is_told_by_its_operator_and_output() -> None:
    model = tiny.build("g (float[B,8] x) => (float[B,8] y) { a = Tan(x) y = Neg(a) }")
    for node in model.graph:
        node.name = ""
    (warning,) = placed(model).warnings
    assert warning.startswith("Tan_a (Tan) runs on the CPU")
    assert [node.name for node in model.graph] == ["", ""]


def test_a_node_of_a_function_is_told_by_the_function_too() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21, "here": 1]>
        g (float[B,8] x) => (float[B,8] y) { y = here.Act(x) }
        <domain: "here", opset_import: ["": 21]> Act (q) => (r) { z = Tan(q) r = Mul(z, q) }""")
    (warning,) = placed(model).warnings
    assert warning.startswith("Act/Tan_z (Tan) runs on the CPU")


def test_types_that_the_file_does_not_say_are_inferred() -> None:
    text = "g (float[B,8] x, uint8[8,4] w) => (int32[B,4] y) { u = Cast<to=2>(x) [mm] y = MatMulInteger(u, w) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    assert placed(model).warnings == [
        "mm (MatMulInteger) runs on the CPU: CUDA's kernel takes int8 as T1, and not uint8"
    ]


def test_what_the_runtime_takes_out_is_not_told() -> None:
    text = """g (float[B,8] x) => (float[B,8] y, float[B,8] z) {
        a = Neg(x) b = Neg(x) d = Dropout(b) y = Exp(a) z = Exp(d) }"""
    model = tiny.build(text, opset=22)
    assert [node.op for node in placed(model).nodes] == ["Neg", "Exp", "Exp"]
    assert [node.op for node in placed(model, optimized=False).nodes] == ["Neg", "Neg", "Dropout", "Exp", "Exp"]


def test_bfloat16_that_the_gpu_has_no_kernel_for_runs_nowhere() -> None:
    """CPUs read float16 through Casts that the runtime inserts, and bfloat16 not at all."""
    text = "g ({kind}[B,8] x) => (int64[B] y) {{ [best] y = ArgMax<axis=1,keepdims=0>(x) }}"
    (warning,) = placed(tiny.build(text.format(kind="bfloat16"))).warnings
    assert warning.startswith("best (ArgMax) has no kernel at all, so no session will start: ")
    assert placed(tiny.build(text.format(kind="float16"))).warnings == []


def test_nodes_without_names_are_measured_under_those_of_the_prediction(tmp_path: Path) -> None:
    model = tiny.build("g (float[B,8] x) => (float[B,8] y) { a = Neg(x) b = Neg(a) y = Exp(b) }")
    for node in model.graph:
        node.name = ""
    model_io.save(model, tmp_path / "out")
    predicted = placed(model, CPU, optimized=False)
    measured = measure(tmp_path / "out", CPU, predicted=predicted, optimized=False)
    assert measured is not None
    assert [node.name for node in measured.nodes] == ["Neg_a", "Neg_b", "Exp_y"]
    assert compare(predicted, measured).made == ()


# ------------------------------------------------------------------------------------------------- recommendations

CONVOLUTION = "g (float[B,3,8,8] x, float[8,3,3,3] w) => (float[B,8,6,6] y) { y = Conv(x, w) }"


def test_convolutions_are_recommended_what_has_kernels_for_them() -> None:
    (found,) = recommend(tiny.build(CONVOLUTION, w="normal"))
    assert (found.target, found.recipe) == ("ort-cpu", "int8-static")
    with pytest.raises(TargetError, match="ort-cuda recommends no recipe for a model that is mostly convolutions"):
        recommend(tiny.build(CONVOLUTION, w="normal"), "ort-cuda")


def test_nothing_is_recommended_where_nothing_can_be_quantized_and_little_where_little_can() -> None:
    assert recommend(tiny.build("g (float[B,8] x) => (float[B,8] y) { y = Neg(x) }")) == []
    model = tiny.build("g (float[B,8] x, float[8,8] w) => (float[B,8] y) { y = MatMul(x, w) }", w="normal")
    assert recommend(model)[0].reasons[0].endswith("may cost more than it")
    with pytest.raises(TargetError, match="portable recommends no recipe"):
        recommend(model, "portable")


def test_recommendations_give_reasons_and_say_what_is_not_measured() -> None:
    model = tiny.build("g (float[B,8] x, float[8,8] w) => (float[B,8] y) { y = MatMul(x, w) }", w="normal")
    found = {item.target: item for item in recommend(model)}
    assert set(found) == {"ort-cpu", "ort-cuda"}
    cpu, cuda = found["ort-cpu"], found["ort-cuda"]
    assert cpu.recipe == "smoothquant"
    assert any("× float32 MatMul" in reason for reason in cpu.reasons)
    assert any("has not been measured" in reason for reason in cuda.reasons)
    assert [item.target for item in recommend(model, "ort-cuda")] == ["ort-cuda"]
