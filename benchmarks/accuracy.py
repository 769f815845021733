"""How exact the operator is and how much memory it takes, on this machine: prints it, writes results/operator.json.

    python benchmarks/accuracy.py

The errors are those of tests/ops, on the same shapes: the largest difference from the reference in float64, as a share
of the sum of absolute terms (``sizes``), beside that of the plain formula in the same dtype. The memory is the growth
of a fresh process's resident peak during the call, its inputs and results already counted.
"""

import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the shapes are those of the tests

from inhibitor import inhibitor_attention  # noqa: E402
from inhibitor.bench.machine import machine  # noqa: E402
from tests.ops.cases import SWEEP, arguments, relative_error, separate, sizes  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = (1, 12, 4096, 64)  # batch, heads, length, head_dim


def errors(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """The largest errors over the sweep, of the result and of all gradients, ours and the plain formula's."""
    largest = {part: {"inhibitor": 0.0, "plain": 0.0} for part in ("forward", "gradients")}
    for case in SWEEP:
        given, grad = arguments(case, dtype)
        given = separate(case, given)
        size = sizes(case, given, grad)
        truth = given.to(torch.float64).with_gradients(grad, "reference")
        found = given.with_gradients(grad, "auto")
        plain = given.to(torch.float32).with_gradients(grad, "reference")
        for name, true in truth.items():
            entry = largest["forward" if name == "output" else "gradients"]
            rounded = plain[name].to(found[name].dtype)
            entry["inhibitor"] = max(entry["inhibitor"], relative_error(found[name], true, size[name]))
            entry["plain"] = max(entry["plain"], relative_error(rounded, true, size[name]))
    return {part: {name: float(f"{error:.2e}") for name, error in entry.items()} for part, entry in largest.items()}


def resident_peak() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(backward: bool) -> tuple[int, float]:
    """Bytes by which the resident peak grows during a float32 call, and its seconds; in a process of its own."""
    query, key, value, grad = (torch.randn(LONG, requires_grad=backward) for _ in range(4))
    small = (tensor[:, :, :8] for tensor in (query, key, value))
    inhibitor_attention(*small).sum().requires_grad_(backward)  # load what is loaded at the first call
    results = [torch.ones(LONG) for _ in range(4 if backward else 1)]
    del results
    before = resident_peak()
    start = time.perf_counter()
    output = inhibitor_attention(query, key, value)
    if backward:
        torch.autograd.grad(output, (query, key, value), grad)
    seconds = time.perf_counter() - start
    return resident_peak() - before, seconds


def memory() -> dict[str, dict[str, float]]:
    """``peak`` of forward and of forward and backward; to be called first.

    A child's peak starts at the size that its parent had: the parent must still be small.
    """
    found = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            extra, seconds = child.submit(peak, backward).result()
        found[name] = {"extra_mib": round(extra / 2**20, 1), "seconds": round(seconds, 1)}
    return found


def main() -> None:
    """Measure, print, write."""
    found = {
        "machine": machine(),
        "memory": {"shape": "x".join(map(str, LONG)), "dtype": "float32", **memory()},
        "cases": len(SWEEP),
        "largest_error": {str(dtype).removeprefix("torch."): errors(dtype) for dtype in DTYPES},
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "operator.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
