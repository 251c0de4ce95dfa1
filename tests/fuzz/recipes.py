"""Recipes and settings, right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from passes import PASSES
from qcompiler.recipes import recipe_names
from qcompiler.recipes.registry import options_of, pass_class

Rng = np.random.Generator
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, 0.0, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "auto",
    "x",
    "int8", "int4", "uint8", "int3", "float8e4m3fn", "group", "group(32)", "group(0)", "group(-1)", "group(9999999999)",
    "per-tensor", "per-channel", "per-token", "block", "float", "mse", "minmax", "percentile", "entropy", [],
    ["linear"],
    ["head", "embedding"], ["nothing"], [1], [[]], {}, {"a": 1}, "re:(", "re:(a+)+$", "re:.*", "*", "[", "x" * 400,
    ["*"], "cuda", "cpu", "symmetric", "weighted", [None], "\x1b[31m", "ü",
)  # fmt: skip
TEXTS = (
    "", "\0", "- a", "name: x", "name: x\npasses:", "name: x\npasses: []", "a: [", "? [a]\n: b", "{}", "[]", "3",
    "2020-99-99",
    "name: 2020-99-99\npasses: [quantize-weights]", "name: x\npasses: [quantize-weights: {bits: " + "9" * 5000 + "}]",
    "[" * 2000, "{" * 2000, "a: &x [*x]", "a: *y", "!!python/object/apply:os.system ['true']",
    "name: x\nname: y\npasses: [awq]",
    "name: x\npasses: [1, 2]", "name: x\npasses: {a: b}", "name: x\npasses: [{a: b, c: d}]",
    "name: x\npasses: [nothing]",
    "name: x\npasses: [lower-int8]", "name: x\npasses: [quantize-weights, quantize-weights]",
    "\ufeffname: x\npasses: [hqq]",
    "name: x\npasses: [gptq]\ngates: {kl: nan}", "name: x\npasses: [nf4]\ngates: {nothing: 1}", "%YAML 9.9\n---\na: b",
    "name: [x]\npasses: [fp8]", "name: x\npasses: [fp8]\ncalibration: {held_out: -1}", "a: !!binary ====",
    "a: 1e999999999",
    "name: x\npasses: [quantize-weights]\ncalibration: {samples: 99999999999999999999}", "a: !!timestamp x", "0x: 0o9",
    "name: x\npasses: [quantize-weights]\ncalibration: {sequence_length: 0}", "- - - - -", "a: 0b2\n? ? ?", "a:\n\t- b",
    "name: x\npasses: [quantize-weights: 3]", "name: x\npasses: ['py:os:system']", "name: x\npasses: ['py:a']",
    "\x1b[31m: x",
    "name: x\npasses: [quantize-weights: {layers: []}]", "name: x\npasses: [quantize-weights: {exclude: [re:(]}]",
    "name: x\npasses: [quantize-weights]\ntarget: nothing", "name: x\npasses: [quantize-weights]\ntarget: [ort-cpu]",
    "~: ~",
    "<<: {name: x}\npasses: [nf4]", "<<: [1]\npasses: [nf4]", "name: 2020-01-01\npasses: [nf4]",
    "name: !!set {a}\npasses: [nf4]",
    "name: x\npasses: [nf4]\ndescription: 3", "true: 1", "1: 2\n1: 3", "[a]: b", "{a: b}: c",
    "name: x\npasses: &p [*p]",
)  # fmt: skip
DATA_FREE = (
    "int8-weights",
    "w8",
    "rtn-w4",
    "hqq-w4",
    "nf4",
    "binary",
    "int8-dynamic",
    "int8-dynamic-tensor",
    "fp8",
    "kv-int8",
)
EIGHT_BITS = ("int8-weights", "w8")  # of weights alone
SLOW = ("awq-gptq-w4", "gptq-w2", "gptq-w3", "gptq-w4", "gptq-w4-act-order", "gptq-w4-kv8", "awq-w4", "w4a8")
TARGETS = ("ort-cpu", "ort-cuda", "portable", "tensorrt", "nothing", "")


def built_in(rng: Rng) -> str:
    """A recipe by name; those that take long less often."""
    names = [name for name in recipe_names() if name not in SLOW]
    if rng.random() < 0.06:
        return SLOW[int(rng.integers(len(SLOW)))]
    if rng.random() < 0.3:
        return EIGHT_BITS[int(rng.integers(2))]
    return names[int(rng.integers(len(names)))]


def _value(rng: Rng) -> object:
    return VALUES[int(rng.integers(len(VALUES)))]


def settings(rng: Rng) -> list[str]:
    """Some --set and --exclude, --dtype, --target, --samples, --memory-limit, --seq-len."""
    found: list[str] = []
    names = list(PASSES)
    for _ in range(int(rng.integers(1, 3))):
        name = names[int(rng.integers(len(names)))]
        options = [option.name for option in options_of(pass_class(name))] or ["x"]
        option = options[int(rng.integers(len(options)))]
        value = yaml.safe_dump(_value(rng), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
        choices: Sequence[str] = (
            f"{name}.{option}={value}", f"{name}.{option}={value}", f"{name}.{option}={value}", f"{name}.{option}",
            f"{option}={value}", f"{name}.nothing={value}", f"={value}", "", f"{name}.{option}=[[[", "a.b=2020-99-99",
            f"{name}.{option}=" + "[" * 2000, f"{name}.{option}={{[a]: b}}",
            f"{name}.{option}=" + "9" * 5000, f"{name}[0].x=1",
        )  # fmt: skip
        found += ["--set", choices[int(rng.integers(len(choices)))]]
    extra: tuple[list[str], ...] = (
        [], [], ["--exclude", "*"], ["--exclude", "re:("], ["--exclude", "re:" + "(a*)*" * 20 + "$"], ["--exclude", ""],
        ["--dtype", "fp16"], ["--dtype", "bf16"], ["--dtype", "fp8"], ["--target", TARGETS[int(rng.integers(6))]],
        ["--samples", str(rng.choice([0, 1, 2, -1]))], ["--samples", "9" * 30], ["--memory-limit", "9" * 40 + "G"],
        ["--memory-limit", "0"], ["--memory-limit", "1k"], ["--memory-limit", "1e400"], ["--memory-limit", "nan"],
        ["--seq-len", "9" * 20], ["--seq-len", "1"], ["--device", "cuda"], ["--strict"], ["--resume"], ["--nothing"],
    )  # fmt: skip
    return found + list(extra[int(rng.integers(len(extra)))])


def file(path: Path, rng: Rng) -> None:
    """A recipe as YAML: a sentence that is wrong, steps with options drawn at random, or broken bytes."""
    if rng.random() < 0.5:
        path.write_bytes(TEXTS[int(rng.integers(len(TEXTS)))].encode())
        return
    names = list(PASSES)
    steps: list[object] = []
    for _ in range(int(rng.integers(1, 4))):
        name = names[int(rng.integers(len(names)))]
        options = [option.name for option in options_of(pass_class(name))]
        drawn = {str(rng.choice(options)): _value(rng) for _ in range(int(rng.integers(0, 3))) if options}
        steps.append({name: drawn} if drawn else name)
    content = {"name": "drawn", "passes": steps}
    if rng.random() < 0.3:
        places = ("gates", "calibration", "target", "description", "dtype", "name", "more", "exclude")
        content[str(rng.choice(places))] = _value(rng)  # type: ignore[assignment]
    text = yaml.safe_dump(content, allow_unicode=True).encode()
    if rng.random() < 0.2:
        changed = bytearray(text)
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        text = bytes(changed)
    path.write_bytes(text)
