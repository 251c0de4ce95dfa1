"""Makes a folder with which onnxruntime-gpu starts its CUDA provider on a machine without a GPU:  build.py DEST

DEST/site   onnxruntime-gpu, to be put before the other packages (PYTHONPATH)
DEST/lib    stand-ins for the CUDA libraries (LD_LIBRARY_PATH): `stub.c`, and for every other function that the
            providers name one that does nothing and succeeds

Sessions then partition and optimize their graphs as on a GPU, so that placement, fusion and errors on loading are the
real ones. Nothing is computed: results and times mean nothing. Needs gcc and nm, on Linux.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

RUNTIME = "onnxruntime-gpu==1.31.1"  # whose kernel table qcompiler/targets has
SOURCE = Path(__file__).with_name("stub.c")
# libnvinfer and the like must be there, too, as asking for the registry of kernels opens every provider.
CUDA = re.compile(r"lib(cud|cublas|curand|nvinfer|nvonnxparser)")
DEFINED = re.compile(r"\b(?:HANDLE\()?(\w+)\)?[(\n]")


def build(folder: Path) -> None:
    """Install the runtime and make the libraries; what is there already is kept."""
    site, lib = folder / "site", folder / "lib"
    if not (site / "onnxruntime").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), RUNTIME]
        subprocess.run(pip, check=True)
    lib.mkdir(parents=True, exist_ok=True)
    for name, functions in wanted(sorted(site.glob("onnxruntime/capi/libonnxruntime_providers_*.so"))).items():
        compile_library(lib / name, functions)


def wanted(providers: list[Path]) -> dict[str, set[str]]:
    """By CUDA library, the functions that the providers take from it."""
    found: dict[str, set[str]] = defaultdict(set)
    for provider in providers:
        needed = re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "--dynamic", provider))
        libraries = [name for name in needed if CUDA.match(name)]
        for name in libraries:
            found.setdefault(name, set())
        for symbol in re.findall(r"\bU (\S+)", output("nm", "--dynamic", "--undefined-only", provider)):
            name, _, library = symbol.partition("@")
            if library in libraries:
                found[library].add(name)
            elif not library and libraries and re.match("(cu|create|get|init)", name):
                found[libraries[-1]].add(name)  # from a library without versions; the linker looks into all
    return found


def compile_library(file: Path, functions: set[str]) -> None:
    """A shared library that defines the functions: as `stub.c` does, or as doing nothing."""
    source = SOURCE.read_text(encoding="utf-8")
    known = set(DEFINED.findall(source))
    blanks = "".join(f"\nlong {name}(void) {{ return 0; }}" for name in sorted(functions - known))
    versions = file.with_name(file.name + ".map")
    exported = " ".join(f"{name};" for name in sorted(functions)) or "stub_of_nothing;"
    versions.write_text(f"{file.name} {{ global: {exported} local: *; }};\n", encoding="utf-8")
    options = ["-shared", "-fPIC", "-O1", "-w", "-fno-builtin", f"-Wl,-soname,{file.name}", "-xc", "-"]
    command = ["gcc", "-o", str(file), f"-Wl,--version-script={versions}", *options]
    subprocess.run(command, input=source + blanks, text=True, check=True)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if len(sys.argv) != 2 or os.name != "posix":
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
