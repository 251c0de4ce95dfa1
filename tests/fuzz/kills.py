"""What a compilation leaves behind when it is stopped, starved or raced: `python tests/fuzz/kills.py`.

    kills         kill -9 and SIGTERM at random moments of a gptq run: the output is absent or whole; the run after it,
                  with --resume, gives the same bytes as one that was left alone, and nothing else is left
    disk          no room at all, and room that ends within the run (RLIMIT_FSIZE): one sentence, nothing written
    permissions   folders and files that may not be read or written
    races         two compilations to one output at once
    determinism   the same bytes twice, with another PYTHONHASHSEED, and in another folder

Exit code 1 where one is not so.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("-r", "gptq-w4", "--calibration", "data.npz")
WORDS = ("error: ", "warning: ", "stopped; ")
TIMED = frozenset({"report.json", "report.html"})
"""Files that say how long it took."""


def prepare(folder: Path, layers: int = 6, width: int = 64) -> None:
    """A model of a few layers, and data."""
    rng = np.random.default_rng(0)
    nodes, constants, value = [], [], "x"
    for index in range(layers):
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"h{index}"], name=f"/layers.{index}/fc/MatMul"))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"], name=f"/layers.{index}/act/Relu"))
        weight = rng.normal(size=(width, width)).astype(np.float32) / np.float32(np.sqrt(width / 2))
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        value = f"r{index}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    (folder / "in").mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "in/model.onnx"
    )
    np.savez(folder / "data.npz", x=rng.normal(size=(12, 8, width)).astype(np.float32))


def start(
    folder: Path, *more: str, hash_seed: str = "0", limit: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hash_seed, "TMPDIR": str(folder / "tmp"),
    }  # fmt: skip
    (folder / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "qcompiler", "compile", "in", "-o", "out", *more]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def content(folder: Path) -> dict[str, str]:
    """Hashes of the files whose bytes are told by the input alone."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def others(folder: Path) -> list[str]:
    """What lies beside input and output."""
    kept = {"in", "out", "data.npz", "tmp", ".ses"}  # the last is onnxruntime's own, by its import
    return sorted(path.name for path in (*folder.iterdir(), *(folder / "tmp").iterdir()) if path.name not in kept)


def one_sentence(code: int, said: str) -> str:
    """What is wrong with how a run ended that could not do its work; empty where nothing is."""
    lines = [line for line in said.splitlines() if line.strip()]
    fine = (
        code == 2
        and sum(line.startswith("error: ") for line in lines) == 1
        and all(line.startswith(WORDS) for line in lines)
    )
    return "" if fine else f"exit code {code}: {said[-300:]}"


# ------------------------------------------------------------------------------------------------ what is tried


