"""The native kernels under the address and undefined-behaviour sanitizers: a good share of the tests, no report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import native

SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g", "-O1")


def runtime(name: str = "libasan.so") -> Path | None:
    """The address sanitizer's library, which has to be loaded before all others, or another of the compiler's."""
    if native.COMPILER is None:
        return None
    command = [native.COMPILER, f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found.resolve() if found.is_absolute() and found.exists() else None


def report(suite: str, library: Path) -> None:
    """Run a compact suite on a build; nothing may be reported."""
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime()} {runtime('libstdc++.so')}",  # or errors that PyTorch throws end the process
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", suite, "--here", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=native.ROOT, env=environment, timeout=600)
    assert "ERROR: AddressSanitizer" not in result.stderr, result.stderr[-5000:]
    assert "runtime error:" not in result.stderr, result.stderr[-5000:]
    assert (result.returncode, result.stdout.strip()) == (0, "survives"), result.stderr[-5000:]


needs_sanitizers = pytest.mark.skipif(
    native.COMPILER is None or runtime() is None, reason="no C++ compiler, or one without libasan.so"
)


@needs_sanitizers
def test_no_sanitizer_reports_anything(tmp_path):
    names = native.instruction_sets()
    objects = [native.compile_kernels(native.SOURCES, name, tmp_path / f"{name}.o", *SANITIZE) for name in names]
    objects.append(native.compile_driver(native.SOURCES, names, tmp_path / "driver.o", *SANITIZE))
    report("tests.ops.compact", native.link(tmp_path / "kernels.so", *objects, *SANITIZE))


@needs_sanitizers
def test_no_sanitizer_reports_anything_of_the_integer_kernels(tmp_path):
    names = native.instruction_sets()
    objects = native.compile_integers(native.SOURCES, names, tmp_path, *SANITIZE)
    objects.append(native.compile_kernels(native.SOURCES, "portable", tmp_path / "portable.o", *SANITIZE))
    objects.append(native.compile_driver(native.SOURCES, (), tmp_path / "driver.o", *SANITIZE))
    report("tests.ops.integer_compact", native.link(tmp_path / "kernels.so", *objects, *SANITIZE))
