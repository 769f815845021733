"""Attention on a GPU: the Triton kernels beside the PyTorch backend, the authors' form and softmax attention.

    python gpu/attention_speed.py --output results/gpu/attention.json

Lengths 128 to 16,384, 12 heads of 64; forward, and forward with backward; time, memory and energy. Results are compared
with float64 before anything is timed. The file is written after every figure, the picture at the end.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meter import Gauge
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import relu, scaled_dot_product_attention

from inhibitor import IntegerGrid, inhibitor_attention, inhibitor_attention_int8

SHAPES = ((8, 128), (8, 512), (1, 2048), (1, 8192), (1, 16384))  # batch, length
TINY = ((1, 3), (1, 17))
DENSE_LIMIT = 1 << 31  # elements of queries × keys × head_dim; of more, the authors' form read illegal addresses
SLOW_LIMIT = 1 << 36  # elements that the PyTorch backend is still timed on
SECONDS = 0.4


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype
    limit: int | None = None  # elements
    truth: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # the equations, if not inhibitor attention's
    forward_only: bool = False


def cdist_form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The form of the paper's authors: dense tensors of queries × keys × features."""
    score = torch.cdist(query, key, p=1.0) * query.shape[-1] ** -0.5
    inhibition = relu(score - score.mean(-1, keepdim=True)).unsqueeze(-1)
    value = value.unsqueeze(-3)
    return (relu(relu(value) - inhibition) - relu(relu(-value) - inhibition)).sum(-2)


def ours(backend: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return inhibitor_attention(query, key, value, backend=backend)

    return attend


def integers(backend: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Int8 attention; putting query, key and value on the grid takes part of its time."""

    @functools.cache
    def grid(heads: int, scale: float, device: torch.device) -> IntegerGrid:
        return IntegerGrid.of(0.03, 0.03, torch.ones(heads), 0.0, scale).to(device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        steps = grid(query.shape[1], query.shape[3] ** -0.5, query.device)
        return inhibitor_attention_int8(query, key, value, steps, backend=backend)

    return attend


def softmax(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value)

    return attend


def contestants(device: str) -> list[Contestant]:
    """Those that the device can run."""
    full, half = torch.float32, torch.bfloat16
    math = softmax(SDPBackend.MATH)
    found = [
        Contestant("Triton float32", ours("triton"), full),
        Contestant("Triton bfloat16", ours("triton"), half),
        Contestant("Triton int8", integers("triton"), half, truth=integers("reference"), forward_only=True),
        Contestant("PyTorch backend float32", ours("torch"), full, SLOW_LIMIT),
        Contestant("authors' cdist form float32", cdist_form, full, DENSE_LIMIT),
        Contestant("SDPA float32, math", math, full, DENSE_LIMIT, math),
    ]
    if device == "cpu":
        return found
    return [
        *found,
        Contestant("SDPA float32, memory-efficient", softmax(SDPBackend.EFFICIENT_ATTENTION), full, truth=math),
        Contestant("SDPA bfloat16, flash", softmax(SDPBackend.FLASH_ATTENTION), half, truth=math),
        Contestant("SDPA bfloat16, cuDNN", softmax(SDPBackend.CUDNN_ATTENTION), half, truth=math),
    ]


def with_backward(attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attend(*tensors), tensors, grad)


def error(found: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> float:
    """The largest difference to float64 in eight rows of one head, as a share of the largest element."""
    query, key, value = (tensor.detach()[:1, :1].double() for tensor in tensors)
    truth = attend(query[:, :, :8], key, value)
    return float((found[:1, :1, :8].double() - truth).abs().max() / truth.abs().max())


def measure(
    contestant: Contestant, shape: tuple[int, int, int, int], gauge: Gauge, limit: float | None
) -> dict[str, Any]:
    batch, heads, length, head_dim = shape
    elements = batch * heads * length * length * head_dim
    line: dict[str, Any] = {"name": contestant.name, "batch": batch, "heads": heads, "length": length}
    if contestant.limit is not None and elements > contestant.limit:
        return line | {"left out": f"more than {contestant.limit} elements"}
    generator = torch.Generator().manual_seed(length)
    tensors = [torch.randn(shape, generator=generator).to(gauge.device, contestant.dtype) for _ in range(4)]
    grad = tensors.pop()
    try:
        with torch.no_grad():
            found = contestant.attend(*tensors)
            line["error"] = error(found, contestant.truth or ours("reference"), tensors)
            if not line["error"] <= (0.05 if contestant.dtype == torch.bfloat16 else 1e-4):
                return line | {"wrong": True}
            del found
            seconds = SECONDS if gauge.device.type != "cpu" else 0.0
            line["forward"] = gauge.measure(lambda: contestant.attend(*tensors), seconds)
        if not contestant.forward_only:
            leaves = [tensor.requires_grad_() for tensor in tensors]
            step = functools.partial(with_backward, contestant.attend, leaves, grad)
            line["forward and backward"] = gauge.measure(step, seconds)
    except (RuntimeError, torch.OutOfMemoryError) as problem:  # a backend that does not serve this shape or card
        return line | {"failed": str(problem).splitlines()[0]}
    if limit is not None and contestant.name.startswith("Triton"):
        line["share of the limit"] = 4 * elements / limit / (line["forward"]["ms"] / 1000)
    return line


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds against length, both directions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, direction in zip(axes, ("forward", "forward and backward"), strict=True):
        for name in dict.fromkeys(line["name"] for line in lines):
            timed = [line for line in lines if line["name"] == name and direction in line]
            sizes = [f"{line['batch']}×{line['length']}" for line in timed]
            axis.plot(sizes, [line[direction]["ms"] for line in timed], marker="o", label=name)
        axis.set(title=direction, xlabel="batch × length", yscale="log")
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("results/gpu/attention.json"))
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    gauge = Gauge(torch.device(given.device))
    device = gauge.describe()
    heads, head_dim = (12, 64) if given.device != "cpu" else (1, 3)
    results: dict[str, Any] = {"device": device, "head_dim": head_dim, "lines": []}
    for batch, length in TINY if given.device == "cpu" else SHAPES:
        for contestant in contestants(given.device):
            shape = (batch, heads, length, head_dim)
            line = measure(contestant, shape, gauge, device.get("additions per second"))
            results["lines"].append(line)
            print(json.dumps(line), flush=True)
            given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    picture(results["lines"], given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
