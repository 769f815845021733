"""Inhibitor attention on the integer operator, trainable."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from inhibitor.models.attention import InhibitorAttention
from inhibitor.models.config import InhibitorConfig
from inhibitor.models.int8_layers import straight_through
from inhibitor.ops.integer import inhibitor_attention_int8
from inhibitor.ops.integer_grid import IntegerGrid, inverse, quantize_query_key, quantize_value
from inhibitor.ops.integer_operator import grid_of, steps_of


class IntegerInhibitorAttention(InhibitorAttention):
    """Inhibitor attention by the integer operator, trainable: the gradients are those of the float operator.

    The forward pass is ``inhibitor_attention_int8`` whether it trains or not. In the backward pass, query, key and
    value are what their codes stand for, rounding passes gradients straight through, clipping stops them, and the steps
    are learned like weights (LSQ, arXiv 1902.08153), by their logarithm (arXiv 1903.08066), so that they stay above 0.
    A query's gain is of the query as it comes, in float32: it scales what leaves the integers.

    Args:
        config: As for ``InhibitorAttention``.
        heads: Of the layer.
        head_dim: Of query and key.
        bits: Of query, key and value.
    """

    def __init__(self, config: InhibitorConfig, heads: int, head_dim: int, bits: int) -> None:
        super().__init__(config, heads, head_dim)
        self.bits = bits
        self.log2_query_key_step, self.log2_value_step = (nn.Parameter(torch.zeros(heads)) for _ in range(2))

    def steps(self) -> tuple[Tensor, Tensor]:
        """The steps of query and key, and of the value: float32 of shape (heads,) each."""
        return steps_of(self.log2_query_key_step), steps_of(self.log2_value_step)

    def grid(self, scale: float) -> IntegerGrid:
        """The grid that γ, δ, τ and the steps give, for a factor of the distance."""
        with torch.no_grad():
            steps = self.log2_query_key_step, self.log2_value_step
            made = grid_of(*steps, self.gamma, self.delta, self.reach, scale)
        return IntegerGrid(*(made[:-1] if self.reach is None else made))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """Context of shape (batch, heads, queries, value_dim)."""
        gain = self.gain(query)
        exact = self._exact(query, key, value, gain, attn_mask, is_causal, scale)
        tensors = chain((query, key, value, gain), self.parameters())
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return exact
        low, high = -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        query_key_step, value_step = self.steps()
        query, key = (_on_grid(x, query_key_step, low, high) for x in (query, key))
        value = _on_grid(value, value_step, -high, high)
        smooth = self.attend(query, key, value, gain, attn_mask, is_causal, scale)
        result: Tensor = _ValueOfOneGradientOfOther.apply(exact, smooth)  # type: ignore[no-untyped-call]
        return result

    def _exact(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gain: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        grid, dtype = self.grid(scale), query.dtype
        if self.bits != 8:
            query, key = (quantize_query_key(x, grid.query_key_step, self.bits) for x in (query, key))
            value = quantize_value(value, grid.value_step, self.bits)
        return inhibitor_attention_int8(
            query.detach(),
            key.detach(),
            value.detach(),
            grid,
            eta=gain.detach(),
            length_exponent=self.length_exponent.detach(),
            center=self.config.center,
            signed=self.config.signed,
            attn_mask=attn_mask,
            is_causal=is_causal,
        ).to(dtype)


class _ValueOfOneGradientOfOther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, smooth: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _on_grid(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """What the codes of x stand for; rounding passes gradients to x and to the step, clipping to the step alone."""
    step = step.view(-1, 1, 1)
    return (straight_through((x.float() * inverse(step)).clamp(low, high)) * step).to(x.dtype)
