"""What backends share: what a call says beside its tensors, which keys a query may then see, the dtype of sums."""

from dataclasses import dataclass

import torch
from torch import Tensor

UNHEARD = 0.5  # added to the number of keys that a query hears, so that where it is 0 there is a power of it


@dataclass(frozen=True)
class Options:
    """What a call says beside its tensors."""

    attn_mask: Tensor | None  # boolean, broadcastable to (batch, heads, queries, keys), True = may attend
    is_causal: bool
    center: bool
    signed: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dense(attn_mask: Tensor | None, is_causal: bool, queries: int, keys: int, device: torch.device) -> Tensor:
    """The whole rule as one boolean tensor, broadcastable to (batch, heads, queries, keys).

    Causal is aligned to the top left as in ``scaled_dot_product_attention``: query i sees keys 0 to i.
    """
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed.tril()
    return allowed if attn_mask is None else allowed & attn_mask


def count(attn_mask: Tensor | None, is_causal: bool, queries: int, keys: int, device: torch.device) -> Tensor:
    """How many keys each query may see: integers, broadcastable to (batch, heads, queries, 1)."""
    if attn_mask is None:
        if not is_causal:
            return torch.full((1, 1, 1, 1), keys, device=device)
        return torch.arange(1, queries + 1, device=device).clamp(max=keys).view(1, 1, queries, 1)
    if not is_causal:
        return attn_mask.sum(-1, keepdim=True)
    if attn_mask.shape[-2] == 1:  # a padding mask: running counts spare the queries × keys square
        running = torch.nn.functional.pad(attn_mask.expand(*attn_mask.shape[:-1], keys).cumsum(-1), (1, 0))
        seen = torch.arange(1, queries + 1, device=device).clamp(max=keys)
        return running[..., seen].transpose(-1, -2)
    return dense(attn_mask, is_causal, queries, keys, device).sum(-1, keepdim=True)
