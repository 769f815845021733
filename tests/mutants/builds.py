"""What the catalogues of native defects share: mutants built, and run in processes of their own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import native
from tests.mutants import replaced

TOGETHER = 2  # compilers at once
NEEDS = [
    pytest.mark.skipif(native.COMPILER is None, reason="no C++ compiler: set CXX or install one"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]

Row = tuple[str, ...]  # file, defect, text, what stands there instead[, instruction set]
Found = dict[str, str | Exception]


def name_of(row: Row) -> str:
    return f"{row[0]}: {row[1]}"


def mutate(folder: Path, file: str, old: str, new: str) -> Path:
    """The sources with one text replaced in one file."""
    shutil.copytree(native.SOURCES, folder)
    source = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(replaced(source, f"csrc/{file}", old, new), encoding="utf-8")
    return folder


def find(
    suite: str, folder: Path, catalogue: list[Row], objects: Callable[[Path, Path, str, str], list[Path]], none: Path
) -> Found:
    """For each defect, and for the kernels as they are, the check that found it, or why there is no mutant.

    Args:
        suite: A module, run on libraries.
        folder: For what is built.
        catalogue: The defects; those of an instruction set that is not here are left out.
        objects: Compiles what a mutant is linked from: its sources, into a folder, this file of them mutated, for this
            instruction set.
        none: A library without a defect.
    """

    def build(numbered: tuple[int, Row]) -> Path | Exception:
        number, (file, _, old, new, *name) = numbered
        part = folder / str(number)
        part.mkdir()
        try:
            sources = mutate(part / "csrc", file, old, new)
            return native.link(part / "kernels.so", *objects(sources, part, file, *(name or ["portable"])))
        except (LookupError, RuntimeError) as error:
            return error

    rows = [row for row in catalogue if len(row) < 5 or row[4] in native.instruction_sets()]
    with ThreadPoolExecutor(TOGETHER) as pool:
        built = dict(zip(map(name_of, rows), pool.map(build, enumerate(rows)), strict=True)) | {"none": none}
        ready = {name: path for name, path in built.items() if isinstance(path, Path)}
        paths = list(ready.values())
        answers = "".join(pool.map(lambda share: _run(suite, share), [paths[i::TOGETHER] for i in range(TOGETHER)]))
    by_path = dict(line.split(" ", 1) for line in answers.splitlines())
    failed = {name: error for name, error in built.items() if isinstance(error, Exception)}
    return {name: by_path[str(path)] for name, path in ready.items()} | failed


def _run(suite: str, paths: list[Path]) -> str:
    command = [sys.executable, "-m", suite, *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=native.ROOT, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def finder(found_by: Found, defect: str) -> str:
    """The check that finds a defect."""
    if defect not in found_by:
        pytest.skip("this processor has not the instruction set")
    found = found_by[defect]
    if isinstance(found, Exception):
        raise found
    assert found_by["none"] == "survives", "what the kernels themselves fail proves nothing about a defect"
    assert found != "survives", f"{defect}: survives"
    return found
