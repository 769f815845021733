"""``torch.ops.inhibitor.attention``: schema, shapes, backward, in one place.

The operator returns Σ_j of the inhibited values in the accumulation dtype; η and the length exponent scale that sum
outside, where PyTorch differentiates them. With a reach τ it has one feature more, Σ_j (τ − Z_ij)⁺, as if every
value had one more that is τ.
"""

from typing import Any

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import blocked, cpu, triton

BACKENDS: dict[str, Any] = {"cpu": cpu, "triton": triton, "torch": blocked}
# query: (batch, heads, queries, head_dim); key: (batch, key_heads, keys, head_dim), key_heads divides heads; value:
# (batch, key_heads, keys, value_dim); gamma, delta, reach: (heads,); attn_mask: boolean, broadcastable to (batch,
# heads, queries, keys), True = may attend.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor gamma, Tensor delta, Tensor? reach,"
    " Tensor? attn_mask, bool is_causal, bool center, bool signed, float scale, str backend"
)

# torch.library.custom_op would do all of this in fewer lines and take 10 µs more for every call.
torch.library.define("inhibitor::attention", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "inhibitor::attention_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
attention = torch.ops.inhibitor.attention.default
attention_backward = torch.ops.inhibitor.attention_backward.default


@torch.library.impl("inhibitor::attention", "CompositeExplicitAutograd")
def _forward(*inputs: Any) -> Tensor:
    """Sums of inhibited values, (batch, heads, queries, value_dim), in float32 for half-precision inputs."""
    *tensors, attn_mask, is_causal, center, signed, scale, backend = inputs
    options = blocked.Options(attn_mask, is_causal, center, signed, scale)
    result: Tensor = BACKENDS[backend].forward(*tensors, options)
    return result


@torch.library.impl("inhibitor::attention_backward", "CompositeExplicitAutograd")
def _gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, γ, δ and τ, each in the shape and dtype of its input; without a τ, empty."""
    *tensors, attn_mask, is_causal, center, signed, scale, backend = inputs
    options = blocked.Options(attn_mask, is_causal, center, signed, scale)
    results: tuple[Tensor, ...] = BACKENDS[backend].backward(*tensors, options)
    return results


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, *rest: Any) -> Tensor:
    reach, *_, backend = rest
    if backend != "torch":
        return cpu.empty_result(query, value.shape[3], reach)
    shape = (*query.shape[:3], value.shape[3] + (reach is not None))
    return query.new_empty(shape, dtype=blocked.accumulation_dtype(query.dtype))


def _fake_gradients(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    gamma, delta, reach = inputs[3:6]
    parameters = [
        gamma.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in (gamma, delta, reach)
    ]
    if inputs[-1] != "torch":
        return (*map(cpu.empty_gradient, inputs[:3]), *parameters)
    return (*(tensor.new_empty(tensor.shape) for tensor in inputs[:3]), *parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, of_reach = attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, of_reach if ctx.needs_input_grad[5] else None, *(None,) * 6)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise OperatorError(
        "inhibitor_attention",
        expected="a first derivative",
        got="a second one",
        remedy='Only backend="reference" can be differentiated twice.',
    )


torch.library.register_fake("inhibitor::attention", _fake_forward)
torch.library.register_fake("inhibitor::attention_backward", _fake_gradients)
torch.library.register_autograd("inhibitor::attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("inhibitor::attention_backward", _no_double_backward)
