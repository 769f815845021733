"""Fit γ, η, δ, ρ and τ of each head to the teacher before any training: a grid for most, closed form for η.

With queries, keys and values as the teacher has them, the student's context is η · n^(−ρ) · H(γ, δ), where n is the
number of keys that a query sees, or of those that it hears, which depends on τ. For given γ and δ, and each ρ and τ of
short lists, the best η is a ratio of inner products; γ and δ are searched on a grid, then refined. Where no row's mean
is subtracted from its scores, δ is searched around the mean of all. All heads are tried at once, each with values of
its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inhibitor.models.attention import PARAMETERS, InhibitorAttention, Tapped
from inhibitor.ops import inhibitor_attention
from inhibitor.ops.masks import UNHEARD
from inhibitor.ops.reference import inhibition

GAMMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DELTAS = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
EXPONENTS = tuple(step / 10 for step in range(13))
REACHES = (0.5, 1.0, 2.0, 4.0)  # as a share of the head's mean |V|
REFINEMENTS = 4


@dataclass
class _Fit:
    """The best found so far, each (heads,)."""

    error: Tensor
    gamma: Tensor
    delta: Tensor
    eta: Tensor
    length_exponent: Tensor
    reach: Tensor

    def improve(self, other: "_Fit", *, shared: bool) -> None:
        """Take over what is better, head by head or for the layer as a whole."""
        better = other.error.sum() < self.error.sum() if shared else other.error < self.error
        for name in vars(self):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


@torch.no_grad()
def calibrate(attention: InhibitorAttention, samples: Sequence[Tapped]) -> None:
    """Set the parameters of one layer to those that bring its context nearest to the teacher's.

    Args:
        attention: The student's layer.
        samples: What passed through the teacher's layer, without padding, at several lengths.
    """
    heads = samples[0].query.shape[1]
    shared = attention.config.per == "layer"
    start = samples[0].query.new_ones(heads)
    reaches = _reaches(samples, heads, shared=shared) if attention.reach is not None else start.new_empty(0, heads)

    mean = start.new_zeros(heads) if attention.config.center else _mean_score(samples, shared=shared)

    def attempt(gamma: Tensor, delta: Tensor) -> _Fit:
        delta = delta - gamma * mean
        return _fit(
            [_sums(attention, sample, gamma, delta, reaches) for sample in samples], gamma, delta, reaches, shared
        )

    best = attempt(start * GAMMAS[0], start * DELTAS[0])
    for gamma in GAMMAS:
        for delta in DELTAS:
            best.improve(attempt(start * gamma, start * delta), shared=shared)
    for refinement in range(1, REFINEMENTS + 1):
        factor, shift = 2 ** (0.5**refinement), 0.5**refinement
        slope, offset = best.gamma, best.delta + best.gamma * mean
        moves = ((slope * factor, offset), (slope / factor, offset), (slope, offset + shift), (slope, offset - shift))
        for move in moves:
            best.improve(attempt(*move), shared=shared)
    for name in PARAMETERS:
        parameter = getattr(attention, name)
        if parameter is not None:
            parameter.copy_(getattr(best, name)[: len(parameter)])


def _reaches(samples: Sequence[Tapped], heads: int, *, shared: bool) -> Tensor:
    """The values of τ to try, (reaches, heads)."""
    sizes = torch.stack([sample.value.abs().mean((0, 2, 3)) for sample in samples]).mean(0)
    sizes = (sizes.mean().expand_as(sizes) if shared else sizes).repeat_interleave(heads // len(sizes))
    return torch.tensor(REACHES).to(sizes).unsqueeze(-1) * sizes


def _mean_score(samples: Sequence[Tapped], *, shared: bool) -> Tensor:
    """The mean of the scores at γ = 1, (heads,): what δ takes off where no row's own mean is subtracted."""
    ones, means = samples[0].query.new_ones(samples[0].query.shape[1]), []
    for sample in samples:
        scores = inhibition(
            sample.query, sample.key, ones, 0 * ones, sample.attn_mask, sample.is_causal, False, sample.scale
        )
        seen = scores.isfinite()
        means.append(scores.where(seen, 0).sum((0, 2, 3)) / seen.sum((0, 2, 3)))
    mean = torch.stack(means).mean(0)
    return mean.mean().expand_as(mean) if shared else mean


@dataclass(frozen=True)
class _Sums:
    """What an error is made of, for the unscaled student context H and the teacher's C; q queries of one sample."""

    cross: Tensor  # ⟨H, C⟩, (heads, q)
    square: Tensor  # ⟨H, H⟩, (heads, q)
    target: Tensor  # ⟨C, C⟩, (heads,)
    length: Tensor  # n, (reaches or 1, heads, q)


def _fit(found: Sequence[_Sums], gamma: Tensor, delta: Tensor, reaches: Tensor, shared: bool) -> _Fit:
    """The error of γ and δ with the best η for each ρ and τ; the best of these."""
    cross, square, length = (
        torch.cat([getattr(sums, name) for sums in found], -1) for name in ("cross", "square", "length")
    )
    target = torch.stack([sums.target for sums in found]).sum(0)
    fits = []
    for exponent in EXPONENTS:
        weight = length.pow(-exponent)
        own_cross, own_square = (weight * cross).sum(-1), (weight.square() * square).sum(-1)  # (reaches or 1, heads)
        sums = [own_cross, own_square]
        if shared:
            sums = [each.sum(-1, keepdim=True).expand_as(each) for each in sums]
        eta = sums[0] / sums[1].clamp(min=torch.finfo(square.dtype).tiny)
        error = target - 2 * eta * own_cross + eta.square() * own_square
        for index in range(len(error)):
            reach = reaches[index] if len(reaches) else gamma
            exponents = torch.full_like(gamma, exponent)
            fits.append(_Fit(error[index], gamma, delta, eta[index], exponents, reach))
    best = fits[0]
    for fit in fits[1:]:
        best.improve(fit, shared=shared)
    return best


def _sums(attention: InhibitorAttention, sample: Tapped, gamma: Tensor, delta: Tensor, reaches: Tensor) -> _Sums:
    """Of a constant value τ inhibition leaves Σ_j (τ − Z_ij)⁺, so one call gives the keys that are heard for all τ."""
    heads = sample.query.shape[1]
    key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (sample.key, sample.value))
    columns = reaches.mT.view(1, heads, 1, -1).expand(len(value), heads, value.shape[2], -1)
    found = inhibitor_attention(
        sample.query,
        key,
        torch.cat([value, columns.to(value)], -1),
        gamma=gamma,
        delta=delta,
        center=attention.config.center,
        signed=attention.config.signed,
        attn_mask=sample.attn_mask,
        is_causal=sample.is_causal,
        scale=sample.scale,
    ).transpose(0, 1)  # (heads, batch, queries, value_dim and reaches)
    context, target = found[..., : value.shape[3]], sample.context.permute(2, 0, 1, 3)
    cross, square = (context * target).sum(-1).flatten(1), context.square().sum(-1).flatten(1)
    if len(reaches):
        heard = found[..., value.shape[3] :].flatten(1, 2).permute(2, 0, 1)
        length = heard.clamp(min=0) / reaches.unsqueeze(-1) + UNHEARD
    else:
        length = torch.full_like(cross, value.shape[2]).unsqueeze(0)
    return _Sums(cross, square, target.square().flatten(1).sum(-1), length)
