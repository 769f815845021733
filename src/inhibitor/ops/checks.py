"""What a call may look like: each argument checked once, by name, and brought to one form."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inhibitor.errors import OperatorError, suggestion

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating_point(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that are not dense, of four dimensions and of one floating-point dtype."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        dense(name, tensor)
        if tensor.dtype not in FLOATS:
            raise OperatorError(
                name,
                expected="float64, float32, bfloat16 or float16",
                got=str(tensor.dtype),
                remedy="Convert it with .to(torch.float32).",
            )
        if tensor.dtype != query.dtype:
            raise OperatorError(
                name, expected=f"query's dtype {query.dtype}", got=str(tensor.dtype), remedy="Convert one of them."
            )


def dense(name: str, tensor: object) -> None:
    """Refuse what is not a dense tensor of four dimensions."""
    if not isinstance(tensor, Tensor):
        raise OperatorError(name, expected="a tensor", got=type(tensor).__name__, remedy="Pass a torch.Tensor.")
    if tensor.is_nested:
        remedy = "Pad it with torch.nested.to_padded_tensor, and hide the padding with attn_mask."
        raise OperatorError(name, expected="a dense tensor", got="a nested one", remedy=remedy)
    if tensor.dim() != 4:
        raise OperatorError(
            name,
            expected="4 dimensions (batch, heads, length, features)",
            got=f"shape {tuple(tensor.shape)}",
            remedy="Add the missing dimensions with unsqueeze or split the heads.",
        )
    if tensor.layout != torch.strided:
        raise OperatorError(
            name, expected="a dense tensor", got=f"layout {tensor.layout}", remedy="Convert it with .to_dense()."
        )


def aligned(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Dense tensors with batch and heads in full, and the mask with four dimensions; or an error."""
    _fitting(query, key, value, enable_gqa)
    batch = _common(query.shape[0], key.shape[0], value.shape[0])
    key_heads = _common(key.shape[1], value.shape[1])
    query = _broadcast(query, batch, query.shape[1])
    key, value = _broadcast(key, batch, key_heads), _broadcast(value, batch, key_heads)
    return query, key, value, mask(attn_mask, (*query.shape[:3], key.shape[2]), query.device)


def _fitting(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device != query.device:
            raise OperatorError(
                name, expected=f"query's device {query.device}", got=str(tensor.device), remedy="Move one of them."
            )
        if tensor.shape[3] == 0:
            raise OperatorError(
                name,
                expected="at least one feature",
                got=f"shape {tuple(tensor.shape)}",
                remedy="Check the head split.",
            )
    if key.shape[3] != query.shape[3]:
        raise OperatorError(
            "key",
            expected=f"query's head_dim {query.shape[3]} in its last dimension",
            got=f"shape {tuple(key.shape)}",
            remedy="Project both to the same size.",
        )
    if value.shape[2] != key.shape[2]:
        raise OperatorError(
            "value",
            expected=f"one row for each of the {key.shape[2]} keys",
            got=f"shape {tuple(value.shape)}",
            remedy="Pass the values of those keys.",
        )
    batch = _common(query.shape[0], key.shape[0], value.shape[0])
    if any(tensor.shape[0] not in (1, batch) for tensor in (query, key, value)):
        raise OperatorError(
            "batch",
            expected="equal sizes, or 1",
            got=f"{query.shape[0]}, {key.shape[0]} and {value.shape[0]} in query, key and value",
            remedy="Expand or select the rows so that they agree.",
        )
    _heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)


def _heads(heads: int, key_heads: int, value_heads: int, enable_gqa: bool) -> None:
    if value_heads != key_heads and 1 not in (key_heads, value_heads):
        raise OperatorError(
            "value", expected=f"key's {key_heads} heads", got=f"{value_heads} heads", remedy="Give both the same heads."
        )
    shared = _common(key_heads, value_heads)
    name = "key" if key_heads == shared else "value"
    if shared in (heads, 1):
        return
    if not enable_gqa:
        remedy = "Pass enable_gqa=True." if shared and heads % shared == 0 else "Check the head split."
        raise OperatorError(name, expected=f"query's {heads} heads, or 1", got=f"{shared} heads", remedy=remedy)
    if shared == 0 or heads % shared:
        raise OperatorError(
            name,
            expected=f"a number of heads that divides query's {heads}",
            got=f"{shared} heads",
            remedy="Grouped-query attention shares each key head among equally many query heads.",
        )


def _common(*sizes: int) -> int:
    """The size that sizes agree on, where 1 is broadcast."""
    return next((size for size in sizes if size != 1), 1)


