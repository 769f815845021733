"""``torch.ops.inhibitor.integer_attention``: schema and shapes, in one place."""

from typing import Any

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, integer_cpu, integer_reference
from inhibitor.ops.integer_grid import GridTensors, IntegerOptions

BACKENDS: dict[str, Any] = {"cpu": integer_cpu, "reference": integer_reference}
# query: (batch, heads, queries, head_dim); key: (batch, key_heads, keys, head_dim), key_heads divides heads; value:
# (batch, key_heads, keys, value_dim); all floating point, or uint8, uint8 and int8. The five of the grid: (heads,).
# factor: float32, broadcastable to (batch, heads, queries, 1): the result is then float32, without it int32.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_key_step, Tensor value_step, Tensor multiplier,"
    " Tensor shift, Tensor threshold, Tensor? factor, Tensor? attn_mask,"
    " bool is_causal, bool center, bool signed, str backend"
)

torch.library.define("inhibitor::integer_attention", f"({_INPUTS}) -> Tensor")
attention = torch.ops.inhibitor.integer_attention.default


@torch.library.impl("inhibitor::integer_attention", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """H, (batch, heads, queries, value_dim)."""
    *grid, factor, attn_mask, is_causal, center, signed, backend = rest
    options = IntegerOptions(attn_mask, is_causal, center, signed)
    result: Tensor = BACKENDS[backend].forward(query, key, value, GridTensors(*grid), factor, options)
    return result


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    dtype = torch.int32 if rest[5] is None else torch.float32
    if rest[-1] == "cpu":
        return cpu.empty_result(query, value, dtype)
    return query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise OperatorError(
        "inhibitor_attention_int8",
        expected="a call without gradients",
        got="a backward pass",
        remedy="Train with fake quantisation, or call it under torch.no_grad().",
    )


torch.library.register_fake("inhibitor::integer_attention", _fake)
torch.library.register_autograd("inhibitor::integer_attention", _no_gradient)
