"""Building csrc for tests: a compiler, its options, a library."""

import os
import shutil
import subprocess
from pathlib import Path

from inhibitor.ops import cpu

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
COMPILER = next((path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None)
AVX2 = ("-mavx2", "-mfma", "-mpopcnt", "-mbmi2")
OPTIONS = {  # as in CMakeLists.txt
    "portable": (),
    "avx2": AVX2,
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2),
}


def run(*command: str | Path) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr[-3000:]}")


def compile_object(source: Path, target: Path, *options: str) -> Path:
    """One source file to an object file."""
    if COMPILER is None:
        raise RuntimeError("no C++ compiler")
    run(COMPILER, "-std=c++20", "-fPIC", "-fvisibility=hidden", *options, "-c", source, "-o", target)
    return target


def compile_kernels(sources: Path, name: str, target: Path, *options: str) -> Path:
    """The kernels of an instruction set."""
    defined = (f'-DINHIBITOR_SIMD="simd/{name}.h"', f"-DINHIBITOR_KERNELS={name}_kernels")
    return compile_object(sources / "kernels.cpp", target, *defined, *OPTIONS[name], *options)


def compile_integers(sources: Path, names: tuple[str, ...], folder: Path, *options: str) -> list[Path]:
    """The integer kernels of some instruction sets, and their driver."""
    targets = [target for name in names for target in compile_integer_kernels(sources, name, folder, *options)]
    return [*targets, compile_integer_driver(sources, names, folder / "integer_driver.o", *options)]


def compile_integer_kernels(sources: Path, name: str, folder: Path, *options: str) -> list[Path]:
    """The integer kernels of an instruction set; to "avx512" belong those with its byte products."""
    names = (name, "avx512vnni") if name == "avx512" else (name,)
    return [compile_integer(sources, each, folder / f"integer_{each}.o", *options) for each in names]


def compile_integer_driver(sources: Path, names: tuple[str, ...], target: Path, *options: str) -> Path:
    """The integer driver for some instruction sets; "portable" is always among them."""
    defined = tuple(f"-DINHIBITOR_{name.upper()}" for name in names)
    return compile_object(sources / "integer_driver.cpp", target, *defined, *options)


def compile_integer(sources: Path, name: str, target: Path, *options: str) -> Path:
    """The integer kernels of one instruction set; "avx512vnni" is one of them."""
    base = name.removesuffix("vnni")
    defined = (
        f'-DINHIBITOR_SIMD="simd/{base}.h"',
        f'-DINHIBITOR_BYTES="simd/integer_{base}.h"',
        f"-DINHIBITOR_KERNELS={name}_integer_kernels",
    )
    vnni = ("-mavx512vnni", "-DINHIBITOR_VNNI") if name != base else ()
    return compile_object(sources / "integer_kernels.cpp", target, *defined, *OPTIONS[base], *vnni, *options)


def compile_driver(sources: Path, names: tuple[str, ...], target: Path, *options: str) -> Path:
    """The driver for some instruction sets; "portable" is always among them."""
    return compile_object(sources / "driver.cpp", target, *(f"-DINHIBITOR_{name.upper()}" for name in names), *options)


def link(target: Path, *objects_and_options: str | Path) -> Path:
    """A shared library."""
    if COMPILER is None:
        raise RuntimeError("no C++ compiler")
    run(COMPILER, "-shared", "-o", target, *objects_and_options)
    return target


def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, as the installed kernels say."""
    return cpu.instruction_sets() or ("portable",)
