"""The public function: arguments checked once, a backend chosen in the open, the sum scaled."""

from typing import get_args

import torch
from torch import Tensor

from inhibitor.ops import backends, checks, masks, operator, reference
from inhibitor.ops.backends import Backend


def inhibitor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    eta: float | Tensor = 1.0,
    delta: float | Tensor = 0.0,
    length_exponent: float | Tensor = 0.0,
    reach: float | Tensor | None = None,
    center: bool = True,
    signed: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Attention by Manhattan distance and inhibition, in the place of ``scaled_dot_product_attention``.

    .. math::
        S_{ij} &= \gamma \cdot \text{scale} \cdot \textstyle\sum_k |Q_{ik} - K_{jk}| \\
        Z_{ij} &= \mathrm{ReLU}(S_{ij} - \mathrm{mean}_j S_{ij} + \delta) \\
        H_{il} &= \eta \, n_i^{-\rho} \textstyle\sum_j (V_{jl}^+ - Z_{ij})^+ + (V_{jl}^- + Z_{ij})^-

    The mean and the sum run over the :math:`n_i` keys that query i may see. What it may not see contributes exactly
    nothing, NaN included; a query that sees no key gets 0 and passes nothing of a finite gradient back. Source:
    InhibiDistilbert, arXiv 2503.15983; ρ is ours and 0 in the paper.

    With a reach τ, ours too, a key counts by how little it is inhibited: :math:`n_i` is then the number of keys that
    query i *hears*, :math:`\tfrac12 + \sum_j (1 - Z_{ij} / \tau)^+`, so that a query which picks out two keys among a
    thousand is scaled as one that sees two.

    Args:
        query: (batch, heads, queries, head_dim), float64, float32, bfloat16 or float16. Half precision is accumulated
            in float32 and rounded once.
        key: (batch, key heads, keys, head_dim), same dtype and device. Batch and heads of size 1 are broadcast.
        value: (batch, key heads, keys, value_dim), same dtype and device.
        gamma: γ, the slope of the score: a number or (heads,).
        eta: η, the scale of the result: a number, (heads,), or (batch, heads, queries), a gain for each query.
        delta: δ, the shift of the score: a number or (heads,).
        length_exponent: ρ, a number or (heads,): 0 gives a sum over keys, 1 a mean.
        reach: τ, finite and above 0: how far a key may be inhibited and still be heard, a number or (heads,). None
            counts all keys that a query may see.
        center: Whether the row's mean is subtracted from the scores.
        signed: False gives the unsigned form of the first paper (arXiv 2310.02041), ReLU(V − Z).
        attn_mask: Boolean, broadcastable to (batch, heads, queries, keys), True = may attend.
        is_causal: Query i sees keys 0 to i only, besides ``attn_mask``.
        scale: Factor of the distance; 1/√head_dim if None.
        enable_gqa: Let each key head serve heads ÷ key heads query heads.
        backend: ``"cpu"`` runs the native kernels, ``"triton"`` those for GPUs, ``"torch"`` runs in blocks on every
            device, ``"reference"`` is the equations written out, ``"auto"`` is what ``which_backend`` says.

    Returns:
        (batch, heads, queries, value_dim) in query's dtype.

    Raises:
        OperatorError: A shape, dtype, device, mask or name that does not fit; it says which and what to do.

    Example:
        >>> q = k = v = torch.ones(2, 4, 8, 16)
        >>> inhibitor_attention(q, k, v, length_exponent=1.0).shape
        torch.Size([2, 4, 8, 16])
    """
    checks.floating_point(query, key, value)
    checks.choices(is_causal=is_causal, center=center, signed=signed, backend=backend, backends=get_args(Backend))
    query, key, value, attn_mask = checks.aligned(query, key, value, attn_mask, enable_gqa)
    slope, shift = checks.per_head("gamma", gamma, query), checks.per_head("delta", delta, query)
    depth = None if reach is None else checks.reach(reach, query)
    scale = query.shape[3] ** -0.5 if scale is None else checks.number("scale", scale, "a number or None")

    arguments = (query, key, value, slope, shift, depth, attn_mask, is_causal, center, signed, scale)
    if backend == "reference":
        total = reference.attention(*arguments)
    else:
        checks.no_tangents("inhibitor_attention", *arguments[:6])
        total = operator.attention(*arguments, backends.resolve(backend, query, value))

    factor = None if isinstance(eta, int | float) and eta == 1.0 else checks.eta(eta, query)
    if isinstance(length_exponent, Tensor) or length_exponent != 0.0:
        exponent = checks.per_head("length_exponent", length_exponent, query).view(-1, 1, 1)
        if depth is None:
            length = masks.count(attn_mask, is_causal, query.shape[2], key.shape[2], query.device).clamp(min=1)
        else:
            length = total[..., -1:] / depth.view(-1, 1, 1) + masks.UNHEARD
        # In float64 on the CPU: float32's pow differs in the last bit with an element's place in memory.
        wide = torch.float64 if query.device.type == "cpu" else total.dtype
        weight = torch.pow(length.to(wide), -exponent.to(wide)).to(total.dtype)
        factor = weight if factor is None else factor * weight
    if depth is not None:
        total = total[..., :-1]
    return (total if factor is None else total * factor).to(query.dtype)
