"""The PyTorch backend: any device, hand-written backward, work done tile by tile.

A tile is some heads × some queries × all keys × head_dim. Its size is fixed, so that no pass ever holds a
queries × keys tensor, let alone queries × keys × head_dim: beyond inputs and outputs the extra memory is one key,
value and query in the accumulation dtype and a few tiles. Scores are recomputed in the backward pass.

Half-precision inputs are accumulated in float32. The mathematics is in docs/operator.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inhibitor.ops import masks
from inhibitor.ops.masks import accumulation_dtype

CPU_TILE = 1 << 19  # elements per thread: 2 MiB of float32, a second-level cache
DEVICE_TILE = 1 << 25  # elements: enough to fill an accelerator


@dataclass(frozen=True)
class Options(masks.Options):
    """What a call of the float operator says beside its tensors."""

    scale: float


def forward(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, reach: Tensor | None, options: Options
) -> Tensor:
    """Sums of inhibited values, before η and the length exponent, in the accumulation dtype.

    With a reach τ, of one value more, which is τ for every key.
    """
    batch, heads, queries, _ = query.shape
    value_dim = value.shape[-1] + (reach is not None)
    dtype = accumulation_dtype(query.dtype)
    output = torch.zeros(batch * heads, queries, value_dim, dtype=dtype, device=query.device)
    poisoned = options.attn_mask is not None or options.is_causal
    poisoned = poisoned and not bool(torch.isfinite(value).all())
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(query, key, value, gamma, delta, reach, options):
            _, inhibition, forbidden = tile.inhibition()
            excess = torch.sub(tile.magnitude.unsqueeze(2), inhibition.unsqueeze(1), out=tile.buffer).clamp_min_(0)
            if poisoned and forbidden is not None:  # ∞ − ∞ and NaN would pass the comparison
                excess.masked_fill_(forbidden.unsqueeze(1), 0)
            inhibited = torch.matmul(excess, tile.sign.unsqueeze(-1)).squeeze(-1)
            output[tile.heads, tile.rows] = inhibited.transpose(1, 2)
    return output.view(batch, heads, queries, value_dim)


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
    """Gradients of query, key, value, γ, δ and τ for ``grad``, the gradient of ``forward``'s result.

    Without a τ its gradient is empty. Inner loops are sums of ± grad chosen by comparisons (METHOD, "Gradients"); ties
    take 0.
    """
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = value.shape[2:]
    dtype = accumulation_dtype(query.dtype)
    grad = grad.to(dtype).reshape(batch * heads, queries, grad.shape[-1])
    grad_query = grad.new_zeros(batch * heads, queries, head_dim)
    grad_key = grad.new_zeros(batch * heads, keys, head_dim)
    grad_value = grad.new_zeros(batch * heads, keys, grad.shape[-1])
    grad_gamma = grad.new_zeros(batch * heads)
    grad_delta = grad.new_zeros(batch * heads)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(query, key, value, gamma, delta, reach, options):
            distance, inhibition, forbidden = tile.inhibition()
            # Which values pass: [|V| > Z], as numbers, features × queries × keys.
            passes = torch.gt(tile.magnitude.unsqueeze(2), inhibition.unsqueeze(1), out=tile.buffer)
            grad_tile = grad[tile.heads, tile.rows]
            grad_value[tile.heads] += torch.matmul(grad_tile.mT.unsqueeze(2), passes).squeeze(2).mT
            passes.mul_(tile.sign.unsqueeze(2))
            grad_inhibition = torch.matmul(grad_tile.unsqueeze(2), passes.transpose(1, 2)).squeeze(2).neg_()

            grad_score = grad_inhibition.masked_fill_(inhibition == 0, 0)
            grad_delta[tile.heads] += grad_score.sum((1, 2))
            if options.center:
                share = _row_mean(grad_score, forbidden)
                grad_score.sub_(share)
                if forbidden is not None:
                    grad_score.masked_fill_(forbidden, 0)
            grad_gamma[tile.heads] += torch.sum(grad_score * distance, (1, 2)).mul_(options.scale)
            grad_score.mul_(tile.slope)
            left, right = torch.nan_to_num(tile.query), torch.nan_to_num(tile.key)
            grad_query[tile.heads, tile.rows] = _grad_distance(grad_score, left, right, distance)
            grad_key[tile.heads] += _grad_distance(grad_score.mT.contiguous(), right, left, distance.mT.contiguous())
    groups = (batch, key.shape[1], heads // max(key.shape[1], 1))
    if reach is None:
        grad_reach = gamma.new_zeros(0)
    else:
        grad_value, of_heard = grad_value[..., :-1], grad_value[..., -1]
        grad_reach = of_heard.sum(-1).view(batch, heads).sum(0).to(reach.dtype)
    return (
        grad_query.view(query.shape).to(query.dtype),
        grad_key.view(*groups, keys, head_dim).sum(2).to(key.dtype),
        grad_value.reshape(*groups, keys, value_dim).sum(2).to(value.dtype),
        grad_gamma.view(batch, heads).sum(0).to(gamma.dtype),
        grad_delta.view(batch, heads).sum(0).to(delta.dtype),
        grad_reach,
    )


@dataclass(frozen=True)
class _Tile:
    """Some heads and rows of a call; ``g`` heads, ``r`` rows, ``m`` keys."""

    heads: slice
    rows: slice
    query: Tensor  # (g, r, head_dim)
    key: Tensor  # (g, m, head_dim)
    magnitude: Tensor  # (g, value_dim, m): |V|, or V in the unsigned form
    sign: Tensor  # (g, value_dim, m): the sign of V, or 1
    slope: Tensor  # (g, 1, 1): γ · scale
    delta: Tensor  # (g, 1, 1)
    forbidden: Tensor | None  # (g, r, m), True where a query may not see a key
    center: bool
    buffer: Tensor  # (g, value_dim, r, m)

    def inhibition(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Distances Σ|q−k| (0 where forbidden), Z (+inf there), and where that is."""
        distance = torch.cdist(self.query, self.key, p=1.0)
        if self.forbidden is not None:
            distance.masked_fill_(self.forbidden, 0)
        score = distance * self.slope
        if self.center:
            score.sub_(_row_mean(score, self.forbidden))
        score.add_(self.delta).clamp_min_(0)
        if self.forbidden is not None:
            score.masked_fill_(self.forbidden, torch.inf)
        return distance, score, self.forbidden


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, reach: Tensor | None, options: Options
) -> Iterator[_Tile]:
    batch, heads, queries, head_dim = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    value_dim += reach is not None
    total, groups, device = batch * heads, heads // max(key_heads, 1), query.device
    dtype = accumulation_dtype(query.dtype)
    if not (total and queries and keys):
        return

    limit = CPU_TILE * torch.get_num_threads() if device.type == "cpu" else DEVICE_TILE
    row_size = keys * max(value_dim, head_dim)
    rows_per_tile = min(queries, max(1, limit // row_size))
    heads_per_tile = min(total, max(1, limit // (rows_per_tile * row_size)))
    buffer = torch.empty(heads_per_tile * value_dim * rows_per_tile * keys, dtype=dtype, device=device)

    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    slope = (gamma.to(dtype) * options.scale).repeat(batch).view(-1, 1, 1)
    shift = delta.to(dtype).repeat(batch).view(-1, 1, 1)
    heard = None if reach is None else reach.to(dtype).repeat(batch).view(-1, 1, 1)
    for first in range(0, total, heads_per_tile):
        chosen = slice(first, min(first + heads_per_tile, total))
        size = chosen.stop - first
        index = torch.arange(first, chosen.stop, device=device)
        shared = chosen if groups == 1 else torch.div(index, groups, rounding_mode="floor")
        tile_key = key[shared].to(dtype).contiguous()
        transposed = value[shared].to(dtype).mT.contiguous()
        if heard is not None:
            transposed = torch.cat([transposed, heard[chosen].expand(-1, 1, keys)], 1)
        if options.signed:
            magnitude, sign = transposed.abs(), transposed.sign().nan_to_num_(nan=1.0)
        else:
            magnitude, sign = transposed, torch.ones_like(transposed)
        for top in range(0, queries, rows_per_tile):
            rows = slice(top, min(top + rows_per_tile, queries))
            shape = (size, value_dim, rows.stop - top, keys)
            yield _Tile(
                heads=chosen,
                rows=rows,
                query=query[chosen, rows].to(dtype).contiguous(),
                key=tile_key,
                magnitude=magnitude,
                sign=sign,
                slope=slope[chosen],
                delta=shift[chosen],
                forbidden=_forbidden(options, index, heads, rows, keys),
                center=options.center,
                buffer=buffer[: size * value_dim * (rows.stop - top) * keys].view(shape),
            )


def _forbidden(options: Options, index: Tensor, heads: int, rows: slice, keys: int) -> Tensor | None:
    """The part of the mask that a tile needs, inverted: (g, r, m)."""
    forbidden = None
    if options.attn_mask is not None:
        mask = options.attn_mask
        batch_index = torch.div(index, heads, rounding_mode="floor") if mask.shape[0] > 1 else torch.zeros_like(index)
        head_index = index % heads if mask.shape[1] > 1 else torch.zeros_like(index)
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        forbidden = ~part[batch_index, head_index]
    if options.is_causal:
        row = torch.arange(rows.start, rows.stop, device=index.device)
        future = torch.arange(keys, device=index.device) > row.unsqueeze(-1)
        forbidden = future if forbidden is None else forbidden | future
    return None if forbidden is None else forbidden.expand(len(index), rows.stop - rows.start, keys)


def _row_mean(scores: Tensor, forbidden: Tensor | None) -> Tensor:
    """Mean over the allowed keys of a row; ``scores`` is 0 where forbidden."""
    if forbidden is None:
        return scores.mean(-1, keepdim=True)
    allowed = forbidden.shape[-1] - forbidden.sum(-1, keepdim=True)
    return scores.sum(-1, keepdim=True) / allowed.clamp(min=1)


def _grad_distance(grad: Tensor, left: Tensor, right: Tensor, distance: Tensor) -> Tensor:
    """Σ_j grad_ij · sign(left_i − right_j): the gradient of ``cdist(left, right, p=1)`` for ``left``."""
    result: Tensor = torch.ops.aten._cdist_backward(grad, left, right, 1.0, distance)
    return result
