"""The Triton backend: fused kernels for GPUs, forward and backward, for float32, bfloat16 and float16.

Triton is imported at the first call, so that the package works without it. Under Triton's interpreter
(``TRITON_INTERPRET=1`` before Triton is imported) the same kernels run on the CPU, slowly, for tests. The mathematics
is in docs/operator.md, what is known of their speed in docs/gpu.md.
"""

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from inhibitor.ops.blocked import Options
from inhibitor.ops.cpu import empty_gradient, empty_result
from inhibitor.ops.triton.configuration import Configuration, Device, choose, device_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
LARGEST_DIM = 256  # of head_dim and value_dim
INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one element of work after the other."""
    if not INSTALLED:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def forward(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, options: Options) -> Tensor:
    """Sum of inhibited values in float32, before η and the length exponent: ``blocked.forward``'s arguments."""
    output = empty_result(query, value)
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_()
    call = _Call(query, key, value, gamma, delta, options, backward=False)
    with call.on_device():
        means, _ = call.means()
        call.launch(
            "forward",
            "forward",
            (query, key, value, call.mask, means, call.slopes, call.shifts, output),
            (query, key, value, call.mask),
            (output,),
        )
    return output


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, γ and δ: ``blocked.backward``'s arguments.

    No two programs add to the same number: the same bits in every run.
    """
    grad_query, grad_key, grad_value = (empty_gradient(tensor) for tensor in (query, key, value))
    if 0 in (*query.shape[:3], *key.shape[:3]):
        for tensor in (grad_query, grad_key, grad_value):
            tensor.zero_()
        return grad_query, grad_key, grad_value, torch.zeros_like(gamma), torch.zeros_like(delta)
    call = _Call(query, key, value, gamma, delta, options, backward=True)
    shares, slope_sums, shift_sums = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3))
    with call.on_device():
        means, counts = call.means()
        tensors = (grad, query, key, value, call.mask)
        call.launch(
            "backward",
            "by_rows",
            (*tensors, means, counts, call.slopes, call.shifts, grad_query, shares, slope_sums, shift_sums),
            tensors,
            (grad_query,),
        )
        call.launch(
            "backward",
            "by_keys",
            (*tensors, means, shares, call.slopes, call.shifts, grad_key, grad_value),
            tensors,
            (grad_key, grad_value),
        )
    grad_gamma = slope_sums.sum((0, 2)) * options.scale
    grad_delta = shift_sums.sum((0, 2))
    return grad_query, grad_key, grad_value, grad_gamma.to(gamma.dtype), grad_delta.to(delta.dtype)


class _Call:
    """What the launches of one pass share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gamma: Tensor,
        delta: Tensor,
        options: Options,
        backward: bool,
    ) -> None:
        self.batch, self.heads, self.queries, head_dim = query.shape
        self.key_heads, self.length, value_dim = value.shape[1:]
        self.query, self.key = query, key
        self.slopes = (gamma.to(torch.float32) * options.scale).contiguous()
        self.shifts = delta.to(torch.float32).contiguous()
        mask = options.attn_mask
        if mask is not None:
            mask = mask.expand(self.batch, self.heads, self.queries, self.length).view(torch.uint8)
        self.mask = query if mask is None else mask  # a pointer that nothing follows
        self.widths = {"HEAD_WIDTH": _width(head_dim), "VALUE_WIDTH": _width(value_dim)}
        self.device: Device = device_of(query.device)
        self.configuration: Configuration = choose(self.device, max(self.widths.values()), backward)
        self.constants = self.widths | {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ROWS": self.configuration.rows,
            "KEYS": self.configuration.keys,
            "MASKED": mask is not None,
            "CAUSAL": options.is_causal,
            "BY_ROW": options.is_causal or (mask is not None and mask.stride(2) != 0),
            "SIGNED": options.signed,
            "CENTER": options.center,
        }

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches go to the device of the tensors, whichever is current."""
        device = self.query.device
        return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)

    def means(self) -> tuple[Tensor, Tensor]:
        """Each row's mean distance and how many keys it sees, (batch, heads, queries); unset if not centred."""
        means, counts = (self.query.new_empty(self.query.shape[:3], dtype=torch.float32) for _ in range(2))
        if self.constants["CENTER"]:
            tensors = (self.query, self.key, self.mask)
            self.launch("forward", "row_means", (*tensors, means, counts), tensors, ())
        return means, counts

    def launch(
        self,
        module: str,
        name: str,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
    ) -> None:
        """Run a kernel: its tensors, then the strides of those that have some, the results' last."""
        kernel = getattr(importlib.import_module(f"{__name__}.{module}_kernels"), name)
        rows, keys = self.configuration.rows, self.configuration.keys
        if name == "by_keys":
            blocks = self.batch * self.key_heads * -(-self.length // keys)
        else:
            blocks = self.batch * self.heads * -(-self.queries // rows)
        programs = min(blocks, self.device.cores * self.configuration.programs)
        size = scratch(name, self.configuration, self.widths["HEAD_WIDTH"], self.widths["VALUE_WIDTH"])
        memory = torch.empty(programs * size, dtype=torch.float32, device=self.query.device)
        numbers = (self.heads, self.heads // self.key_heads, self.queries, self.length, blocks)
        constants = {name: value for name, value in self.constants.items() if name in kernel.arg_names} | {"SIZE": size}
        kernel[(programs,)](
            *pointers,
            memory,
            *(number for tensor in strided for number in tensor.stride()),
            *(number for tensor in targets for number in tensor.stride()),
            *numbers,
            **constants,
            **self.configuration.options,
        )


def scratch(kernel: str, configuration: Configuration, head: int, value: int) -> int:
    """Floats that one program of a kernel needs besides its registers, for tiles of these widths."""
    rows, keys = configuration.rows, configuration.keys
    return {
        "row_means": (rows + keys) * head,
        "forward": (rows + keys) * head + 2 * keys * value + rows * keys,
        "by_rows": 2 * (rows + keys) * head + (rows + 2 * keys) * value + 2 * rows * keys,
        "by_keys": 2 * (rows + keys) * head + (2 * rows + 3 * keys) * value + 2 * rows * keys,
    }[kernel]


def _width(features: int) -> int:
    """The power of two that holds the features; Triton's tiles have no other sizes."""
    return max(16, 1 << (features - 1).bit_length())
