"""The registration of the integer operator with PyTorch: schema and shapes, in one place.

``torch.ops.inhibitor.integer_attention``, ``integer_append`` and ``integer_attend`` of a cache, and ``integer_grid``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, integer_cpu, integer_reference
from inhibitor.ops.integer_grid import GridTensors, IntegerGrid, check_groups
from inhibitor.ops.integer_reference import Scale, result_form
from inhibitor.ops.masks import Options
from inhibitor.ops.triton import integer as integer_triton

BACKENDS: dict[str, Any] = {"cpu": integer_cpu, "triton": integer_triton, "reference": integer_reference}
# query: (batch, heads, queries, head_dim); key: (batch, key_heads, keys, head_dim), key_heads divides heads; value:
# (batch, key_heads, keys, value_dim); all floating point, or uint8, uint8 and int8. Those of the grid: (heads,).
# factor: float64, broadcastable to (batch, heads, queries, 1): the result is then float32, without it int32.
# length_exponent: float64, (heads,), with a reach and a factor, which is then times n^(−ρ) of what is heard; or 0.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_key_step, Tensor value_step, Tensor multiplier,"
    " Tensor shift, Tensor threshold, Tensor? reach, Tensor? factor, Tensor? length_exponent,"
    " Tensor? attn_mask, bool is_causal, bool center, bool signed, str backend"
)

torch.library.define("inhibitor::integer_attention", f"({_INPUTS}) -> Tensor")
attention = torch.ops.inhibitor.integer_attention.default


@torch.library.impl("inhibitor::integer_attention", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """H, (batch, heads, queries, value_dim); in integers with a reach one feature more, Σ_j max(w − z_ij, 0)."""
    *tensors, factor, exponent, attn_mask, is_causal, center, signed, backend = rest
    grid, scale = GridTensors(*tensors), None if factor is None else Scale(factor, exponent)
    check_groups(grid, key.shape[1])
    options = Options(attn_mask, is_causal, center, signed)
    result: Tensor = BACKENDS[backend].forward(query, key, value, grid, scale, options)
    return result


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    reach, factor, *_, backend = rest[5:]
    heard, dtype = result_form(reach, scaled=factor is not None)
    if backend != "reference":
        return cpu.empty_result(query, value.shape[3], heard, dtype)
    return query.new_empty((*query.shape[:3], value.shape[3] + (heard is not None)), dtype=dtype)


def no_gradient(subject: str, got: str, remedy: str) -> OperatorError:
    """The error where a gradient would have to pass through integers."""
    return OperatorError(subject, expected="a call without gradients", got=got, remedy=remedy)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    remedy = "Train with fake quantisation, or call it under torch.no_grad()."
    raise no_gradient("inhibitor_attention_int8", "a backward pass", remedy)


torch.library.register_fake("inhibitor::integer_attention", _fake)
torch.library.register_autograd("inhibitor::integer_attention", _no_gradient)

# A cache: keys and values, uint8 of shape (batch, key_heads, panels, bytes), of which the first ``length`` tokens are
# there. The steps are those of the key heads, for floats. All else is as above.
torch.library.define(
    "inhibitor::integer_append",
    "(Tensor key, Tensor value, Tensor? query_key_step, Tensor? value_step, Tensor(a!) keys, Tensor(b!) values,"
    " SymInt length) -> ()",
)
torch.library.define(
    "inhibitor::integer_attend",
    "(Tensor query, Tensor keys, Tensor values, Tensor query_key_step, Tensor value_step, Tensor multiplier,"
    " Tensor shift, Tensor threshold, Tensor? reach, Tensor? factor, Tensor? length_exponent,"
    " Tensor? attn_mask, bool center, bool signed, SymInt length, int value_dim) -> Tensor",
)
append = torch.ops.inhibitor.integer_append.default
attend = torch.ops.inhibitor.integer_attend.default


@torch.library.impl("inhibitor::integer_append", "CompositeExplicitAutograd")
def _append(
    key: Tensor,
    value: Tensor,
    query_key_step: Tensor | None,
    value_step: Tensor | None,
    keys: Tensor,
    values: Tensor,
    length: int,
) -> None:
    """Packs keys and values behind those that are there."""
    steps = None if query_key_step is None or value_step is None else (query_key_step, value_step)
    integer_cpu.append(key, value, steps, (keys, values), length)


@torch.library.impl("inhibitor::integer_attend", "CompositeExplicitAutograd")
def _attend(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """What ``integer_attention`` gives for the keys and values that were packed."""
    *grid, factor, exponent, attn_mask, center, signed, length, value_dim = rest
    scale = None if factor is None else Scale(factor, exponent)
    options = Options(attn_mask, False, center, signed)
    return integer_cpu.forward_packed(query, (keys, values), length, value_dim, GridTensors(*grid), scale, options)


def _fake_attend(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    reach, factor, *_, value_dim = rest[5:]
    return cpu.empty_result(query, value_dim, *result_form(reach, scaled=factor is not None))


torch.library.register_fake("inhibitor::integer_append", lambda *inputs: None)
torch.library.register_fake("inhibitor::integer_attend", _fake_attend)
torch.library.register_autograd("inhibitor::integer_attend", _no_gradient)


# The grid of parameters that training changes and inference does not: steps by their log2, (heads,) each as γ, δ and τ.
# Without a τ its last tensor is empty.
torch.library.define(
    "inhibitor::integer_grid",
    "(Tensor log2_query_key_step, Tensor log2_value_step, Tensor gamma, Tensor delta, Tensor? reach, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
grid_of = torch.ops.inhibitor.integer_grid.default


@torch.library.impl("inhibitor::integer_grid", "CompositeExplicitAutograd")
def _grid(*parameters: Any) -> tuple[Tensor, ...]:
    *tensors, scale = parameters
    numbers = (None if tensor is None else tuple(tensor.tolist()) for tensor in tensors)
    *found, reach = _grid_of_numbers(*numbers, scale, tensors[0].device)
    # Copies: a graph may write into what it is given.
    return (*(tensor.clone() for tensor in found), found[-1].new_empty(0) if reach is None else reach.clone())


# By the numbers, because fused optimizers change a parameter without telling its version.
@functools.lru_cache(maxsize=1024)
def _grid_of_numbers(
    log2_query_key_step: tuple[float, ...],
    log2_value_step: tuple[float, ...],
    gamma: tuple[float, ...],
    delta: tuple[float, ...],
    reach: tuple[float, ...] | None,
    scale: float,
    device: torch.device,
) -> GridTensors:
    def wide(numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    steps = steps_of(wide(log2_query_key_step)), steps_of(wide(log2_value_step))
    return IntegerGrid.of(*steps, wide(gamma), wide(delta), scale, reach=None if reach is None else wide(reach)).tensors


def steps_of(log2: Tensor) -> Tensor:
    """2 to the power of numbers, in float32."""
    # In float64: float32's exp2 may differ in the last bit with an element's place in memory.
    return torch.exp2(log2.double()).float()


def _fake_grid(log2_query_key_step: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    heads = log2_query_key_step.shape
    dtypes = torch.float32, torch.float32, torch.int32, torch.int32, torch.int32
    found = (log2_query_key_step.new_empty(heads, dtype=dtype) for dtype in dtypes)
    return (*found, log2_query_key_step.new_empty(0 if rest[3] is None else heads, dtype=torch.int32))


torch.library.register_fake("inhibitor::integer_grid", _fake_grid)
