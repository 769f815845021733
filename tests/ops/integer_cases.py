"""Calls of the integer operator: codes and grids for the cases of the float operator."""

from collections.abc import Sequence
from typing import Any

import torch

from inhibitor import IntegerGrid
from inhibitor.ops import integer_attention
from tests.ops.cases import Case, mask

SLOPES = (0.07, 0.9, 0.003, 130.0)  # a of one head after the other: shifts of 19, 16, 24 and 8
REACHES = (40, 200, 1, 255)  # likewise, in steps of the value


def codes(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query, key and value of a case on their grids, every code possible."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    query = integers(0, 256, case.batch, case.heads, case.queries, case.head_dim)
    key = integers(0, 256, case.batch, case.key_heads, case.keys, case.head_dim)
    value = integers(-127, 128, case.batch, case.key_heads, case.keys, case.value_dim)
    return query.to(torch.uint8), key.to(torch.uint8), value.to(torch.int8)


def grid_of(case: Case, seed: int = 0) -> IntegerGrid:
    """A grid with another slope and threshold for every head, and steps for every key head."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.02 + 0.02 * torch.rand(2, case.key_heads, generator=generator)
    slope = torch.tensor(SLOPES).repeat(case.heads)[: case.heads]
    group = case.heads // case.key_heads
    gamma = slope * steps[1].repeat_interleave(group) / steps[0].repeat_interleave(group)
    # A part of the distances' spread, which grows with the root of head_dim: some z are 0, some 255, most between.
    delta = (torch.rand(case.heads, generator=generator) - 0.3) * 100 * case.head_dim**0.5 * slope * steps[1].max()
    reach = torch.tensor(REACHES).repeat(case.heads)[: case.heads] * steps[1].repeat_interleave(group)
    return IntegerGrid.of(steps[0], steps[1], gamma, delta, scale=1.0, reach=reach if case.reach else None)


def attend(tensors: Sequence[torch.Tensor], grid: IntegerGrid, **options: Any) -> torch.Tensor:
    """``integer_attention`` of query, key and value."""
    query, key, value = tensors
    return integer_attention(query, key, value, grid, **options)


def options_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """What a case says beside its tensors."""
    return {
        "attn_mask": mask(case, torch.Generator().manual_seed(seed)),
        "is_causal": case.is_causal,
        "center": case.center,
        "signed": case.signed,
        "enable_gqa": case.key_heads not in (1, case.heads),
    }


def floats_of(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Normal query, key and value; the grid of a case clips some of them."""
    query, key, value = codes(case)
    found = []
    for seed, x in enumerate((query, key, value)):
        generator = torch.Generator().manual_seed(seed)
        found.append((1.5 * torch.randn(x.shape, generator=generator)).to(dtype))
    return tuple(found)
