"""Hostile models, recipes and data through the command line, and what comes of each: `make fuzz`.

    make fuzz                              5,000 cases, a table of outcomes, and how to see each bad one again
    make fuzz COUNT=300 SEED=1             others
    python tests/fuzz/run.py --case 17     one case: its files stay, its words are shown

Everything is imported once; each case runs in a process that is forked from there, with `SECONDS` and `BYTES` to use.
A case is all in (seed, number), but for the signals it sends itself. Exit code 1 where one is bad.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.fuzz import judge  # noqa: E402
from tests.fuzz.cases import Case, make  # noqa: E402

KERNELS = ROOT / "qcompiler" / "targets"
SECONDS, BYTES = 20.0, 2 << 30
WARM = """
import json, os, sys
sys.path.insert(0, {root!r})
from tests.fuzz.run import command
from tests.fuzz.cases import make
from pathlib import Path
import numpy as np
from tests.fuzz import graphs
from tests.fuzz.cases import _save
Path("in").mkdir()
_save(graphs.build(np.random.default_rng(0), most=3, odd=False), Path("."))
for recipe in ("smoothquant", "int8-static", "rtn-w4"):
    command(["compile", "in", "-r", recipe, "-o", "out", "--overwrite", "--calibration", "random", "--samples", "4"])
for words in (["inspect", "in"], ["diff", "in", "out"], ["targets", "--best", "in"]):
    command(words)
json.dump([name for name in sys.modules if name.partition(".")[0] != "__main__"], open({names!r}, "w"))
"""


def command(arguments: list[str]) -> int:
    """The command line, in this process; returns its exit code."""
    from qcompiler.cli.app import main

    sys.argv = ["qcompiler", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def warm() -> None:
    """Import what a compilation imports, found out by one: an own process, as sessions do not survive a fork."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.json"
        script = WARM.format(root=str(ROOT), names=str(names))
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, env=os.environ)
        for name in json.loads(names.read_text()):
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # made by something that was imported, and no module by itself
    _keep_what_is_read_once()
    gc.freeze()  # so that no child copies it to look for garbage


def _keep_what_is_read_once() -> None:
    """What every process of the command line does before it reads its arguments, and gives the same each time."""
    import typer

    from passes import PASSES
    from qcompiler.cli import app
    from qcompiler.graph.definitions import definition
    from qcompiler.recipes.registry import options_of, pass_class
    from qcompiler.report.html import environment
    from qcompiler.targets import Target, target_names
    from qcompiler.targets.kernels import read

    click = typer.main.get_command(app.app)
    app.app = lambda **named: click(**named)  # type: ignore[assignment]
    for name in target_names():
        Target.load(name)
    for path in KERNELS.glob("kernels-*.json"):
        read(path)
    for name in environment().list_templates():
        environment().get_template(name)
    definition("FusedMatMul", "com.microsoft", 1)
    for name in PASSES:
        options_of(pass_class(name))


# ------------------------------------------------------------------------------------------------ one process


