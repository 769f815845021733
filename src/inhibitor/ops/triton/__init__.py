"""The Triton backend: fused kernels for GPUs, forward and backward, for float32, bfloat16 and float16.

Triton is imported at the first call, so that the package works without it. Under Triton's interpreter
(``TRITON_INTERPRET=1`` before Triton is imported) the same kernels run on the CPU, slowly, for tests. The mathematics
is in docs/operator.md, what is known of their speed in docs/gpu.md.
"""

import importlib.util

import torch
from torch import Tensor

from inhibitor.ops.blocked import Options
from inhibitor.ops.cpu import empty_gradient, empty_result
from inhibitor.ops.triton.launch import Call

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


def forward(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, reach: Tensor | None, options: Options
) -> Tensor:
    """Sum of inhibited values in float32, before η and the length exponent: ``blocked.forward``'s arguments."""
    output = empty_result(query, value.shape[3], reach)
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_()
    call = Call(query, key, value, options, backward=False, reach=reach)
    slopes, shifts = _line(gamma, delta, options)
    with call.on_device():
        means, _ = call.means()
        call.launch(
            "forward",
            "forward",
            (query, key, value, call.mask, means, slopes, shifts, output),
            (query, key, value, call.mask),
            (output,),
        )
    return output


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    delta: Tensor,
    reach: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, γ, δ and τ: ``blocked.backward``'s arguments.

    No two programs add to the same number: the same bits in every run.
    """
    grad_query, grad_key, grad_value = (empty_gradient(tensor) for tensor in (query, key, value))
    if 0 in (*query.shape[:3], *key.shape[:3]):
        for tensor in (grad_query, grad_key, grad_value):
            tensor.zero_()
        grad_reach = gamma.new_zeros(0) if reach is None else torch.zeros_like(reach)
        return grad_query, grad_key, grad_value, torch.zeros_like(gamma), torch.zeros_like(delta), grad_reach
    call = Call(query, key, value, options, backward=True, reach=reach)
    slopes, shifts = _line(gamma, delta, options)
    shares, slope_sums, shift_sums = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3))
    reach_sums = shares.new_empty((0,) if reach is None else shares.shape)
    with call.on_device():
        means, counts = call.means()
        tensors = (grad, query, key, value, call.mask)
        call.launch(
            "backward",
            "by_rows",
            (*tensors, means, counts, slopes, shifts, grad_query, shares, slope_sums, shift_sums, reach_sums),
            tensors,
            (grad_query,),
        )
        call.launch(
            "backward",
            "by_keys",
            (*tensors, means, shares, slopes, shifts, grad_key, grad_value),
            tensors,
            (grad_key, grad_value),
        )
    grad_gamma = slope_sums.sum((0, 2)) * options.scale
    grad_delta = shift_sums.sum((0, 2))
    grad_reach = gamma.new_zeros(0) if reach is None else reach_sums.sum((0, 2)).to(reach.dtype)
    return grad_query, grad_key, grad_value, grad_gamma.to(gamma.dtype), grad_delta.to(delta.dtype), grad_reach


def _line(gamma: Tensor, delta: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The slope and the shift of each head's scores, float32 of shape (heads,)."""
    return (gamma.to(torch.float32) * options.scale).contiguous(), delta.to(torch.float32).contiguous()
