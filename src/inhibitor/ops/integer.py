"""The public functions of the integer operator: arguments checked once, a backend chosen in the open, one rescale."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import backends, checks, integer_cpu, integer_operator, masks, triton
from inhibitor.ops.backends import BackendChoice
from inhibitor.ops.integer_grid import IntegerGrid
from inhibitor.ops.integer_reference import Scale

IntegerBackend = Literal["auto", "cpu", "triton", "reference"]
LARGEST_DIM = 256  # of head_dim: a distance then fits 16 bits
MOST_KEYS = 1 << 17  # the sum of so many values is below 2²⁴
CODES = (torch.uint8, torch.uint8, torch.int8)  # of query, key and value on their grids


def which_integer_backend(query: Tensor | None = None) -> BackendChoice:
    """Say which backend ``auto`` picks for tensors like this (default: on the CPU), and why.

    Example:
        >>> which_integer_backend(torch.zeros(1, 1, 8, 64, device="meta"))
        BackendChoice(name='reference', reason='there is no native integer kernel for meta')
    """
    name, missing = _pick(torch.device("cpu") if query is None else query.device)
    reason = f"native kernels for {integer_cpu.instruction_set()}" if name == "cpu" else "fused kernels for GPUs"
    return BackendChoice(name, missing or reason)


def _pick(device: torch.device) -> tuple[str, str]:
    """The backend of ``auto``, and what keeps a faster one from a device; empty if nothing does."""
    name = "triton" if device.type in triton.DEVICES else "cpu"
    missing = _WHY_NOT[name](device)
    return "reference" if missing else name, missing


def _why_not_cpu(device: torch.device) -> str:
    """What keeps the native kernels from a device; empty if nothing does."""
    if device.type != "cpu":
        return f"there is no native integer kernel for {device.type}"
    return "" if integer_cpu.INSTALLED else backends.NOT_INSTALLED


_WHY_NOT: dict[str, Callable[[torch.device], str]] = {"cpu": _why_not_cpu, "triton": backends.why_no_triton}


def check_backend(name: str, device: torch.device) -> str:
    """The backend that was asked for by name, which is never replaced; an error if it cannot serve the device."""
    missing = "" if name == "reference" else _WHY_NOT[name](device)
    if missing:
        raise backends.unavailable(name, missing)
    return name


def integer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: IntegerGrid,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    center: bool = True,
    signed: bool = True,
    enable_gqa: bool = False,
    backend: IntegerBackend = "auto",
) -> Tensor:
    r"""The sum of inhibited values in integers, the same to the last bit from every backend.

    .. math::
        D_{ij} &= \textstyle\sum_k |q_{ik} - k_{jk}| \\
        z_{ij} &= \min(255, \max(D_{ij} - \mathrm{mean}_j D_{ij} + \theta, 0) \cdot m \cdot 2^{-r}) \\
        H_{il} &= \textstyle\sum_j \mathrm{sign}(v_{jl}) \max(|v_{jl}| - z_{ij}, 0)

    The roundings, the bounds and their proofs are in docs/integer.md. With a reach of w steps the result has one
    feature more, :math:`\sum_j \max(w - z_{ij}, 0)`.

    Args:
        query: (batch, heads, queries, head_dim), uint8 as ``quantize_query_key`` makes it, or floating point, which is
            put on the grid on the way. head_dim is 256 at most.
        key: (batch, key heads, keys, head_dim), likewise; 2¹⁷ keys at most. Batch and heads of size 1 are broadcast.
        value: (batch, key heads, keys, value_dim), int8 as ``quantize_value`` makes it (−128 is read as −127), or
            floating point as query is. value_dim is 256 at most.
        grid: Of query's heads; the heads that share a key head have equal steps.
        attn_mask: Boolean, broadcastable to (batch, heads, queries, keys), True = may attend.
        is_causal: Query i sees keys 0 to i only, besides ``attn_mask``.
        center: Whether the row's mean is subtracted from the distances.
        signed: False gives the unsigned form, max(v − z, 0).
        enable_gqa: Let each key head serve heads ÷ key heads query heads.
        backend: ``"cpu"`` runs the native kernels, ``"triton"`` those for GPUs, ``"reference"`` is plain PyTorch on
            every device, ``"auto"`` is what ``which_integer_backend`` says.

    Returns:
        int32 of shape (batch, heads, queries, value_dim), or one feature more if the grid has a reach, in steps of the
        value; 0 where a query sees no key.

    Raises:
        OperatorError: A shape, dtype, device, mask, grid or name that does not fit, or a NaN that a query would see.

    Example:
        >>> query, key = torch.randint(0, 256, (2, 1, 4, 8, 16), dtype=torch.uint8)
        >>> value = torch.randint(-127, 128, (1, 4, 8, 16), dtype=torch.int8)
        >>> grid = IntegerGrid.of(0.02, 0.02, torch.ones(4), 0.5, scale=0.25)
        >>> integer_attention(query, key, value, grid).dtype
        torch.int32
    """
    checks.choices(
        is_causal=is_causal, center=center, signed=signed, backend=backend, backends=get_args(IntegerBackend)
    )
    query, key, value, attn_mask = _checked(query, key, value, grid, attn_mask, enable_gqa)
    return _call(query, key, value, grid, attn_mask, (is_causal, center, signed), backend, None)


def inhibitor_attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: IntegerGrid,
    *,
    eta: float | Tensor = 1.0,
    length_exponent: float | Tensor = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    center: bool = True,
    signed: bool = True,
    enable_gqa: bool = False,
    backend: IntegerBackend = "auto",
) -> Tensor:
    r"""``inhibitor_attention`` in 8-bit integers: ``integer_attention``, times value step · η · n^(−ρ).

    n is the number of keys in sight or, if the grid has a reach of w steps, of those heard,
    :math:`\tfrac12 + \sum_j \max(w - z_{ij}, 0) / w`.

    Args:
        query: As of ``integer_attention``; γ, δ, τ and scale are the grid's.
        key: Likewise.
        value: Likewise.
        grid: Of query's heads; the heads that share a key head have equal steps.
        eta: η, the scale of the result: a number, (heads,), or (batch, heads, queries), a gain for each query.
        length_exponent: ρ, a number or (heads,): 0 gives a sum over keys, 1 a mean.
        attn_mask: Boolean, broadcastable to (batch, heads, queries, keys), True = may attend.
        is_causal: Query i sees keys 0 to i only, besides ``attn_mask``.
        center: Whether the row's mean is subtracted from the distances.
        signed: False gives the unsigned form, max(v − z, 0).
        enable_gqa: Let each key head serve heads ÷ key heads query heads.
        backend: As of ``integer_attention``.

    Returns:
        (batch, heads, queries, value_dim) in query's dtype if that is floating point, else float32.

    Raises:
        OperatorError: As ``integer_attention`` does, or η or ρ that do not fit.

    Example:
        >>> query = key = value = torch.ones(2, 4, 8, 16)
        >>> grid = IntegerGrid.of(0.01, 0.01, torch.ones(4), 0.0, scale=0.25)
        >>> inhibitor_attention_int8(query, key, value, grid, length_exponent=1.0)[0, 0, 0, 0]
        tensor(1.)
    """
    checks.choices(
        is_causal=is_causal, center=center, signed=signed, backend=backend, backends=get_args(IntegerBackend)
    )
    query, key, value, attn_mask = _checked(query, key, value, grid, attn_mask, enable_gqa)
    flags = is_causal, center, signed
    call = functools.partial(_call, query, key, value, grid, attn_mask, flags, backend)
    count = functools.partial(masks.count, attn_mask, is_causal, query.shape[2], key.shape[2], query.device)
    return rescaled(call, query, grid, eta, length_exponent, count)


def rescaled(
    call: Callable[[Scale], Tensor],
    query: Tensor,
    grid: IntegerGrid,
    eta: float | Tensor,
    length_exponent: float | Tensor,
    count: Callable[[], Tensor],
) -> Tensor:
    """The operator's sums times value step · η · n^(−ρ), a factor that is worked out in float64 and rounded once.

    Args:
        call: Calls the operator.
        query: (batch, heads, queries, head_dim).
        grid: Of the query's heads.
        eta: η, a number, (heads,) or (batch, heads, queries).
        length_exponent: ρ, a number or (heads,).
        count: Gives the numbers of keys in sight, broadcastable to (batch, heads, queries, 1); called only if needed.

    Returns:
        (batch, heads, queries, value_dim) in query's dtype if that is floating point, else float32.
    """
    factor = grid.value_step.double().view(-1, 1, 1)
    if isinstance(eta, Tensor) or eta != 1.0:
        factor = factor * checks.eta(eta, query)
    exponent = None
    if isinstance(length_exponent, Tensor) or length_exponent != 0.0:
        exponent = checks.per_head("length_exponent", length_exponent, query).double()
    if exponent is not None and grid.reach is None:  # what is heard is the operator's to count, what is in sight is not
        factor = factor * count().clamp(min=1).double().pow(-exponent.view(-1, 1, 1))
    output = call(Scale(factor, exponent))
    return output.to(query.dtype) if query.is_floating_point() else output


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: IntegerGrid,
    attn_mask: Tensor | None,
    flags: tuple[bool, bool, bool],
    backend: IntegerBackend,
    scale: Scale | None,
) -> Tensor:
    name = _pick(query.device)[0] if backend == "auto" else check_backend(backend, query.device)
    factor = (None, None) if scale is None else scale
    checks.no_tangents("inhibitor_attention_int8", query, key, value, *factor)
    result: Tensor = integer_operator.attention(query, key, value, *grid.tensors, *factor, attn_mask, *flags, name)
    return result


def _checked(
    query: Tensor, key: Tensor, value: Tensor, grid: IntegerGrid, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors with batch and heads in full, and the mask with four dimensions; or an error."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        checks.dense(name, tensor)
    for (name, tensor), code in zip(tensors.items(), CODES, strict=True):
        expected = query.dtype if query.dtype in checks.FLOATS else code
        if tensor.dtype != expected:
            raise OperatorError(
                name,
                expected=str(expected) if expected != code else f"{code}, or all of floating point",
                got=str(tensor.dtype),
                remedy="Pass floating-point tensors, or what quantize_query_key and quantize_value return.",
            )
    query, key, value, attn_mask = checks.aligned(query, key, value, attn_mask, enable_gqa)
    _check_sizes(query, key, value)
    check_grid(grid, query)
    return query, key, value, attn_mask


def _check_sizes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what the bounds of docs/integer.md do not cover."""
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > LARGEST_DIM:
            raise OperatorError(
                name,
                expected=f"{LARGEST_DIM} features at most",
                got=f"{tensor.shape[3]}",
                remedy="Split into more heads: a distance must fit 16 bits.",
            )
    if key.shape[2] > MOST_KEYS:
        raise OperatorError(
            "key",
            expected=f"{MOST_KEYS} keys at most",
            got=f"{key.shape[2]}",
            remedy="A sum of more values could leave 24 bits: use inhibitor_attention.",
        )


def heads_of(grid: IntegerGrid) -> int:
    """How many heads a grid is of; what is no grid is refused."""
    if not isinstance(grid, IntegerGrid):
        raise OperatorError(
            "grid", expected="an IntegerGrid", got=type(grid).__name__, remedy="Make it with IntegerGrid.of."
        )
    return grid.shape[0]


def check_grid(grid: IntegerGrid, query: Tensor) -> None:
    """Refuse a grid of other heads or on another device."""
    heads = query.shape[1]
    if heads_of(grid) != heads:
        raise OperatorError(
            "grid",
            expected=f"query's {heads} heads",
            got=f"{grid.shape[0]}",
            remedy="Give IntegerGrid.of at least one tensor of shape (heads,).",
        )
    if grid.query_key_step.device != query.device:
        raise OperatorError(
            "grid",
            expected=f"query's device {query.device}",
            got=str(grid.query_key_step.device),
            remedy="Move it with grid.to(device).",
        )
