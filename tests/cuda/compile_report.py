"""What ptxas reports of every kernel on every architecture: registers, stack, spills, shared memory.

    python tests/cuda/compile_report.py [--update]

prints the report, or writes it to compile_report.txt beside this file, which test_compile_report.py and
.ci/cuda_compile_check hold the sources to: a kernel that needs more registers, or spills, shows in a diff.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".txt")
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
SOURCE_FOLDERS = ("csrc/cuda", ".ci")
JOBS = 2  # nvcc takes more than 1 GB for a large file


class CompileError(Exception):
    """nvcc refused a source, or warned."""


@dataclass(frozen=True)
class Usage:
    """What one function needs on one architecture; sizes in bytes a thread, `shared` in bytes a block.

    `registers` is None for a function that is not a kernel: its callers' count includes it.
    """

    source: str
    function: str
    architecture: str
    registers: int | None
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def sources() -> list[Path]:
    """Every CUDA source, relative to the root of the repository."""
    return sorted(p.relative_to(ROOT) for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*.cu"))


def demangle(symbols: list[str]) -> list[str]:
    """Readable names, without result, parameters and our namespaces."""
    names = subprocess.run(
        ["c++filt", *symbols], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [short_name(name) for name in names]


def short_name(name: str) -> str:
    """`void tokenstep::cuda::f<(tokenstep::Mode)1, float>(Params) [clone x]` as `f<(Mode)1, float>`."""
    depth = 0
    for end, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0 and not name.startswith("(anonymous namespace)", end):
            name = name[:end]
            break
    return re.sub(r"tokenstep::|cuda::|\(anonymous namespace\)::|^void |\bstatic_cast", "", name)


def parse(report: str, source: str, architecture: str) -> list[Usage]:
    """The functions in what `nvcc -Xptxas -v` printed for one source and one architecture."""
    pattern = re.compile(
        r"Function properties for (?P<symbol>\S+)\s+"
        r"(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r"(?:\s+ptxas info\s+: Used (?P<registers>\d+) registers(?P<used>[^\n]*))?"
    )
    found = list(pattern.finditer(report))
    names = demangle([match["symbol"] for match in found]) if found else []
    usages = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["used"] or "")
        usages.append(
            Usage(
                source,
                name,
                architecture,
                int(match["registers"]) if match["registers"] else None,
                int(match["stack"]),
                int(match["stores"]),
                int(match["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return usages


def compile_source(source: Path, architecture: str) -> list[Usage]:
    """Compiles one source for one architecture; warnings are errors."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-Icsrc", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
        command += [f"-arch=sm_{architecture}", "-o", f"{folder}/out.cubin", str(source)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{source} for sm_{architecture}:\n{result.stdout}{result.stderr}")
    return parse(result.stdout + result.stderr, str(source), architecture)


def nvcc_version() -> str | None:
    """`13.0`, or None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def compile_all() -> list[Usage]:
    """Compiles every source for every architecture."""
    tasks = [(source, architecture) for source in sources() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda task: compile_source(*task), tasks)
        return [usage for result in results for usage in result]


def table(usages: list[Usage], version: str) -> str:
    """The report as text: a section a function, a line for architectures that need the same."""
    lines = [f"nvcc {version}", "bytes: stack and spills of a thread, static shared memory of a block"]
    by_function: dict[tuple[str, str], dict[str, list[str]]] = {}
    for u in usages:
        registers = "" if u.registers is None else f"{u.registers:4d} registers"
        need = (
            f"{registers:14s}{u.stack:6d} stack{u.spill_stores:6d} spill stores{u.spill_loads:6d} spill loads"
        )
        need += f"{u.shared:7d} shared"
        by_function.setdefault((u.source, u.function), {}).setdefault(need, []).append(f"sm_{u.architecture}")
    for (source, function), needs in sorted(by_function.items()):
        lines += ["", f"{source}: {function}"]
        lines += [f"  {need}   {' '.join(architectures)}" for need, architectures in needs.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints or updates the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    update = parser.parse_args().update
    version = nvcc_version()
    if version is None:
        sys.exit("no nvcc on the PATH")
    text = table(compile_all(), version)
    if update:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
