"""Breaks the code in one place at a time and looks whether a test fails: `make mutants`.

    make mutants                    the faults that the tests once let pass (`NAMED`), each with the tests that see it
    make mutants COUNT=40 SEED=1    so many drawn at random from the modules of `CORE`: a comparison turned, a number
                                    off by one, a `not` or a clause dropped, a guard that never holds

Each is written into a copy of the tree, where its tests alone run, up to the first that fails. Exit code 1 where fewer
than `LEAST` of them are seen, or where one cannot be tried.

Ours, as neither tool that is kept up fits: mutmut copies the tree, rewrites every function of it and chooses places
and tests itself, and cosmic-ray breaks the working tree; neither takes a change in words ("this guard is gone") with
the tests that must see it.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = 0.9  # of all, killed
PATIENCE = 300  # seconds; who takes longer, as a loop may that never ends, was seen


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file`; with `new` in its place one of `tests` fails."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _named(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tuple(f"tests/{test}" for test in tests))


# What let wrong code pass before each had its test: the plumbing between parts that are tested well, guards with a
# reason of one clause, the other spelling of a layer, special data, words for rare states.
NAMED: tuple[Mutant, ...] = (
    _named("C1", "qcompiler/rewriting/quantease.py",
           "(denominator > 0) & (ratio < LARGEST_CHANGE) & (ratio > 1 / LARGEST_CHANGE)", "denominator > 0",
           "rewriting/test_quantease.py::test_a_scale_changes_less_than_twofold_in_a_sweep"),
    _named("C2", "qcompiler/rewriting/quantease.py", ".numpy().astype(dtype).astype(np.float32)",
           ".numpy().astype(np.float32)", "rewriting/test_quantease.py::test_two_sweeps_are_one_sweep_twice"),
    _named("C3", "qcompiler/rewriting/quantease.py", "if not bool(alive[column]):", "if False:",
           "rewriting/test_quantease.py::test_inputs_that_are_always_zero_cost_nothing_and_break_nothing"),
    _named("J1", "qcompiler/driver/checkpoint.py", "if before.get(key) != fingerprint[key]:",
           "if key in before and before[key] != fingerprint[key]:",
           "driver/test_checkpoint.py::test_a_folder_that_says_less_than_the_run_is_another_run"),
    _named("J3", "qcompiler/driver/checkpoint.py", 'partial = path.with_suffix(".partial")', "partial = path",
           "driver/test_checkpoint.py::test_a_stage_that_was_written_by_half_is_not_finished"),
    _named("IN1", "qcompiler/driver/inputs.py", "return found.part(0, total - held_out),",
           "return found.part(0, total),", "driver/test_inputs.py"),
    _named("IN2", "qcompiler/driver/inputs.py", "min(calibration.held_out, total // 2)",
           "min(calibration.held_out, total - 1)", "driver/test_inputs.py"),
    _named("SA1", "qcompiler/calibration/samples.py", "else min(self._stop, self._start + stop)",
           "else self._start + stop", "calibration/test_samples.py::test_a_part_ends_with_what_it_is_a_part_of"),
    _named("SA2", "qcompiler/calibration/samples.py", 'f"{name}:{array.dtype}:{array.shape};"', 'f"{name};"',
           "calibration/test_samples.py::test_hash_follows_shapes_and_types"),
    _named("SA4", "qcompiler/calibration/samples.py", "np.random.default_rng(seed)", "np.random.default_rng(0)",
           "calibration/test_samples.py::test_random_data_fits_and_warns"),
    _named("SA6", "qcompiler/calibration/sources.py", 'words.partition(" ") if index else ("", "", words)',
           '("", "", words)', "calibration/test_samples.py::test_a_window_does_not_begin_within_a_word"),
    _named("P1", "qcompiler/placement/predict.py", "SMALL = 100", "SMALL = 99",
           "placement/test_placement.py::test_values_of_sixteen_bits_and_large_constants_stay"),
    _named("SW4", "qcompiler/sites/stored/constants.py",
           "for item in node.inputs if computes else node.inputs[:1]:", "for item in node.inputs:",
           "sites/test_stored.py::test_what_says_how_to_move_a_constant_is_no_part_of_the_weight"),
    _named("MD1", "qcompiler/model_diff/stories.py", "if shared or a.weight.shape != b.weight.shape",
           "if a.weight.shape != b.weight.shape",
           "model_diff/test_diff.py::test_a_layer_that_now_shares_the_weight_of_another_has_changed_though_its_numbers_are_the_same"),
    _named("MD3", "qcompiler/model_diff/scales.py", "if known.mean() < MOSTLY:", "if False:",
           "model_diff/test_diff.py::test_another_gain_alone_is_no_scale_that_moved"),
    _named("MD4", "qcompiler/model_diff/scales.py",
           "if _agree(factors, columns) if columns is not None else passes:", "if True:",
           "model_diff/test_diff.py::test_another_gain_alone_is_no_scale_that_moved"),
    _named("D1", "qcompiler/diagnosis/measure.py", "mine.before = max(floats,", "mine.before = min(floats,",
           "diagnosis/test_debug.py::test_a_layer_is_as_good_as_the_worst_of_its_inputs"),
    _named("MP1", "passes/mixed_precision.py", "np.ceil(costs / budget * STEPS - 1e-9)",
           "np.floor(costs / budget * STEPS)",
           "passes/test_mixed_precision.py::test_costs_just_above_a_step_keep_the_budget"),
    _named("B1", "qcompiler/report/build.py", "if float_input:", "if False:",
           "report/test_report.py::test_a_layer_whose_input_is_float_again_is_said_to_have_quantized_weights_alone"),
    _named("B2", "qcompiler/report/build.py",
           "if not any(step.selects(item.site) for step in rounding):", "if False:",
           "report/test_report.py::test_what_cannot_be_quantized_is_excluded_where_nobody_asked_for_it"),
    _named("B5", "qcompiler/report/build.py",
           "found[value] = found[value] * divisor if value in found else divisor", "found[value] = divisor",
           "report/test_report.py::test_two_exact_passes_in_a_row_leave_the_figures_of_layers_high"),
    _named("FU1", "passes/fuse_attention.py", "elif proved and proof.padding is not proved[0][1].padding:",
           "elif False:",
           "passes/test_fuse_attention.py::test_layers_that_read_a_mask_and_layers_that_do_not_are_not_fused_together"),
    _named("R1", "qcompiler/sessions/runtime.py", "disabled_optimizers=list(recorded.disabled_optimizers)",
           "disabled_optimizers=[]", "evaluation/test_evaluate.py::test_a_disabled_optimizer_does_not_run"),
    _named("LW2", "passes/lower_weight_only.py", "and embedding.scale is scale", "",
           "passes/test_lower_weight_only.py::test_an_embedding_with_scales_of_its_own_keeps_them"),
    _named("E1", "qcompiler/evaluation/evaluate.py", "baseline.update(expected, ids, mask)",
           "baseline.update(expected, ids)", "evaluation/test_evaluate.py::test_padding_counts_for_neither_model"),
    _named("L2", "qcompiler/evaluation/difference.py", "infinite = np.isinf(a) & (a == b)", "infinite = np.isinf(a)",
           "evaluation/test_compare.py::test_difference_of_special_numbers"),
    _named("Q2", "qcompiler/formats/arithmetic.py", "== np.float16 and not normal else info", "== np.float16 else info",
           "formats/test_arithmetic.py::test_a_scale_of_16_bits_is_never_zero"),
    _named("FA2", "qcompiler/sites/fold_targets.py", "return None if np.isin(part, rest).any() else part",
           "return part", "rewriting/test_folding.py::test_channels_that_somebody_else_reads_as_well_take_no_factor"),
    _named("FA4", "qcompiler/sites/fold_targets.py", "({COUNTS} if standard else set())", "set()",
           "rewriting/test_folding.py::test_refusals"),
    # Once a list of homogeneous operators; now their traits.
    _named("FA5", "qcompiler/graph/operators/standard.py", '("Relu", "X", "Y", "elementwise homogeneous"),',
           '("Relu", "X", "Y", "elementwise homogeneous"), ("Clip", "X min max", "Y", "elementwise homogeneous"),',
           "rewriting/test_folding.py::test_nothing_passes_what_is_no_straight_line_through_zero"),
    _named("F4", "qcompiler/rewriting/folding.py", "if linear.bias is not None:\n        node = linear.bias_node",
           "if linear.bias_node is not None:\n        node = linear.bias_node",
           "rewriting/test_folding.py::test_a_bias_within_the_layer_is_divided_too"),
    _named("M3", "qcompiler/sites/find.py", "return (bias, add) if len(_shape(bias)) <= rank else (None, None)",
           "return (bias, add)", "sites/test_find.py::test_what_gives_the_product_another_rank_is_no_bias"),
    _named("CS2", "qcompiler/rewriting/cache_storage.py", "np.maximum((hi - lo) / 2, least)", "(hi - lo) / 2",
           "passes/test_quantize_kv_cache.py::test_channels_that_hardly_move_are_divided_by_a_number_that_is_there"),
    _named("SR3", "qcompiler/statistics/ranges.py", "self.zeros += other.zeros", "pass",
           "statistics/test_statistics.py::test_entropy_keeps_a_uniform_distribution_whole_and_ignores_exact_zeros"),
    _named("SR4", "qcompiler/statistics/ranges.py", "return Range(max(lo, self.lo), min(hi, self.hi))",
           "return Range(lo, hi)", "statistics/test_statistics.py::test_a_percentile_lies_within_the_values"),
    _named("H2", "qcompiler/half/plan.py",
           "return any(self._too_large(item) for node in joins for item in node.inputs if item is not None)",
           "return False",
           "passes/test_convert_float.py::test_a_past_whose_present_is_too_large_stays_in_float32_with_it"),
    _named("QA3", "passes/quantize_activations.py",
           "if len(uses) == 1 and not site.output.is_graph_output() and uses[0]", "if len(uses) == 1 and uses[0]",
           "passes/test_quantize_activations.py::test_a_convolution_that_is_an_output_itself_has_no_pair_behind_its_relu"),
    _named("NF2", "passes/nf4.py", "slices(shape, block_size // gcd(inputs, block_size))", "slices(shape, 1)",
           "passes/test_nf4.py::test_a_weight_in_slices_is_the_weight_in_one"),
    _named("K2", "passes/quantize_kv_cache.py",
           'attributes.get_int("rotary_embedding_dim", 0) if rotates else self.rotary_dim', "self.rotary_dim",
           "passes/test_fused_cache.py::test_the_operator_says_which_channels_it_rotates"),
    _named("K4", "passes/quantize_kv_cache.py", "if storage.packed and cache.head_size % 2:", "if False:",
           "passes/test_quantize_kv_cache.py::test_heads_of_odd_size_have_no_pairs_of_four_bits"),
    # Once a list of operators that draw numbers; now their trait.
    _named("S4", "qcompiler/sessions/segments.py", 'repeatable = not has(node, "random") and not any(',
           "repeatable = not any(", "sessions/test_segments.py::test_numbers_by_chance_are_drawn_once"),
    _named("IO6", "qcompiler/graph/session.py", "if len(folders) > 1 or _bytes_in_memory(model) > INLINE_SESSION:",
           "if len(folders) > 1:", "graph/test_files.py::test_large_new_constants_go_through_a_file"),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------ drawn at random

# The modules in which a wrong number or a missing guard costs most, and the tests that are theirs.
CORE = {
    "qcompiler/calibration/samples.py": ("calibration/test_samples.py",),
    "qcompiler/driver/checkpoint.py": ("driver/test_checkpoint.py",),
    "qcompiler/driver/inputs.py": ("driver/test_inputs.py", "recipes/test_recipe.py", "driver/test_end_to_end.py"),
    "qcompiler/evaluation/likelihood.py": ("evaluation/test_compare.py", "evaluation/test_evaluate.py"),
    "qcompiler/formats/arithmetic.py": ("formats/test_search.py", "formats/test_arithmetic.py"),
    "qcompiler/formats/scheme.py": ("formats/test_scheme.py", "formats/test_search.py"),
    "qcompiler/formats/search.py": ("formats/test_search.py", "passes/test_quantize_weights.py"),
    "qcompiler/report/build.py": ("report/test_build.py", "report/test_report.py"),
    "qcompiler/rewriting/folding.py": ("rewriting/test_folding.py", "passes/test_smooth_quant.py"),
    "qcompiler/rewriting/quantease.py": ("rewriting/test_quantease.py",),
    "qcompiler/rewriting/weights.py": ("passes/test_quantize_weights.py", "passes/test_hqq.py"),
    "qcompiler/sites/find.py": ("sites/test_find.py",),
    "qcompiler/sites/fold_targets.py": ("sites/test_fold_targets.py", "rewriting/test_folding.py"),
    "qcompiler/statistics/ranges.py": ("statistics/test_statistics.py",),
}  # fmt: skip

_TURNED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Each expression that can be broken, and what to write in its place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            yield node, f"({left} {_TURNED[type(node.ops[0])]} {right})"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, f"({node.value} + 1)"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, f"({ast.unparse(node.operand)})"
        elif isinstance(node, ast.BoolOp):
            word = " and " if isinstance(node.op, ast.And) else " or "
            for dropped in node.values:
                kept = [f"({ast.unparse(clause)})" for clause in node.values if clause is not dropped]
                yield node, f"({word.join(kept)})"
        elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue):
            yield node.test, "False"


def _unseen(tree: ast.Module) -> set[ast.AST]:
    """What no test can see, by rule: types; how text for people is laid out; how much is worked on at once, which names
    that end in AT_ONCE say; and by how much a size of -1 is below 0, as numpy takes any such for what is left."""
    found: list[ast.AST | None] = []
    for node in ast.walk(tree):
        found += [getattr(node, key, None) for key in ("annotation", "returns")]
        match node:
            case ast.keyword(arg="indent" | "stacklevel", value=value):
                found.append(value)
            case ast.Assign(targets=targets, value=value) if all(_is_portion(target) for target in targets):
                found.append(value)
            case ast.If(test=test) if any(_is_portion(part) for part in ast.iter_child_nodes(test)):
                found.append(test)
            case ast.Call(func=ast.Attribute(attr="reshape"), args=sizes):
                found += [size for size in sizes if isinstance(size, ast.UnaryOp)]
    return {inner for root in found if root is not None for inner in ast.walk(root)}


def _is_portion(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id.endswith("AT_ONCE")


def _broken(file: str) -> list[Mutant]:
    """All the simple mutants of a module. `old` is the whole file, as the place alone need not be unique."""
    source = (ROOT / file).read_text(encoding="utf-8")
    tree, found = ast.parse(source), []
    unseen = _unseen(tree)
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, text in _changes(tree):
        if node in unseen or node.end_lineno is None or node.end_col_offset is None:
            continue
        first, last = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        raw = source.encode()
        before = " ".join(raw[first:last].decode().split())
        new = (raw[:first] + text.encode() + raw[last:]).decode()
        found.append(_named(f"{file}:{node.lineno} {before} → {text}", file, source, new, *CORE[file]))
    return found


def drawn(count: int, seed: int) -> list[Mutant]:
    """As many from each module as from any other, in an order that `seed` decides."""
    generator = random.Random(seed)
    piles = [_broken(file) for file in CORE]
    for pile in piles:
        generator.shuffle(pile)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(piles):
        generator.shuffle(piles)
        chosen += [pile.pop() for pile in piles if pile][: count - len(chosen)]
    return chosen


# -------------------------------------------------------------------------------------------------------------- trying


def copy_of_the_tree(folder: Path) -> None:
    """What git knows of, new files too; the models that were exported before are the same files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    exported = ROOT / "models" / ".cache"
    (folder / "models" / ".cache").mkdir()
    for path in exported.iterdir() if exported.exists() else ():
        if path.name != "compiled" and path.suffix != ".lock":  # compiled by the code as it stands
            (folder / "models" / ".cache" / path.name).symlink_to(path)


