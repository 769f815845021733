"""Inhibitor attention as the equations read (METHOD: S, Z, H): dense, differentiable, the truth for every test."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from inhibitor.ops import masks


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    delta: Tensor,
    reach: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    center: bool,
    signed: bool,
    scale: float,
) -> Tensor:
    """Sum of inhibited values, before η and the length exponent; with a reach τ also of one more value, τ of every key.

    Holds queries × keys × head_dim tensors: for tests and small inputs. Arguments and result are those of the
    registered operator in ``inhibitor.ops.operator``.
    """
    dtype, groups = masks.accumulation_dtype(query.dtype), query.shape[1] // max(key.shape[1], 1)
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if reach is not None:
        value = torch.cat([value, reach.to(dtype).view(-1, 1, 1).expand(*value.shape[:3], 1)], -1)
    queries, keys = query.shape[2], key.shape[2]
    allowed = masks.dense(attn_mask, is_causal, queries, keys, query.device)
    gamma, delta = (_wide(parameter, dtype).view(-1, 1, 1) for parameter in (gamma, delta))

    # What a query may not see is set to zero before it is used, so that not even a NaN passes.
    difference = (query.unsqueeze(-2) - key.unsqueeze(-3)).masked_fill(~allowed.unsqueeze(-1), 0)
    seen_value = value.unsqueeze(-3).masked_fill(~allowed.unsqueeze(-1), 0)

    score = gamma * scale * difference.abs().sum(-1)
    if center:
        mean = score.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
        score = score - mean
    inhibition = relu(score + delta).unsqueeze(-1)
    if signed:
        inhibited = relu(relu(seen_value) - inhibition) - relu(relu(-seen_value) - inhibition)
    else:
        inhibited = relu(seen_value - inhibition)
    return inhibited.masked_fill(~allowed.unsqueeze(-1), 0).sum(-2)


def inhibition(
    query: Tensor,
    key: Tensor,
    gamma: Tensor,
    delta: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    center: bool,
    scale: float,
) -> Tensor:
    """Z of shape (batch, heads, queries, keys), +inf where a query may not see a key; for looking at, not for speed."""
    groups = query.shape[1] // max(key.shape[1], 1)
    distance = torch.cdist(query.float(), key.repeat_interleave(groups, dim=1).float(), p=1.0)
    allowed = masks.dense(attn_mask, is_causal, query.shape[2], key.shape[2], query.device)
    gamma, delta = (_wide(parameter, distance.dtype).view(-1, 1, 1) for parameter in (gamma, delta))
    score = gamma * scale * distance.masked_fill(~allowed, 0)
    if center:
        score = score - score.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
    return relu(score + delta).masked_fill(~allowed, torch.inf)


def _wide(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in no less than that dtype, so that γ times the scale is not rounded as γ is."""
    return parameter.to(torch.promote_types(parameter.dtype, dtype))