def kills(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Each of `count` runs is stopped once, then gone on with."""
    prepare(folder)
    whole = float("inf")
    for more in ((), ("--overwrite",), ("--overwrite",)):
        begun = time.monotonic()
        code, said = finish(start(folder, *RECIPE, *more))
        whole = min(whole, time.monotonic() - begun)
        if code:
            yield f"the run that was left alone ended with {code}: {said}"
            return
    wanted = content(folder / "out")
    draw, ends, resumed = random.Random(seed), dict[str, int](), 0
    for number in range(count):
        shutil.rmtree(folder / "out")
        process = start(folder, *RECIPE)
        # most of the time goes into imports: moments are drawn from what comes behind them
        time.sleep(draw.uniform(0.4, 1.0) * whole)
        how = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        process.send_signal(how)
        code, said = finish(process)
        there = (folder / "out").exists()
        stages = len(list(folder.glob(".out.unfinished/*.safetensors")))
        state = f"{how.name}: {'whole' if there else 'absent'}, {stages} stages"
        ends[state] = ends.get(state, 0) + 1
        if there and content(folder / "out") != wanted:
            yield f"{state}: the output is there, but not whole"
        if how == signal.SIGTERM and code not in (0, 143, -how):  # the last while Python itself begins
            yield f"SIGTERM: {code}: {said[-300:]}"
        if there:
            continue
        resumed += (folder / ".out.unfinished").exists()
        code, said = finish(start(folder, *RECIPE, "--resume"))
        if code or content(folder / "out") != wanted:
            yield f"{state}: gone on with, it ended with {code}, or its bytes differ: {said[-300:]}"
        if others(folder):
            yield f"{state}: left behind: {others(folder)}"
    print(f"kills: {count} runs of {whole:.1f} s; {resumed} had stages to go on with")
    for state, times in sorted(ends.items()):
        print(f"    {times:3} {state}")


def disk(folder: Path, count: int, seed: int) -> Iterator[str]:
    prepare(folder, width=256)
    draw = random.Random(seed)
    for number in range(count):
        size = (0, 1 << 10, 50_000)[number] if number < 3 else draw.randrange(1 << 10, 600_000)

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        code, said = finish(start(folder, "-r", "w8", limit=limit))
        if code == 0:
            shutil.rmtree(folder / "out")
        elif wrong := one_sentence(code, said):
            yield f"files of at most {size} bytes: {wrong}"
        if (folder / "out").exists() or others(folder):
            yield f"files of at most {size} bytes: left behind: {[*folder.glob('out/*')]} {others(folder)}"
    print(f"disk: {count} limits on the size of a file")


def permissions(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Without what lets root pass everywhere."""
    prepare(folder)
    cases: Sequence[tuple[str, Path, int]] = (
        ("the folder of the output may not be written", folder, 0o555),
        ("the model may not be read", folder / "in/model.onnx", 0),
        ("the folder of the model may not be entered", folder / "in", 0),
        ("the data may not be read", folder / "data.npz", 0),
    )
    (folder / "tmp").mkdir()
    for what, path, mode in cases:
        before = path.stat().st_mode
        path.chmod(mode)
        code, said = finish(start(folder, "-r", "int8-static", "--calibration", "data.npz", limit=_as_anybody))
        path.chmod(before)
        if wrong := one_sentence(code, said):
            yield f"{what}: {wrong}"
        if (folder / "out").exists() or others(folder):
            yield f"{what}: left behind: {others(folder)}"
    print(f"permissions: {len(cases)} cases")


def _as_anybody() -> None:
    """Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; who has none is not asked."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def races(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Two runs to one output: one of them writes it whole, the other says that it is there, or both agree."""
    prepare(folder)
    code, said = finish(start(folder, "-r", "w8"))
    wanted = content(folder / "out")
    for number in range(count):
        more = ("--overwrite",) if number % 2 else ()
        if not more:
            shutil.rmtree(folder / "out")
        both = [start(folder, "-r", "w8", *more) for _ in range(2)]
        ended = [finish(process) for process in both]
        if all(code for code, _ in ended):
            yield f"neither of two runs wrote the output: {ended}"
        for code, said in ended:
            if code and (wrong := one_sentence(code, said)):
                yield f"of two runs one ended badly: {wrong}"
        if content(folder / "out") != wanted:
            yield "two runs to one output: it is not whole"
        if others(folder):
            yield f"two runs to one output: left behind: {others(folder)}"
    print(f"races: {count} pairs")


def determinism(folder: Path, count: int, seed: int) -> Iterator[str]:
    data = ("--calibration", "data.npz")
    recipes: Sequence[Sequence[str]] = (
        RECIPE, ("-r", "int8-static", *data), ("-r", "smoothquant", *data), ("-r", "w8"), ("-r", "hqq-w4"),
        ("-r", "nf4"),
    )  # fmt: skip
    for recipe in recipes:
        seen = set()
        for number, hash_seed in enumerate(("0", "0", "1", "12345")):
            place = folder / f"{recipe[1]}{number}"
            prepare(place)
            code, said = finish(start(place, *recipe, hash_seed=hash_seed))
            if code:
                yield f"{recipe[1]}: {code}: {said[-300:]}"
            seen.add(str(content(place / "out")))
        if len(seen) > 1:
            yield f"{recipe[1]}: {len(seen)} different outputs of one input"
    print("determinism: 6 recipes, four runs each")


TRIALS: dict[str, tuple[Callable[[Path, int, int], Iterator[str]], int]] = {
    "kills": (kills, 30), "disk": (disk, 12), "permissions": (permissions, 4), "races": (races, 6),
    "determinism": (determinism, 1),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(TRIALS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="of kills, limits or pairs")
    options = parser.parse_args()
    failures = 0
    for name in options.what or TRIALS:
        trial, count = TRIALS[name]
        with tempfile.TemporaryDirectory(prefix="qcompiler-kills-", ignore_cleanup_errors=True) as folder:
            place = Path(folder)
            place.chmod(0o755)
            for failure in trial(place / "here", options.count or count, options.seed):
                failures += 1
                print(f"FAILED {name}: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