def failing(tree: Path, tests: Sequence[str]) -> str:
    """The end of what pytest says where one of the tests fails, else nothing; raises where they cannot be run."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {PATIENCE} s"
    # 2: the tests cannot even be collected, as the module fails when it is imported.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{' '.join(tests)} cannot be run: {done.stdout[-500:]}")
    return done.stdout[-2000:] if done.returncode else ""


def killed(tree: Path, mutant: Mutant) -> bool:
    """Whether the mutant's tests see it. Raises ValueError where its place is gone."""
    path = tree / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its place stands {source.count(mutant.old)} times in {mutant.file}")
    broken = source.replace(mutant.old, mutant.new)
    ast.parse(broken)  # what is no Python would be seen by any test
    path.write_text(broken, encoding="utf-8")
    try:
        return failing(tree, mutant.tests) != ""
    finally:
        path.write_text(source, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="of the mutants to try; all that are named, where none is given")
    parser.add_argument("--count", type=int, default=0, help="draw so many simple ones instead")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    mutants = drawn(given.count, given.seed) if given.count else list(NAMED)
    mutants = [mutant for mutant in mutants if not given.names or mutant.name in given.names]
    seen, sound = 0, set[tuple[str, ...]]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        tree = Path(name)
        copy_of_the_tree(tree)
        for mutant in mutants:
            if mutant.tests not in sound and (words := failing(tree, mutant.tests)):
                print(f"{words}\n{mutant.name}: its tests fail as the code stands, so nothing can be learned from them")
                return 1
            sound.add(mutant.tests)
            begun = time.monotonic()
            found = killed(tree, mutant)
            seen += found
            print(f"{'killed  ' if found else 'SURVIVED'} {time.monotonic() - begun:4.0f} s  {mutant.name}", flush=True)
    rate = seen / max(len(mutants), 1)
    print(f"{seen} of {len(mutants)} killed, {rate:.0%} ({LEAST:.0%} are due)")
    return 0 if mutants and rate >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
