"""The public function: arguments checked once, a backend chosen in the open, the sum scaled."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inhibitor.errors import OperatorError, suggestion
from inhibitor.ops import cpu, masks, operator, reference, triton

Backend = Literal["auto", "cpu", "triton", "torch", "reference"]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOT_INSTALLED = "the package was installed without its native kernels"
_NO_TRITON = "Triton is not installed"
UNHEARD = 0.5  # added to the number of keys that a query hears, so that where it is 0 there is a power of it


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Let ``torch.compile`` run a function while it traces, and keep the result.

    It does what ``torch.compiler.assume_constant_result`` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class BackendChoice:
    """What ``backend="auto"`` uses, and why."""

    name: str
    reason: str


def which_backend(query: Tensor | None = None, value: Tensor | None = None) -> BackendChoice:
    """Say which backend ``auto`` picks for tensors like these (default: float32 on the CPU, head_dim 64), and why.

    Example:
        >>> which_backend(torch.zeros(1, 1, 8, 64, dtype=torch.float64))
        BackendChoice(name='torch', reason='the native kernels do not take torch.float64')
    """
    query = torch.empty(1, 1, 1, 64, device="cpu") if query is None else query
    value = query if value is None else value
    name, missing = _pick(query, value)
    reason = f"native kernels for {cpu.instruction_set()}" if name == "cpu" else "fused kernels for GPUs"
    return BackendChoice(name, missing or reason)


def _pick(query: Tensor, value: Tensor) -> tuple[str, str]:
    """The backend of ``auto``, and what keeps a faster one from such tensors; empty if nothing does."""
    name = "triton" if query.device.type in triton.DEVICES else "cpu"
    missing = _WHY_NOT[name](query, value)
    return "torch" if missing else name, missing


def _why_not_cpu(query: Tensor, value: Tensor) -> str:
    """What keeps the native kernels from such tensors; empty if nothing does."""
    if query.device.type != "cpu":
        return f"there is no native kernel for {query.device.type}"
    return _why_not(query, value, cpu, "native") or ("" if cpu.INSTALLED else NOT_INSTALLED)


def _why_not_triton(query: Tensor, value: Tensor) -> str:
    """What keeps the Triton kernels from such tensors; empty if nothing does."""
    return why_no_triton(query.device) or _why_not(query, value, triton, "Triton")


def why_no_triton(device: torch.device) -> str:
    """What keeps Triton from a device; empty if nothing does."""
    if not triton.INSTALLED:
        return _NO_TRITON
    if device.type not in triton.DEVICES and not (device.type == "cpu" and _interpreted()):
        return f"there is no Triton kernel for {device.type}"
    return ""


def _why_not(query: Tensor, value: Tensor, backend: Any, name: str) -> str:
    if query.dtype not in backend.DTYPES:
        return f"the {name} kernels do not take {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > backend.LARGEST_DIM:
        return f"the {name} kernels take head_dim and value_dim up to {backend.LARGEST_DIM}"
    return ""


@constant_in_graphs
def _interpreted() -> bool:
    return triton.interpreted()


_WHY_NOT = {"cpu": _why_not_cpu, "triton": _why_not_triton}


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
    _check_tensors(query, key, value, enable_gqa)
    check_choices(is_causal=is_causal, center=center, signed=signed, backend=backend)
    batch = common(query.shape[0], key.shape[0], value.shape[0])
    key_heads = common(key.shape[1], value.shape[1])
    query = broadcast(query, batch, query.shape[1])
    key, value = broadcast(key, batch, key_heads), broadcast(value, batch, key_heads)
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    attn_mask = check_mask(attn_mask, (batch, heads, queries, keys), query.device)
    slope, shift = per_head("gamma", gamma, query), per_head("delta", delta, query)
    scale = query.shape[3] ** -0.5 if scale is None else number("scale", scale, "a number or None")

    depth = None if reach is None else positive_reach(reach, query)

    arguments = (query, key, value, slope, shift, depth, attn_mask, is_causal, center, signed, scale)
    if backend == "reference":
        total = reference.attention(*arguments)
    else:
        refuse_tangents("inhibitor_attention", *arguments[:6])
        total = operator.attention(*arguments, _resolve(backend, query, value))

    factor = None if isinstance(eta, int | float) and eta == 1.0 else scale_of(eta, query)
    if isinstance(length_exponent, Tensor) or length_exponent != 0.0:
        exponent = per_head("length_exponent", length_exponent, query).view(-1, 1, 1)
        if depth is None:
            length = masks.count(attn_mask, is_causal, queries, keys, query.device).clamp(min=1)
        else:
            length = total[..., -1:] / depth.view(-1, 1, 1) + UNHEARD
        # In float64 on the CPU: float32's pow differs in the last bit with an element's place in memory.
        wide = torch.float64 if query.device.type == "cpu" else total.dtype
        weight = torch.pow(length.to(wide), -exponent.to(wide)).to(total.dtype)
        factor = weight if factor is None else factor * weight
    if depth is not None:
        total = total[..., :-1]
    return (total if factor is None else total * factor).to(query.dtype)


def scale_of(eta: float | Tensor, query: Tensor) -> Tensor:
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


def positive_reach(reach: float | Tensor, query: Tensor) -> Tensor:
    """τ as (heads,); a number that is not finite and above 0 is refused, a tensor is not looked into."""
    if isinstance(reach, int | float) and not (reach > 0 and math.isfinite(reach)):
        expected = "a finite number above 0, or None"
        raise OperatorError("reach", expected=expected, got=repr(reach), remedy="Pass reach=None.")
    return per_head("reach", reach, query)


def _resolve(backend: Backend, query: Tensor, value: Tensor) -> str:
    """The backend that runs; one that was asked for by name is never replaced."""
    if backend == "torch":
        return backend
    if backend == "auto":
        name, missing = _pick(query, value)
        if missing == NOT_INSTALLED:
            _say_slow()
        return name
    missing = _WHY_NOT[backend](query, value)
    if missing:
        raise unavailable(backend, missing)
    return backend


def refuse_tangents(function: str, *tensors: Tensor | None) -> None:
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


def unavailable(backend: str, missing: str) -> OperatorError:
    """The error for a backend that was asked for by name and cannot serve the call."""
    return OperatorError(
        "backend",
        expected=f'tensors and an installation that "{backend}" can serve',
        got=missing,
        remedy={NOT_INSTALLED: cpu.INSTALL, _NO_TRITON: "pip install 'inhibitor-attention[triton]'."}.get(
            missing, 'Pass backend="auto".'
        ),
    )


@constant_in_graphs
def _say_slow() -> None:
    _warn_slow()


@functools.cache
def _warn_slow() -> None:
    warnings.warn(f"inhibitor_attention takes the slow way on the CPU: {NOT_INSTALLED}. {cpu.INSTALL}", stacklevel=5)


def common(*sizes: int) -> int:
    """The size that sizes agree on, where 1 is broadcast."""
    return next((size for size in sizes if size != 1), 1)


def broadcast(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """The tensor with that many batches and heads; itself where it has them."""
    same = tensor.shape[0] == batch and tensor.shape[1] == heads
    return tensor if same else tensor.expand(batch, heads, -1, -1)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(name, tensor)
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
    check_shapes(query, key, value, enable_gqa)


def check_dense(name: str, tensor: object) -> None:
    """Refuse what is not a dense tensor of four dimensions."""
    if not isinstance(tensor, Tensor):
        raise OperatorError(name, expected="a tensor", got=type(tensor).__name__, remedy="Pass a torch.Tensor.")
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


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Refuse tensors of four dimensions that do not fit each other."""
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
    batch = common(query.shape[0], key.shape[0], value.shape[0])
    if any(tensor.shape[0] not in (1, batch) for tensor in (query, key, value)):
        raise OperatorError(
            "batch",
            expected="equal sizes, or 1",
            got=f"{query.shape[0]}, {key.shape[0]} and {value.shape[0]} in query, key and value",
            remedy="Expand or select the rows so that they agree.",
        )
    _check_heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)


def _check_heads(heads: int, key_heads: int, value_heads: int, enable_gqa: bool) -> None:
    if value_heads != key_heads and 1 not in (key_heads, value_heads):
        raise OperatorError(
            "value", expected=f"key's {key_heads} heads", got=f"{value_heads} heads", remedy="Give both the same heads."
        )
    shared = common(key_heads, value_heads)
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


def check_choices(*, backend: object, backends: tuple[str, ...] = get_args(Backend), **flags: object) -> None:
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


def check_mask(attn_mask: Tensor | None, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
    """The mask with four dimensions, each 1 or that of ``shape``; the keys always in full."""
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        raise OperatorError(
            "attn_mask",
            expected="a boolean tensor, True = may attend",
            got=str(getattr(attn_mask, "dtype", type(attn_mask).__name__)),
            remedy="An additive mask means nothing to a distance: pass `additive_mask == 0` instead.",
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
