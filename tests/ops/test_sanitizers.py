"""The native kernels under the address and undefined-behaviour sanitizers: a good share of the tests, no report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import native

SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g", "-O1")


def runtime() -> Path | None:
    """The address sanitizer's library, which has to be loaded before all others."""
    if native.COMPILER is None:
        return None
    command = [native.COMPILER, "-print-file-name=libasan.so"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found.resolve() if found.is_absolute() and found.exists() else None


@pytest.mark.skipif(native.COMPILER is None, reason="no C++ compiler: set CXX or install one")
@pytest.mark.skipif(native.COMPILER is not None and runtime() is None, reason="the compiler has no libasan.so")
def test_no_sanitizer_reports_anything(tmp_path):
    names = native.instruction_sets()
    objects = [native.compile_kernels(native.SOURCES, name, tmp_path / f"{name}.o", *SANITIZE) for name in names]
    objects.append(native.compile_driver(native.SOURCES, names, tmp_path / "driver.o", *SANITIZE))
    library = native.link(tmp_path / "kernels.so", *objects, *SANITIZE)
    environment = os.environ | {
        "LD_PRELOAD": str(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.ops.compact", "--here", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=native.ROOT, env=environment, timeout=600)
    assert "ERROR: AddressSanitizer" not in result.stderr, result.stderr[-5000:]
    assert "runtime error:" not in result.stderr, result.stderr[-5000:]
    assert (result.returncode, result.stdout.strip()) == (0, "survives"), result.stderr[-5000:]