def fork(work: Callable[[], int], log: Path) -> int:
    """Run in a process of its own, with its own group and limits; its words go to files. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = Path("/proc/self/status").read_text()
        data = int(status.partition("VmData:")[2].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (data + BYTES, data + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Task:
    """A case that runs."""

    number: int
    folder: Path
    child: int = 0
    begun: float = 0.0
    stopped: str = ""
    judging: bool = False
    seconds: float = 0.0
    case: Case | None = None
    before: dict[str, tuple[int, int]] = field(default_factory=dict)
    code: int = 0
    peak: int = 0

    @property
    def work(self) -> Path:
        return self.folder / "work"


@dataclass(frozen=True)
class Outcome:
    number: int
    kind: str
    word: str
    detail: str
    arguments: list[str]
    seconds: float
    peak: int

    @property
    def bad(self) -> bool:
        return self.word in judge.BAD


def start(seed: int, number: int, folder: Path) -> Task:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("work", "tmp", "log"):
        (folder / name).mkdir(parents=True)
    task = Task(number, folder)
    task.case = make(seed, number, task.work)
    task.before = _listing(folder)
    arguments = task.case.arguments

    def work() -> int:
        os.chdir(task.work)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        return command(arguments)

    task.begun = time.monotonic()
    task.child = fork(work, folder / "log")
    return task


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = judge.listing(folder)
    return {
        name: entry
        for name, entry in found.items()
        if name not in ("log", "tmp", "work") and not name.startswith("log/")
    }


def _watch(task: Task) -> None:
    try:
        resident = int(Path(f"/proc/{task.child}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return
    task.stopped = "MEMORY" if resident > BYTES else "HANG" if time.monotonic() - task.begun > SECONDS else ""
    if task.stopped:
        os.killpg(task.child, signal.SIGKILL)


def ended(task: Task, status: int, used: resource.struct_rusage) -> Outcome | None:
    """What is said of a case whose process has ended; None where it goes on to be judged."""
    assert task.case is not None
    code = os.waitstatus_to_exitcode(status)
    if not task.judging:
        task.seconds, task.code, task.peak = time.monotonic() - task.begun, code, used.ru_maxrss << 10
        out, err = ((task.folder / "log" / name).read_text(errors="replace") for name in ("out", "err"))
        word = judge.said(task.case, judge.Ended(code, out, err, task.seconds, task.peak, task.stopped))
        if word in judge.BAD:
            return _outcome(task, word, _last(err))
        litter = judge.left(task.before, _listing(task.folder), refused=word != "")
        if litter:
            return _outcome(task, litter, str(sorted(set(_listing(task.folder)) - set(task.before)))[:300])
        if word:
            return _outcome(task, word, _last(err))
        task.judging, task.begun = True, time.monotonic()
        case = task.case
        (task.folder / "judge").mkdir()
        task.child = fork(lambda: _judged(case, task), task.folder / "judge")
        return None
    if code != 0 or task.stopped:
        crashed = _crashes_by_itself(task)
        return _outcome(
            task, "onnxruntime crashes on the input, too" if crashed else "CRASH", f"when opened: {code} {task.stopped}"
        )
    word, _, detail = (task.folder / "verdict").read_text().partition(": ")
    return _outcome(task, word if task.code == 0 or word in judge.BAD else f"{word}; exit code 1", detail)


def _judged(case: Case, task: Task) -> int:
    (task.folder / "verdict").write_text(judge.judge(case, task.work))
    return 0


def _crashes_by_itself(task: Task) -> bool:
    """Whether the model that came does to onnxruntime what the compiled one did."""
    script = "import sys; from tests.fuzz.judge import *; s = opened(sys.argv[1]); answers(s, feeds(s))"
    model = task.work / "in" / "model.onnx"
    tried = subprocess.run([sys.executable, "-c", script, str(model)], cwd=ROOT, capture_output=True, check=False)
    return tried.returncode < 0


def _outcome(task: Task, word: str, detail: str) -> Outcome:
    assert task.case is not None
    return Outcome(task.number, task.case.kind, word, detail, task.case.arguments, round(task.seconds, 2), task.peak)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "defect of qcompiler" not in line]
    errors = [line for line in lines if line.startswith("error: ")]
    return ascii((errors or lines or [""])[-1])[1:-1][:400]


# ------------------------------------------------------------------------------------------------ all


def run(seed: int, numbers: list[int], jobs: int, folder: Path) -> Iterator[Outcome]:
    """The cases, `jobs` at a time; the files of the bad ones stay in `folder`."""
    waiting, running = list(reversed(numbers)), dict[int, Task]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop()
            task = start(seed, number, folder / str(number))
            running[task.child] = task
        done = [(child, *os.wait4(child, os.WNOHANG)[1:]) for child in running]
        done = [(child, status, used) for child, status, used in done if used.ru_maxrss]
        if not done:
            for task in running.values():
                _watch(task)
            time.sleep(0.005)
        for child, status, used in done:
            task = running.pop(child)
            outcome = ended(task, status, used)
            if outcome is None:
                running[task.child] = task
                continue
            if not outcome.bad:
                shutil.rmtree(task.folder, ignore_errors=True)
            yield outcome


def table(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.word for outcome in outcomes)
    rows = [f"{count:6}  {'BAD  ' if word in judge.BAD else ''}{word}" for word, count in counts.most_common()]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the bad cases, default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file, one a line")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="qcompiler-fuzz-"))).absolute()
    if options.case is not None:
        return again(options.seed, options.case, folder)
    begun = time.monotonic()
    warm()
    numbers = list(range(options.first, options.first + options.count))
    outcomes = []
    for outcome in run(options.seed, numbers, options.jobs, folder):
        outcomes.append(outcome)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    bad = [outcome for outcome in outcomes if outcome.bad]
    for outcome in sorted(bad, key=lambda outcome: (outcome.word, outcome.detail)):
        again_by = f"python tests/fuzz/run.py --seed {options.seed} --case {outcome.number}"
        print(f"{outcome.word}: {outcome.detail}\n    {outcome.kind}; see it again:  {again_by}")
    slowest, largest = max(outcome.seconds for outcome in outcomes), max(outcome.peak for outcome in outcomes)
    print(table(outcomes))
    print(f"{len(outcomes)} cases in {time.monotonic() - begun:.0f} s; the slowest took {slowest} s, the largest "
          f"{largest >> 20} MiB; {len(bad)} bad")  # fmt: skip
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if bad else 0


def again(seed: int, number: int, folder: Path) -> int:
    """One case, with all that it says; its files stay."""
    warm()
    place = folder / str(number)
    shutil.rmtree(place, ignore_errors=True)
    task = start(seed, number, place)
    assert task.case is not None
    print(f"{task.case.kind}\ncd {task.work}\nqcompiler {' '.join(map(repr, task.case.arguments))}")
    outcome: Outcome | None = None
    while outcome is None:
        child, status, used = os.wait4(task.child, os.WNOHANG)
        if child:
            outcome = ended(task, status, used)
        else:
            _watch(task)
            time.sleep(0.01)
    for name in ("out", "err"):
        print((place / "log" / name).read_text(errors="replace"), end="", flush=True)
    print(f"{outcome.word}: {outcome.detail}")
    return 1 if outcome.bad else 0


if __name__ == "__main__":
    sys.exit(main())
