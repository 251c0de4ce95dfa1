"""Recipes: reading, defaults, and one clear sentence for everything that can be wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import RecipeError, SchemeError, TargetError
from qcompiler.recipes import Recipe, Step, recipe_names


def minimal(**more: Any) -> Recipe:
    return Recipe.from_dict({"name": "mine", "passes": ["quantize-weights"], **more})


def built(recipe: Recipe) -> list[Any]:
    """The passes, each with the options of its own class."""
    return list(recipe.build())


def lowering(recipe: Recipe) -> list[Any]:
    return list(recipe.build_lowering())


def test_built_in_recipes_build_for_every_target_that_takes_them() -> None:
    assert {"int8-static", "int8-weights", "smoothquant", "gptq-w4", "awq-w4", "nf4"} <= set(recipe_names())
    for name in recipe_names():
        for target in ("portable", "ort-cpu", "ort-cuda"):
            resolved = Recipe.load(name).resolved(target)
            assert [step.name for step in resolved.passes] == [built.name for built in resolved.build()]
            assert resolved.build_lowering() == [] if target == "portable" else resolved.build_lowering()


def test_yaml_round_trip_of_a_resolved_recipe(tmp_path: Path) -> None:
    resolved = Recipe.load("smoothquant").with_options(["smooth-quant.alpha=0.25"]).resolved("ort-cpu")
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    again = Recipe.load(file)
    assert again == resolved.model_copy(update={"source": again.source})
    assert again.resolved() == again
    assert built(again)[0].alpha == 0.25


def test_target_preferences_fill_only_what_the_recipe_leaves_open() -> None:
    assert minimal(passes=["quantize-weights"]).resolved("ort-cuda").passes[0].options["format"] == "uint8"
    said = minimal(passes=[{"quantize-weights": {"format": "int8"}}])
    assert said.resolved("ort-cuda").passes[0].options["format"] == "int8"
    assert minimal(passes=["quantize-weights"]).resolved("portable").passes[0].options["format"] == "int8"


def test_another_target_brings_its_own_lowering() -> None:
    resolved = Recipe.load("int8-weights").resolved("ort-cpu")
    assert [step.name for step in resolved.lowering or ()] == [
        "lower-int8", "lower-dynamic-int8", "lower-weight-only", "lower-embedding",
    ]  # fmt: skip
    assert resolved.resolved("portable").lowering == ()
    cuda = lowering(resolved.resolved("ort-cuda"))
    assert [step.name for step in cuda] == ["lower-integer-chain", "lower-fp8", "lower-weight-only", "lower-embedding"]
    assert cuda[2].block_size == 32


def test_settings_parse_yaml_values_and_reach_the_lowering() -> None:
    recipe = Recipe.load("smoothquant").with_options(
        ["quantize-activations.ignore=[lm_head, '*.down_proj']", "smooth-quant.insert_mul=true"]
    )
    smooth, _, activations = built(recipe)
    assert smooth.insert_mul is True
    assert activations.ignore == ("lm_head", "*.down_proj")
    lowered = (
        Recipe.load("int8-weights").for_target("ort-cuda").with_options(["lower-weight-only.block_size=64"]).resolved()
    )
    assert lowering(lowered)[2].block_size == 64
    assert lowering(lowered)[2].accuracy_level == 0, "the target's other preferences stay"
    lowered = Recipe.load("int8-weights").resolved("ort-cpu").with_options(["lower-weight-only.block_size=64"])
    assert lowering(lowered)[2].block_size == 64


def test_settings_need_to_make_sense_only_together() -> None:
    settings = ["quantize-weights.group_size=32", "quantize-weights.granularity=group"]
    assert built(minimal().with_options(settings))[0].group_size == 32
    with pytest.raises(SchemeError, match="group_size"):
        minimal().with_options(settings[:1])


def test_settings_go_where_they_make_sense() -> None:
    recipe = Recipe.load("rtn-w4").with_options(["quantize-weights.group_size=32"])
    assert [step.group_size for step in built(recipe)] == [32, None]
    with pytest.raises(SchemeError, match="int5"):
        Recipe.load("rtn-w4").with_options(["quantize-weights.format=int5"])


def test_an_open_group_size_is_what_the_target_runs_fastest() -> None:
    sizes = {t: built(Recipe.load("gptq-w4").resolved(t))[0].group_size for t in ("ort-cpu", "ort-cuda", "portable")}
    assert sizes == {"ort-cpu": 128, "ort-cuda": 32, "portable": None}
    chosen = Recipe.load("gptq-w4").with_options(["gptq.group_size=64"]).resolved("ort-cuda")
    assert built(chosen)[0].group_size == 64


def test_a_pass_that_occurs_twice_gets_the_setting_twice() -> None:
    recipe = minimal(passes=["quantize-weights", "quantize-weights"]).with_options(["quantize-weights.search=mse"])
    assert [step.search for step in built(recipe)] == ["mse", "mse"]


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        minimal().target = "portable"  # type: ignore[misc]


def test_steps_can_be_given_as_objects() -> None:
    recipe = Recipe(name="x", passes=(Step(name="quantize-weights", options={"format": "int4"}),))
    assert built(recipe)[0].format == "int4"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"passes": [{"quantize-weights": {"fromat": "int8"}}]},
            r"pass quantize-weights has no option 'fromat'.*'format'",
        ),
        ({"passes": ["quantise-weights"]}, r"no pass 'quantise-weights'; did you mean 'quantize-weights'"),
        (
            {"passes": [{"smooth-quant": {"alpha": "much"}}]},
            r"smooth-quant: alpha should be 'auto' or a number, but is 'much'",
        ),
        ({"passes": [{"quantize-activations": {"percent": 10}}]}, r"percent should be greater than 50, but is 10"),
        ({"passes": [{"quantize-weights": {"targets": "lm_head"}}]}, r"targets should be a tuple, but is 'lm_head'"),
    ],
)
def test_wrong_passes_are_named(data: dict[str, Any], message: str) -> None:
    recipe = Recipe.from_dict({"name": "mine", **data}, "recipe mine.yaml")
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.build()
    assert str(caught.value).startswith("recipe mine.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"passes": []}, "passes should have at least one entry"),
        ({}, r"passes is missing"),
        ({"pases": []}, r"no entry 'pases'; did you mean 'passes'"),
        ({"passes": ["a"], "source": "x"}, r"no entry 'source'"),
        ({"passes": [{"a": {}, "b": {}}]}, r"a pass is a name, or one name with its options, not a mapping of a, b"),
        ({"passes": ["a"], "gates": {"klm": 1}}, r"no gate 'klm'; did you mean 'kl'"),
        ({"passes": ["a"], "gates": {"kl": "low"}}, r"gates.kl should be a number, but is 'low'"),
        ({"passes": ["a"], "calibration": {"samples": 0}}, r"calibration.samples should be greater than or equal to 1"),
        ({"passes": ["a"], "calibration": {"sample": 1}}, r"no entry calibration.sample"),
        ({"passes": ["a"], "exclude": "lm_head"}, r"exclude should be a tuple, but is 'lm_head'"),
    ],
)
def test_wrong_entries_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_dict({"name": "mine", **data})
    assert str(caught.value).startswith("recipe mine: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [a\nname: b", r"not valid YAML \(line 2, column"),
        ("passes: [a]\npasses: [b]", r"not valid YAML \(line 2, .*'passes' occurs twice"),
        ("- a", r"should be a mapping with name and passes, but is list"),
        ("", "is empty; it needs passes"),
        ("passes: !!python/object/apply:os.system [true]", r"not valid YAML \(line 1"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_without_a_name_is_called_after_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("passes: [quantize-weights]", encoding="utf-8")
    assert Recipe.load(str(file)).name == "ours"


def test_unknown_recipes() -> None:
    with pytest.raises(RecipeError, match="no recipe 'smothquant'; did you mean 'smoothquant'"):
        Recipe.load("smothquant")
    with pytest.raises(RecipeError, match=r"no recipe file absent\.yaml"):
        Recipe.load("absent.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("alpha=1", "not of the form PASS.OPTION=VALUE"),
        ("smooth-quant.alpha", "not of the form PASS.OPTION=VALUE"),
        ("smoth-quant.alpha=1", "the recipe has no pass 'smoth-quant'; did you mean 'smooth-quant'"),
        ("smooth-quant.alpa=1", "has no option 'alpa'; did you mean 'alpha'"),
        ("smooth-quant.alpha=[", "not valid YAML"),
    ],
)
def test_wrong_settings(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load("smoothquant").with_options([setting])


def test_a_scheme_error_says_where_it_is() -> None:
    with pytest.raises(SchemeError, match=r"recipe mine: pass quantize-weights: .*group_size"):
        minimal(passes=[{"quantize-weights": {"group_size": 32}}]).build()


def test_unknown_target() -> None:
    with pytest.raises(TargetError, match="no target 'ort-gpu'"):
        minimal(target="ort-gpu").resolved()
