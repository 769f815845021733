"""Compiles every Triton kernel for devices that are not there; run as a module, prints one JSON line for each.

python -m tests.ops.triton_binary cuda:80 cuda:90 gfx942
"""

import argparse
import inspect
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inhibitor.ops.triton import backward_kernels, forward_kernels, tiles
from inhibitor.ops.triton.configuration import Device, choose
from inhibitor.ops.triton.launch import scratch

KERNELS = {
    "row_means": forward_kernels.row_means,
    "forward": forward_kernels.forward,
    "by_rows": backward_kernels.by_rows,
    "by_keys": backward_kernels.by_keys,
    "integer_row_means": forward_kernels.row_means,
    "integer_forward": forward_kernels.forward,
}
KERNELS |= {f"{name}_reach": kernel for name, kernel in KERNELS.items() if "reaches" in kernel.arg_names}
HALF = ("grad", "query", "key", "value", "grad_query", "grad_key", "grad_value")
CODES = {"query": "*u8", "key": "*u8", "value": "*i8"}
CODES |= dict.fromkeys(("output", "scratch", "reaches"), "*fp32")  # all else is int32
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def target(name: str) -> tuple[GPUTarget, Device]:
    kind, _, version = name.partition(":")
    if kind == "cuda":
        return GPUTarget("cuda", int(version), 32), Device("cuda", 1, divmod(int(version), 10))
    return GPUTarget("hip", name, 64), Device("cuda", 1, None)


def compiled(name: str, on: str, width: int, value_width: int, masked: bool) -> Any:
    """A kernel for bfloat16 heads of these widths, as the backend would launch it there."""
    kernel, (gpu, device) = KERNELS[name], target(on)
    found = choose(device, max(width, value_width), backward=name.startswith("by_"))
    constants: dict[str, Any] = {"HEAD_DIM": width, "HEAD_WIDTH": width}
    constants |= {"VALUE_DIM": value_width, "VALUE_WIDTH": value_width}
    constants |= {
        "ROWS": found.rows,
        "KEYS": found.keys,
        "SIZE": scratch(name.removeprefix("integer_").removesuffix("_reach"), found, width, value_width),
    }
    constants |= {"MASKED": masked, "CAUSAL": masked, "BY_ROW": masked, "SIGNED": True, "CENTER": True}
    constants["WHOLE"] = whole = name.startswith("integer_")
    constants |= {} if name.endswith("_reach") else {"reaches": None}
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[str | int]]] = {}
    for i, parameter in enumerate(inspect.signature(kernel.fn).parameters):
        if parameter in constants:
            types[parameter], values[i,] = "constexpr", constants[parameter]
        elif parameter.endswith("_feature") or parameter == "mask_key":
            types[parameter], values[i,] = "constexpr", 1
        elif parameter.endswith(("_batch", "_head", "_row")) or parameter in tiles.LENGTHS:
            types[parameter] = "i32"
            if parameter not in tiles.LENGTHS:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            floating = "*bf16" if parameter in HALF else "*fp32"
            types[parameter] = "*u8" if parameter == "mask" else CODES.get(parameter, "*i32") if whole else floating
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    return triton.compile(source, target=gpu, options=found.options)


def machine_code(binary: bytes) -> tuple[dict[str, int], list[str]]:
    """What a program takes of the device, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        used = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used.stdout + used.stderr)
    assert numbers is not None
    return dict(zip(("registers", "stack"), map(int, numbers.groups()), strict=True)), code.stdout.splitlines()


def loops(lines: list[str]) -> Iterator[Counter[str]]:
    """The operations of each innermost loop that is long enough to be one over features, keys or rows."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);", line):
            back = re.search(r"\.L_x_\d+", instruction[2]) if instruction[1].startswith("BRA") else None
            if back and labels.get(back[0], len(operations) + 1) <= len(operations):
                jumps.append((labels[back[0]], len(operations)))
            operations.append(instruction[1])
    for first, last in jumps:
        inner = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in jumps)
        if inner and last - first > 200:
            yield Counter(operations[first : last + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", help="such as cuda:80, cuda:90, gfx942")
    parser.add_argument("--width", type=int, default=64, help="head_dim, a power of two")
    parser.add_argument("--value-width", type=int, help="value_dim; by default the same")
    parser.add_argument("--masked", action="store_true", help="with a mask for every row, and causal")
    given = parser.parse_args()
    value_width = given.value_width or given.width
    for on in given.devices:
        for name in KERNELS:
            kernel = compiled(name, on, given.width, value_width, given.masked)
            line: dict[str, Any] = {"kernel": name, "on": on, "width": given.width, "masked": given.masked}
            if on.startswith("cuda"):
                used, code = machine_code(kernel.asm["cubin"])
                line |= used | {"loops": list(loops(code))}
            else:
                line["bytes"] = len(kernel.asm["hsaco"])
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