def _broadcast(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """The tensor with that many batches and heads; itself where it has them."""
    same = tensor.shape[0] == batch and tensor.shape[1] == heads
    return tensor if same else tensor.expand(batch, heads, -1, -1)


def choices(*, backend: object, backends: tuple[str, ...], **flags: object) -> None:
    """Refuse a flag that is no bool, and a backend that is not among those."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | torch.SymBool):
            raise OperatorError(
                name,
                expected="True or False",
                got=type(flag).__name__,
                remedy="Pass a bool; a mask belongs in attn_mask.",
            )
    if backend not in backends:
        raise OperatorError(
            "backend",
            expected="one of " + ", ".join(backends),
            got=repr(backend),
            remedy=suggestion(str(backend), backends),
        )


def mask(attn_mask: Tensor | None, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
    """The mask with four dimensions, each 1 or that of ``shape``; the keys always in full."""
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        additive = isinstance(attn_mask, Tensor) and attn_mask.is_floating_point()
        raise OperatorError(
            "attn_mask",
            expected="a boolean tensor, True = may attend",
            got=str(getattr(attn_mask, "dtype", type(attn_mask).__name__)),
            remedy="An additive mask means nothing to a distance: pass `additive_mask == 0` instead."
            if additive
            else "A tokenizer's mask, 1 = may attend, becomes `mask.bool()`.",
        )
    if attn_mask.device != device:
        raise OperatorError(
            "attn_mask", expected=f"query's device {device}", got=str(attn_mask.device), remedy="Move it there."
        )
    fits = attn_mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise OperatorError(
            "attn_mask",
            expected=f"a shape that broadcasts to (batch, heads, queries, keys) = {shape}",
            got=f"shape {tuple(attn_mask.shape)}",
            remedy="A padding mask of shape (batch, keys) becomes mask[:, None, None, :].",
        )
    padded = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    return padded.expand(-1, -1, -1, shape[3])


def no_tangents(function: str, *tensors: Tensor | None) -> None:
    """Refuse a call whose tangents the backend would lose without a word: forward-mode differentiation."""
    if forward_ad._current_level < 0:  # outside of it, which unpack_dual takes much longer to say
        return
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if any(tensor is not None and unpack(tensor).tangent is not None for tensor in tensors):
        raise OperatorError(
            function,
            expected="a call without forward-mode differentiation",
            got="a tangent",
            remedy='Only inhibitor_attention with backend="reference" has forward-mode derivatives.',
        )


def per_head(name: str, parameter: float | Tensor, query: Tensor) -> Tensor:
    """A parameter as (heads,) on query's device; a number in at least float32, a tensor in the dtype that it has."""
    heads = query.shape[1]
    if not isinstance(parameter, Tensor):
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        single = number(name, parameter, f"a number or a floating-point tensor of shape ({heads},)")
        return torch.full((heads,), single, dtype=dtype, device=query.device)
    if not parameter.is_floating_point() or parameter.shape not in ((), (1,), (heads,)):
        raise OperatorError(
            name,
            expected=f"a number or a floating-point tensor of shape ({heads},)",
            got=f"{parameter.dtype} of shape {tuple(parameter.shape)}",
            remedy="Give one value, or one for each query head.",
        )
    if parameter.device != query.device:
        raise OperatorError(
            name, expected=f"query's device {query.device}", got=str(parameter.device), remedy="Move it there."
        )
    return parameter.expand(heads)


def number(name: str, given: object, expected: str) -> float:
    """The number as a float."""
    if not isinstance(given, int | float | torch.SymFloat):
        raise OperatorError(name, expected=expected, got=repr(given), remedy="Convert it with float().")
    return float(given)


def eta(eta: float | Tensor, query: Tensor) -> Tensor:
    """η so that it multiplies (batch, heads, queries, value_dim); a number in at least float32, a tensor as it is."""
    if not isinstance(eta, Tensor) or eta.dim() < 3:
        return per_head("eta", eta, query).view(-1, 1, 1)
    if eta.shape != query.shape[:3] or not eta.is_floating_point() or eta.device != query.device:
        raise OperatorError(
            "eta",
            expected=f"a floating-point tensor of shape {tuple(query.shape[:3])} on {query.device}",
            got=f"{eta.dtype} of shape {tuple(eta.shape)} on {eta.device}",
            remedy="Give one value, one for each query head, or one for each query of each head.",
        )
    return eta.unsqueeze(-1)


def reach(reach: float | Tensor, query: Tensor) -> Tensor:
    """τ as (heads,); a number that is not finite and above 0 is refused, a tensor is not looked into."""
    if isinstance(reach, int | float) and not (reach > 0 and math.isfinite(reach)):
        expected = "a finite number above 0, or None"
        raise OperatorError("reach", expected=expected, got=repr(reach), remedy="Pass reach=None.")
    return per_head("reach", reach, query)
