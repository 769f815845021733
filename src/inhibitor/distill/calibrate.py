"""Fit γ, η, δ and ρ of each head to the teacher before any training: a grid for two, closed form for the others.

With queries, keys and values as the teacher has them, the student's context is η · n^(−ρ) · H(γ, δ). For given γ and
δ, and each ρ of a short list, the best η is a ratio of inner products; γ and δ are searched on a grid, then refined.
All heads are tried at once, each with values of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inhibitor.models.attention import InhibitorAttention, Tapped
from inhibitor.ops import inhibitor_attention

GAMMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DELTAS = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
EXPONENTS = tuple(step / 10 for step in range(13))
REFINEMENTS = 4


@dataclass
class _Fit:
    """The best found so far, each (heads,)."""

    error: Tensor
    gamma: Tensor
    delta: Tensor
    eta: Tensor
    length_exponent: Tensor

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
    best = _try(attention, samples, start * GAMMAS[0], start * DELTAS[0], shared)
    for gamma in GAMMAS:
        for delta in DELTAS:
            best.improve(_try(attention, samples, start * gamma, start * delta, shared), shared=shared)
    for refinement in range(1, REFINEMENTS + 1):
        factor, shift = 2 ** (0.5**refinement), 0.5**refinement
        slope, offset = best.gamma, best.delta
        moves = ((slope * factor, offset), (slope / factor, offset), (slope, offset + shift), (slope, offset - shift))
        for move in moves:
            best.improve(_try(attention, samples, *move, shared), shared=shared)
    for name, parameter in attention.named_parameters():
        parameter.copy_(getattr(best, name)[: len(parameter)])


def _try(attention: InhibitorAttention, samples: Sequence[Tapped], gamma: Tensor, delta: Tensor, shared: bool) -> _Fit:
    """The error of γ and δ, (heads,), with the best η for each ρ; the best of these."""
    lengths = torch.tensor([float(sample.key.shape[2]) for sample in samples])
    products = torch.stack([_products(attention, sample, gamma, delta) for sample in samples])  # (samples, 3, heads)
    fits = []
    for exponent in EXPONENTS:
        weight = lengths.pow(-exponent).to(products).unsqueeze(-1)
        cross = (weight * products[:, 0]).sum(0)
        square = (weight.square() * products[:, 1]).sum(0)
        if shared:
            cross, square = cross.sum().expand_as(cross), square.sum().expand_as(square)
        eta = cross / square.clamp(min=torch.finfo(square.dtype).tiny)
        own_square = (weight.square() * products[:, 1]).sum(0)
        own_cross = (weight * products[:, 0]).sum(0)
        error = products[:, 2].sum(0) - 2 * eta * own_cross + eta.square() * own_square
        fits.append(_Fit(error, gamma, delta, eta, torch.full_like(eta, exponent)))
    best = fits[0]
    for fit in fits[1:]:
        best.improve(fit, shared=shared)
    return best


def _products(attention: InhibitorAttention, sample: Tapped, gamma: Tensor, delta: Tensor) -> Tensor:
    """⟨H, C⟩, ⟨H, H⟩ and ⟨C, C⟩ by head, for the unscaled student context H and the teacher's C: (3, heads)."""
    context = inhibitor_attention(
        sample.query,
        sample.key,
        sample.value,
        gamma=gamma,
        delta=delta,
        center=attention.config.center,
        signed=attention.config.signed,
        attn_mask=sample.attn_mask,
        is_causal=sample.is_causal,
        scale=sample.scale,
        enable_gqa=sample.key.shape[1] != sample.query.shape[1],
    )
    target = sample.context.transpose(1, 2)
    pairs = ((context, target), (context, context), (target, target))
    return torch.stack([(left * right).sum((0, 2, 3)) for left, right in pairs])
