"""The command line: thin, over the Python API. Heavy imports stay inside the commands, so that ``--help`` is quick.

Exit codes: 0 all is well · 1 a gate or --strict failed · 2 bad input or usage · 70 a defect · 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.common import (
    Calibration,
    Device,
    Excluded,
    FloatType,
    Json,
    MemoryLimit,
    Model,
    Overwrite,
    RecipeName,
    RunsOn,
    SampleCount,
    SequenceLength,
    Settings,
    TargetName,
    Tokenizer,
    console,
    print_json,
    print_table,
)
from qcompiler.cli.debug import debug
from qcompiler.cli.diff import diff
from qcompiler.cli.generate import generate
from qcompiler.cli.inspect import inspect
from qcompiler.cli.placement import placement
from qcompiler.cli.targets import targets
from qcompiler.errors import OutputError, PassError, QCompilerError, RecipeError, TargetError

if TYPE_CHECKING:
    pass

DEFECT = 70  # EX_SOFTWARE of sysexits.h; 1 would look like a gate that failed
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


@app.command("compile")
def compile_(
    model: Model,
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; made whole or not at all.")],
    target: TargetName = None,
    dtype: FloatType = None,
    calibration: Calibration = None,
    tokenizer: Tokenizer = None,
    samples: SampleCount = None,
    seq_len: SequenceLength = None,
    statistics: Annotated[Path | None, typer.Option(help="What `qcompiler calibrate` wrote.")] = None,
    set_: Settings = None,
    exclude: Excluded = None,
    strict: Annotated[bool, typer.Option("--strict", help="Skips and misplaced nodes make the exit code 1.")] = False,
    memory_limit: MemoryLimit = None,
    device: RunsOn = Device.cpu,
    dump_dir: Annotated[Path | None, typer.Option(help="Write the graph as text after each pass.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    json_: Json = False,
) -> None:
    """Compile a model: run a recipe's passes, check the result, and write it with a report."""
    settings = [*device_settings(device, recipe), *(set_ or ())]
    check_output(output, model)
    from qcompiler.compiler import compile
    from qcompiler.graph.files import check_free

    check_free(output, overwrite)

    compiled = compile(
        model,
        recipe,
        calibration=calibration,
        target=target,
        dtype=dtype.value if dtype is not None else None,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=seq_len,
        statistics=statistics,
        options=settings,
        exclude=exclude or (),
        strict=strict,
        work_dir=output.parent / f".{output.name}.unfinished",
        resume=resume,
        memory_limit=memory_limit,
        dump_dir=dump_dir,
        progress=True,
    )
    compiled.save(output, overwrite=overwrite)
    if json_:
        typer.echo(compiled.report.to_json())
    else:
        from qcompiler.report import render

        render(compiled.report, console())
        console().print(f"\nwritten to {output}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(compiled.report.exit_code)


@app.command()
def calibrate(
    model: Model,
    recipe: RecipeName,
    calibration: Annotated[str, typer.Option("--calibration", metavar="SPEC", help="As for `compile`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: stats.safetensors.")],
    target: TargetName = None,
    tokenizer: Tokenizer = None,
    samples: SampleCount = None,
    seq_len: SequenceLength = None,
    set_: Settings = None,
    exclude: Excluded = None,
    memory_limit: MemoryLimit = None,
    device: RunsOn = Device.cpu,
    overwrite: Overwrite = False,
) -> None:
    """Measure what a recipe needs, once; `compile --statistics` then needs no data."""
    settings = [*device_settings(device, recipe), *(set_ or ())]
    check_output(output, model)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already; choose another name, or give --overwrite")
    from qcompiler.compiler import calibrate

    calibrate(
        model,
        recipe,
        calibration=calibration,
        output=output,
        target=target,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=seq_len,
        options=settings,
        exclude=exclude or (),
        memory_limit=memory_limit,
        progress=True,
    )
    console().print(f"written to {output}", markup=False, highlight=False, soft_wrap=True)


@app.command("eval")
def eval_(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", metavar="SPEC", help="As --calibration of `compile`; a text is read whole.")
    ],
    reference: Annotated[Path | None, typer.Option(help="The float model to compare with, token by token.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default the one beside the model.")] = None,
    seq_len: SequenceLength = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Stop after so many samples.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Read in steps through the cache, so that its errors are in the figures.")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, help="With --decode: tokens a step.")] = 1,
    prefill: Annotated[
        int | None, typer.Option(min=1, help="With --decode: tokens of the first step; by default as many.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
    json_: Json = False,
) -> None:
    """Measure the perplexity of a language model and, with --reference, how close it is to another."""
    if not decode and (chunk > 1 or prefill is not None):
        raise typer.BadParameter("--chunk and --prefill say how --decode reads; give --decode, too")
    from qcompiler.evaluation.evaluate import Steps, evaluate
    from qcompiler.report.table import evaluation_rows

    figures = evaluate(
        model,
        data,
        reference=reference,
        tokenizer=tokenizer,
        sequence_length=seq_len,
        limit=samples,
        decode=Steps(chunk, prefill) if decode else None,
        threads=threads,
        progress=True,
    ).to_dict()
    if json_:
        print_json(figures)
    else:
        print_table(("measure", "value"), evaluation_rows(figures))


app.command("generate")(generate)
app.command("placement")(placement)
app.command("inspect")(inspect)
app.command("debug")(debug)


app.command("diff")(diff)


@app.command()
def passes() -> None:
    """List the passes that recipes can use."""
    from qcompiler.recipes.registry import pass_class, pass_names, summary

    def row(name: str) -> tuple[str, ...]:
        try:
            return name, pass_class(name).kind, summary(name)
        except RecipeError as error:  # a plugin that cannot be loaded harms only those who use it
            return name, "broken", str(error)

    print_table(("pass", "kind", "what it does"), [row(name) for name in pass_names()])


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="PASS", help="See `qcompiler passes`.", show_default=False)],
) -> None:
    """Show the manual page of a pass, and its options."""
    from qcompiler.recipes.registry import manual, options_of, pass_class

    cls = pass_class(name)
    out = console()
    out.print(f"{name} ({cls.kind})\n", style="bold", markup=False)
    out.print(manual(name) + "\n", markup=False, highlight=False)
    rows = [(option.name, option.default, option.type, option.help) for option in options_of(cls)]
    print_table(("option", "default", "type", "what it means"), rows)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A built-in recipe or a file, to print.", show_default=False)
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Print it with every option written out.")] = None,
) -> None:
    """List the built-in recipes, or print one as YAML."""
    from qcompiler.recipes import Recipe, recipe_names

    if name is None:
        print_table(("recipe", "what it does"), [(item, Recipe.load(item).description) for item in recipe_names()])
        return
    recipe = Recipe.load(name)
    typer.echo((recipe.resolved(target) if target else recipe).to_yaml(), nl=False)


app.command("targets")(targets)


def device_settings(device: Device, recipe: str) -> list[str]:
    """The settings that move linear algebra to the device. Raises TargetError where the recipe has none to move."""
    if device is Device.cpu:
        return []
    from qcompiler.recipes import Recipe
    from qcompiler.recipes.registry import options_of, pass_class

    names = dict.fromkeys(step.name for step in Recipe.load(recipe).passes)
    movable = [name for name in names if any(option.name == "device" for option in options_of(pass_class(name)))]
    if not movable:
        raise TargetError(f"--device cuda: no pass of the recipe {recipe} computes on a GPU; leave the option out")
    return [f"{name}.device={device.value}" for name in movable]


def check_output(output: Path, model: Path) -> None:
    """Raise OutputError where a folder that may be overwritten holds the input, too."""
    if model.exists() and model.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} holds the input model, which would be overwritten; choose another name")


def main() -> None:
    """The console script."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app(prog_name="qcompiler")
    except PassError as error:
        _fail(f"{error}\n{ISSUES}")
    except QCompilerError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        print(f"\nThis is a defect of qcompiler; {ISSUES}.", file=sys.stderr)
        sys.exit(DEFECT)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
