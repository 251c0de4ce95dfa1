"""The command line: thin, over the Python API. Heavy imports stay inside the commands, so that ``--help`` is quick.

Exit codes: 0 all is well · 1 a gate or --strict failed · 2 bad input or usage · 70 a defect · 130 or 143 stopped.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from qcompiler.cli.bench import bench
from qcompiler.cli.calibrate import calibrate
from qcompiler.cli.compile import compile_
from qcompiler.cli.debug import debug
from qcompiler.cli.diff import diff
from qcompiler.cli.evaluate import eval_
from qcompiler.cli.generate import generate
from qcompiler.cli.inspect import inspect
from qcompiler.cli.passes import explain, passes
from qcompiler.cli.placement import placement
from qcompiler.cli.recipes import recipes
from qcompiler.cli.targets import targets
from qcompiler.errors import PassError, QCompilerError, StoppedError, printable
from qcompiler.graph.runtime_library import silence

DEFECT = 70  # EX_SOFTWARE of sysexits.h; 1 would look like a gate that failed
LONGEST = 1000  # letters of a message
LIBRARIES = ("onnx_ir", "onnxscript", "onnx")
SHOWN = 1000  # letters of each end of a message
ISSUES = "please report it, with the command, the versions (qcompiler --version) and the text above"

app = typer.Typer(
    name="qcompiler",
    help="Compile ONNX models to quantized ONNX that ONNX Runtime runs with integer kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False) -> None:
    if version:
        from importlib.metadata import distributions

        wanted = ("onnx-qcompiler", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")
        found = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in distributions()}
        typer.echo("\n".join(f"{name} {found[name]}" for name in wanted if name in found))
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "compile": compile_, "calibrate": calibrate, "eval": eval_, "generate": generate, "placement": placement,
    "bench": bench, "inspect": inspect, "debug": debug, "diff": diff, "passes": passes, "explain": explain,
    "recipes": recipes, "targets": targets,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Signals become StoppedError meanwhile; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """The console script."""
    for library in LIBRARIES:  # what they have to say of a model is said in our own sentence
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    silence()
    warnings.showwarning = lambda message, *_: print(f"warning: {printable(str(message))}", file=sys.stderr)
    try:
        with _stopping():
            app(prog_name="qcompiler")
    except PassError as error:
        _fail(str(error), ISSUES)
    except QCompilerError as error:
        _fail(str(error))
    except StoppedError as stop:
        print("stopped; nothing was written but what --resume can go on with", file=sys.stderr)
        sys.exit(128 + stop.number)
    except Exception:
        traceback.print_exc()
        print(f"\nThis is a defect of qcompiler; {ISSUES}.", file=sys.stderr)
        sys.exit(DEFECT)


def _shortened(message: str) -> str:
    """Without the middle where it is longer than a screen, as it is where a name or value of the input is."""
    if len(message) <= LONGEST:
        return message
    return f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"


def _fail(message: str, remark: str = "") -> None:
    if len(message) > 2 * SHOWN:  # a name of a stranger's may have any length
        message = f"{message[:SHOWN]} … {message[-SHOWN:]}"
    print(f"error: {_shortened(printable(message))}", *([remark] if remark else []), sep="\n", file=sys.stderr)
    sys.exit(2)
