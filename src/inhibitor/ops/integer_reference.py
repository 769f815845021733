"""The integer operator as docs/integer.md specifies it, in plain PyTorch: the truth for every kernel, bit by bit."""

from typing import NamedTuple

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import masks
from inhibitor.ops.integer_grid import FARTHEST, LARGEST, GridTensors, quantize_query_key, quantize_value
from inhibitor.ops.masks import Options

_TILE = 1 << 22  # elements of the largest tensor


class Scale(NamedTuple):
    """What the sums of the operator are multiplied by.

    Args:
        factor: float64, broadcastable to (batch, heads, queries, 1).
        length_exponent: ρ, float64 of shape (heads,): with a reach, the factor is times n^(−ρ) of what is heard. None
            is 0.
    """

    factor: Tensor
    length_exponent: Tensor | None


def result_form(reach: Tensor | None, *, scaled: bool) -> tuple[Tensor | None, torch.dtype]:
    """The reach whose feature comes behind the result's, if any does, and the result's dtype."""
    return (None, torch.float32) if scaled else (reach, torch.int32)


def forward(
    query: Tensor, key: Tensor, value: Tensor, grid: GridTensors, scale: Scale | None, options: Options
) -> Tensor:
    """H in int32, with a reach one feature more, or in float32 times a factor.

    Args:
        query: As of the registered operator, as are the grid's tensors and the options.
        key: Likewise.
        value: Likewise.
        grid: Of the query's heads.
        scale: What the sums are multiplied by, or None for integers.
        options: The mask and the form.

    Raises:
        OperatorError: A number in sight is NaN.
    """
    query, key, value = on_grid(query, key, value, grid, options)
    heads, queries = query.shape[1:3]
    groups, keys = heads // max(key.shape[1], 1), key.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    allowed = _allowed(query, key, options)
    features = value.shape[3] + (grid.reach is not None)
    output = torch.zeros(*query.shape[:3], features, dtype=torch.int32, device=query.device)
    rows = max(1, _TILE // max(query.shape[0] * heads * keys * value.shape[3], 1))
    for first in range(0, queries if output.numel() and keys else 0, rows):
        part = slice(first, first + rows)
        z = inhibition(query[:, :, part], key, grid, allowed[:, :, part], options.center)
        output[:, :, part, : value.shape[3]] = _sum(value, z, allowed[:, :, part], options.signed)
        if grid.reach is not None:
            left = (grid.reach.view(-1, 1, 1) - z).clamp(min=0) * allowed[:, :, part]
            output[:, :, part, -1] = left.sum(-1, dtype=torch.int32)
    return output if scale is None else scaled(output, scale, grid.reach)


def scaled(total: Tensor, scale: Scale, reach: Tensor | None) -> Tensor:
    """The operator's sums times a factor that is worked out in float64 and rounded once, in float32.

    Args:
        total: (batch, heads, queries, value_dim) in integers, with a reach one feature more.
        scale: The factor.
        reach: Of the grid.
    """
    factor, exponent = scale
    if reach is not None:
        total, heard = total[..., :-1], masks.UNHEARD + total[..., -1:].double() / reach.view(-1, 1, 1)
        if exponent is not None:
            factor = factor * heard.pow(-exponent.view(-1, 1, 1))
    return total.to(torch.float32) * factor.to(torch.float32)


def distance(query: Tensor, key: Tensor) -> Tensor:
    """Σ|q − k| of codes, int32 of shape (batch, heads, queries, keys)."""
    # Whole numbers below 2²⁴: float32 adds them without rounding.
    return torch.cdist(query.to(torch.float32), key.to(torch.float32), p=1.0).to(torch.int32)


def inhibition(query: Tensor, key: Tensor, grid: GridTensors, allowed: Tensor, center: bool) -> Tensor:
    """z, int32 in [0, 255] of shape (batch, heads, queries, keys), in steps of the value.

    Args:
        query: uint8 codes of shape (batch, heads, queries, head_dim).
        key: uint8 codes of shape (batch, heads, keys, head_dim).
        grid: Of as many heads, ``IntegerGrid.tensors``.
        allowed: Boolean, (batch, heads, queries, keys), True = may attend.
        center: Whether the row's mean is subtracted.
    """
    distances = distance(query, key)
    middle = torch.zeros((), dtype=torch.int64, device=query.device)
    if center:
        count = allowed.sum(-1, keepdim=True).clamp(min=1)
        total = (distances.to(torch.int64) * allowed).sum(-1, keepdim=True)
        middle = (2 * total + count).div(2 * count, rounding_mode="floor")
    multiplier, shift, threshold = (
        tensor.to(torch.int64).view(-1, 1, 1) for tensor in (grid.multiplier, grid.shift, grid.threshold)
    )
    middle = (middle - threshold).clamp(-LARGEST, LARGEST)
    excess = (distances - middle).clamp(0, LARGEST)
    return ((excess * multiplier) >> shift).clamp(max=FARTHEST).to(torch.int32)


def on_grid(
    query: Tensor, key: Tensor, value: Tensor, grid: GridTensors, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of query, key and value; what are codes already stays.

    Raises:
        OperatorError: A number in sight is NaN.
    """
    if not query.is_floating_point():
        return query, key, value
    groups = query.shape[1] // max(key.shape[1], 1)
    if any(bool(tensor.isnan().any()) for tensor in (query, key, value)):
        _refuse_nan(query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), options)
    query_step, key_step, value_step = grid.query_key_step, grid.query_key_step[::groups], grid.value_step[::groups]
    return quantize_query_key(query, query_step), quantize_query_key(key, key_step), quantize_value(value, value_step)


def _allowed(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """Who sees whom, boolean of shape (batch, heads, queries, keys)."""
    queries, keys = query.shape[2], key.shape[2]
    allowed = masks.dense(options.attn_mask, options.is_causal, queries, keys, query.device)
    return allowed.expand(*query.shape[:2], queries, keys)


def _sum(value: Tensor, z: Tensor, allowed: Tensor, signed: bool) -> Tensor:
    """Σ of what is left of the values in sight, int32."""
    value, z = value.to(torch.int32).clamp(min=-127).unsqueeze(2), z.unsqueeze(-1)
    left = value.sign() * (value.abs() - z).clamp(min=0) if signed else (value - z).clamp(min=0)
    return (left * allowed.unsqueeze(-1)).sum(3, dtype=torch.int32)


def _refuse_nan(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
    """Raise where a number in sight is NaN; what no query sees may be anything."""
    allowed = _allowed(query, key, options)
    seeing, seen = allowed.any(3), allowed.any(2)
    for name, tensor, counts in (("query", query, seeing), ("key", key, seen), ("value", value, seen)):
        if bool((tensor.isnan().any(-1) & counts).any()):
            raise nan_in(name)


def nan_in(name: str, got: str = "NaN where a query sees it") -> OperatorError:
    """The error for a NaN that would be put on a grid."""
    return OperatorError(
        name,
        expected="numbers",
        got=got,
        remedy="No integer stands for it: look for the layer that makes it.",
    )
