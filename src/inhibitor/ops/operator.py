"""``torch.ops.inhibitor.attention``: schema, shapes, backward, in one place.

The operator returns Σ_j of the inhibited values in the accumulation dtype; η and the length exponent scale that sum
outside, where PyTorch differentiates them.
"""

from typing import Any

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import blocked, cpu

_BACKENDS: dict[str, Any] = {"cpu": cpu, "torch": blocked}


@torch.library.custom_op("inhibitor::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    delta: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    center: bool,
    signed: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Sum of inhibited values, (batch, heads, queries, value_dim), in float32 for half-precision inputs.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim); key_heads divides heads.
        value: (batch, key_heads, keys, value_dim).
        gamma: (heads,), the slope of the score.
        delta: (heads,), the shift of the centred score.
        attn_mask: Boolean, broadcastable to (batch, heads, queries, keys); True = may attend.
        is_causal: Whether query i sees keys 0 to i only.
        center: Whether the mean over the allowed keys is subtracted from each row of scores.
        signed: The signed form; False is ReLU(V − Z).
        scale: Factor of the Manhattan distance.
        backend: ``cpu`` or ``torch``.
    """
    options = blocked.Options(attn_mask, is_causal, center, signed, scale)
    return _BACKENDS[backend].forward(query, key, value, gamma, delta, options)


@torch.library.custom_op("inhibitor::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    delta: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    center: bool,
    signed: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, γ and δ, each in the shape and dtype of its input."""
    options = blocked.Options(attn_mask, is_causal, center, signed, scale)
    return _BACKENDS[backend].backward(grad, query, key, value, gamma, delta, options)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    shape = (*query.shape[:3], value.shape[3])
    return query.new_empty(shape, dtype=blocked.accumulation_dtype(query.dtype))


@attention_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.inhibitor.attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None, None)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise OperatorError(
        "inhibitor_attention",
        expected="a first derivative",
        got="a second one",
        remedy='Only backend="reference" can be differentiated twice.',
    )


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(_no_double_backward)
