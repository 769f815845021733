"""Losses and errors between student and teacher, over real tokens only: padding never counts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def context_mse(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean squared error of self-attention outputs before the output projection (METHOD, E1 stage 1).

    Args:
        student: (batch, length, heads, value_dim).
        teacher: The same shape.
        attention_mask: (batch, length), nonzero for real tokens.
    """
    return _squared(student - teacher, attention_mask) / _entries(teacher, attention_mask)


def hidden_states_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Sum over layers of the mean squared error of hidden states (METHOD, E1 stage 2).

    Args:
        student: One (batch, length, hidden_size) per layer, embeddings excluded.
        teacher: The same number and shapes.
        attention_mask: (batch, length), nonzero for real tokens.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_squared(s - t, attention_mask) / _entries(t, attention_mask) for s, t in pairs]).sum()


def squared_errors(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """(2,) in float64: Σ(student − teacher)² and Σ teacher², to be added up over batches.

    Their ratio is the relative squared error: 0 for a perfect student, 1 for one that always says 0.
    """
    parts = (_squared(difference.double(), attention_mask) for difference in (student - teacher, teacher))
    return torch.stack(list(parts))


def _squared(values: Tensor, attention_mask: Tensor) -> Tensor:
    real = attention_mask.bool().view(*attention_mask.shape, *[1] * (values.dim() - 2))
    return values.masked_fill(~real, 0).square().sum()


def _entries(values: Tensor, attention_mask: Tensor) -> Tensor:
    """How many numbers belong to real tokens; 1 where there are none, so that an empty batch costs nothing."""
    return (attention_mask.count_nonzero() * values[0, 0].numel()).clamp(min=1)
