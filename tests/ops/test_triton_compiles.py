"""Every Triton kernel becomes machine code for devices that are not here, and its loops hold what they are meant to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'inhibitor-attention[triton]'")

# The operations of each kernel's loops for each element, and the least share of arithmetic among all of them.
LOOPS = {
    "row_means": (2,),
    "forward": (2, 2),
    "by_rows": (2, 3, 4),
    "by_keys": (2, 3, 2, 3),
    "integer_row_means": (2,),
    "integer_forward": (2, 2),
}
LOOPS |= {f"{name}_reach": LOOPS[name] for name in ("forward", "by_rows", "by_keys", "integer_forward")}
ARITHMETIC = ("FADD", "FFMA", "FMUL")
LEAST = 0.8


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What the compiler made; in a process of its own, for in this one Triton may interpret."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_binary", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def binaries():
    return {(line["on"], line["kernel"]): line for line in compiled("cuda:80", "cuda:90", "gfx942")}


@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("on", ["cuda:80", "cuda:90"])
def test_loops_are_arithmetic_and_nothing_is_spilled_in_them(on, kernel, binaries):
    found = binaries[on, kernel]
    assert found["registers"] <= 255
    assert len(found["loops"]) == len(LOOPS[kernel])
    for loop, per_element in zip(found["loops"], LOOPS[kernel], strict=True):
        counted = sum(count for name, count in loop.items() if name.partition(".")[0] in ARITHMETIC)
        assert counted == per_element * 32 * 8  # elements of a thread × steps that are unrolled
        assert counted / sum(loop.values()) >= LEAST
        assert not {name for name in loop if name.startswith(("LDL", "STL", "BAR", "LDS", "SHFL"))}


@pytest.mark.parametrize("kernel", LOOPS)
def test_kernels_compile_for_amd(kernel, binaries):
    assert binaries["gfx942", kernel]["bytes"] > 0


@pytest.mark.parametrize(("width", "value_width"), [(16, 32), (64, 32)])
def test_kernels_compile_where_values_have_another_width_and_a_mask_leaves_tiles_out(width, value_width):
    found = compiled("cuda:90", "--width", str(width), "--value-width", str(value_width), "--masked")
    assert [line["kernel"] for line in found] == list(LOOPS)
