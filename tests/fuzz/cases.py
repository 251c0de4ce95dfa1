"""A case by (seed, number): the files of a folder, and the command that is run in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tests.fuzz import damage, data, graphs, recipes

Rng = np.random.Generator
MODEL, OUTPUT = "in/model.onnx", "out"


@dataclass(frozen=True)
class Case:
    """What is run, in the folder that was written."""

    kind: str
    arguments: list[str]
    eight_bits: bool = False
    """Whether weights alone are rounded, to 8 bits, so that the answers are to be near."""

    @property
    def command(self) -> str:
        return self.arguments[0]


def make(seed: int, number: int, folder: Path) -> Case:
    """Write the files of the case into an empty folder."""
    rng = np.random.default_rng([seed, number])
    (folder / "in").mkdir()
    weights = np.array([weight for _, weight in MAKERS])
    return MAKERS[int(rng.choice(len(MAKERS), p=weights / weights.sum()))][0](folder, rng)


def _save(model: onnx.ModelProto, folder: Path) -> bytes:
    content: bytes = model.SerializeToString()
    (folder / MODEL).write_bytes(content)
    return content


def _arguments(folder: Path, rng: Rng, kind: str, shape: data.Shape = ()) -> Case:
    """One of the commands on the model, mostly `compile`; data where the recipe needs it, and now and then else."""
    model = MODEL if rng.random() < 0.7 else "in"
    drawn, recipe = rng.random(), recipes.built_in(rng)
    spec = "random"
    if shape and rng.random() < 0.3:
        spec = data.right(folder, shape, rng)
    if drawn < 0.82:
        arguments = ["compile", model, "-r", recipe, "-o", OUTPUT]
        free = recipe in recipes.DATA_FREE
        if not free or rng.random() < 0.3:
            arguments += ["--calibration", spec, "--samples", str(rng.choice([3, 8]))]
        if rng.random() < 0.12:
            arguments += ["--target", str(rng.choice(["portable", "tensorrt", "ort-cuda"]))]
        if rng.random() < 0.05:
            arguments += ["--memory-limit", "1M"]
        return Case(kind, arguments, recipe in recipes.EIGHT_BITS)
    choices = (
        ["inspect", model], ["inspect", model, "--recipe", recipe], ["diff", model, MODEL], ["debug", model, "-r",
        recipe, "--calibration", spec],
        ["diff", model, MODEL, "--calibration", spec], ["calibrate", model, "-r", recipe, "--calibration",
        spec, "-o", "s.safetensors"],
        ["eval", model, "--data", spec, "--reference", MODEL], ["placement", model], ["inspect", model, "--json"],
        ["diff", model, MODEL, "--json"], ["targets", "--best", model],
    )  # fmt: skip
    return Case(kind, choices[int(rng.integers(len(choices)))])


def _shape(model: onnx.ModelProto) -> data.Shape:
    return tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])


def graph(folder: Path, rng: Rng) -> Case:
    model = graphs.build(rng)
    _save(model, folder)
    return _arguments(folder, rng, "graph", _shape(model))


def structure(folder: Path, rng: Rng) -> Case:
    model = graphs.build(rng, most=4)
    shape = _shape(model)
    changed = damage.damaged(model, rng)
    damage.write_external(folder / "in", rng)
    _save(model, folder)
    return _arguments(folder, rng, " ".join(["structure:", *changed]), shape)


def bytes_(folder: Path, rng: Rng) -> Case:
    model = graphs.build(rng, most=4)
    content, other = _save(model, folder), graphs.build(rng, most=2).SerializeToString()
    early = rng.random() < 0.5
    content = damage.early_bytes_damaged(content, rng) if early else damage.bytes_damaged(content, other, rng)
    (folder / MODEL).write_bytes(content)
    return _arguments(folder, rng, "bytes", _shape(model))


def recipe(folder: Path, rng: Rng) -> Case:
    _save(graphs.build(rng, most=3, odd=False), folder)
    arguments = ["compile", MODEL, "-o", OUTPUT]
    if rng.random() < 0.6:
        recipes.file(folder / "recipe.yaml", rng)
        arguments += ["-r", "recipe.yaml"]
    else:
        names = ("", "nothing", ".", "in", "in/model.onnx", "a" * 300, "nothing.yaml", "/dev/null", "w8 ", "\x1b[31m")
        arguments += ["-r", recipes.built_in(rng) if rng.random() < 0.85 else names[int(rng.integers(len(names)))]]
    if rng.random() < 0.6:
        arguments += recipes.settings(rng)
    if rng.random() < 0.7:
        arguments += ["--calibration", "random", *([] if "--samples" in arguments else ["--samples", "3"])]
    return Case("recipe", arguments)


def data_(folder: Path, rng: Rng) -> Case:
    model = graphs.build(rng, most=3, odd=False)
    _save(model, folder)
    spec, *extra = data.hostile(folder, _shape(model), rng)
    drawn = rng.random()
    if drawn < 0.7:
        named = ("int8-static", "smoothquant", "int8-dynamic", "llm-int8", "awq-w4")[
            int(rng.choice([0, 0, 0, 1, 2, 3]))
        ]
        arguments = ["compile", MODEL, "-r", named, "-o", OUTPUT, "--calibration", spec, *extra]
    elif drawn < 0.85:
        arguments = ["eval", MODEL, "--data", spec, "--reference", MODEL, *extra]
    else:
        arguments = ["calibrate", MODEL, "-r", "int8-static", "--calibration", spec, "-o", "s.safetensors", *extra]
    return Case("data", arguments)


MAKERS: tuple[tuple[Callable[[Path, Rng], Case], int], ...] = (
    (graph, 28), (structure, 30), (bytes_, 16), (recipe, 14), (data_, 12),
)  # fmt: skip
