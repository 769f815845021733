"""The native integer kernels: 8-bit codes, or floats put on their grid on the way, in PyTorch's own threads.

They lie in the library that ``inhibitor.ops.cpu`` loads, and have instruction sets of their own: AVX-512 with its
instructions for neural networks, and without. The specification is docs/integer.md, the code csrc/integer_*.h.
"""

import ctypes
import struct

import torch
from torch import Tensor

from inhibitor.ops import cpu
from inhibitor.ops.integer_grid import GridTensors, inverse
from inhibitor.ops.integer_reference import Scale, nan_in, result_form
from inhibitor.ops.masks import Options

_DTYPES = cpu.DTYPES | {torch.uint8: 3}
_PROBLEM = struct.Struct("=7q q 3q d 5q 5q 5q 5q 3q 5q 23q 6q 5q q q")  # csrc/problem.h, csrc/integer.h
_NOTHING = (0,) * 5
_NO_MEMORY, _NAN_IN = 1, {2: "query", 3: "key", 4: "value"}


def _load() -> ctypes.CDLL | None:
    """The library with its types, or None where the package was installed without."""
    library = cpu._LIBRARY
    if library is None:
        return None
    cpu.check_layout(library, "inhibitor_integer_problem_bytes", _PROBLEM)
    library.inhibitor_integer_forward.restype = ctypes.c_int32
    library.inhibitor_integer_forward.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.inhibitor_integer_append.restype = ctypes.c_int32
    library.inhibitor_integer_append.argtypes = [*[ctypes.c_char_p] * 3, *[ctypes.c_int64] * 2]
    library.inhibitor_integer_codes.restype = ctypes.c_int32
    library.inhibitor_integer_codes.argtypes = [
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
        ctypes.c_int64,
    ]
    return library


_LIBRARY = _load()
INSTALLED = _LIBRARY is not None

_SETS = cpu.InstructionSets(lambda: _LIBRARY, "inhibitor_integer")
instruction_sets, instruction_set, using = _SETS.available, _SETS.current, _SETS.using


def forward(
    query: Tensor, key: Tensor, value: Tensor, grid: GridTensors, scale: Scale | None, options: Options
) -> Tensor:
    """H in int32, or in float32 times a factor: ``integer_reference.forward``'s arguments and result.

    Raises:
        OperatorError: A number in sight is NaN.
    """
    output = cpu.empty_result(query, value.shape[3], *result_form(grid.reach, scaled=scale is not None))
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_()
    if query.dtype == torch.float64:
        query, key, value = (tensor.to(torch.float32) for tensor in (query, key, value))
    shape = (*query.shape[:2], *value.shape[1:2], query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    _run(query, cpu.strided(key), cpu.strided(value), shape, grid, scale, options, output)
    return output


def forward_packed(
    query: Tensor,
    packed: tuple[Tensor, Tensor],
    length: int,
    value_dim: int,
    grid: GridTensors,
    scale: Scale | None,
    options: Options,
) -> Tensor:
    """The same against ``length`` keys and values that ``append`` has packed."""
    key, value = packed
    batch, heads, queries, head_dim = query.shape
    output = cpu.empty_result(query, value_dim, *result_form(grid.reach, scaled=scale is not None))
    if output.numel() == 0 or length == 0:
        return output.zero_()
    query = query.to(torch.float32) if query.dtype == torch.float64 else query
    shape = (batch, heads, key.shape[1], queries, length, head_dim, value_dim)
    _run(query, cpu.strided(key), cpu.strided(value), shape, grid, scale, options, output, packed=True)
    return output


def append(
    key: Tensor, value: Tensor, steps: tuple[Tensor, Tensor] | None, packed: tuple[Tensor, Tensor], length: int
) -> None:
    """Pack keys and values, (batch, key heads, more, features), behind ``length`` that are there.

    Args:
        key: uint8 codes or floats.
        value: int8 codes or floats.
        steps: float32 of shape (key heads,), of key and of value, for floats.
        packed: Keys and values for ``forward_packed``, uint8 of shape (batch, key heads, panels, bytes); written to.
        length: How many are there.

    Raises:
        OperatorError: A number is NaN.
    """
    if not key.numel():
        return
    if key.dtype == torch.float64:
        key, value = key.to(torch.float32), value.to(torch.float32)
    batch, key_heads, more, head_dim = key.shape
    inverses = (None, None) if steps is None else tuple(inverse(step).contiguous() for step in steps)
    problem = _PROBLEM.pack(
        *(batch, key_heads, key_heads, 0, more, head_dim, value.shape[3], _DTYPES[key.dtype], 0, 0, 0, 0.0),
        *(*_NOTHING, *cpu.strided(key), *cpu.strided(value), *_NOTHING, 0, 0, 0, *_NOTHING, *(0,) * 23),
        *(*(0 if step is None else step.data_ptr() for step in inverses), 0, 0, 0, 0, *_NOTHING, 0, 0),
    )
    places = (struct.pack("=5q", *cpu.strided(tensor)) for tensor in packed)
    _check(_call("inhibitor_integer_append", problem, *places, length), more, key_heads)


def codes(x: Tensor, multiplier: Tensor, zero_point: int) -> Tensor:
    """``clamp(round(x · multiplier) + zero_point, 0, 255)`` as uint8, for float32 of shape (rows, features).

    Raises:
        OperatorError: A number is NaN.
    """
    result = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if x.numel():
        x, multiplier = (tensor.resolve_neg().contiguous() for tensor in (x, multiplier))
        places = x.data_ptr(), multiplier.data_ptr(), zero_point, *x.shape, result.data_ptr()
        fault = _call("inhibitor_integer_codes", *places)
        if fault == _NO_MEMORY:
            raise MemoryError("int8 linear layer: no memory")
        if fault:
            raise nan_in("input of an int8 linear layer", "NaN")
    return result


def _run(
    query: Tensor,
    key: tuple[int, ...],
    value: tuple[int, ...],
    shape: tuple[int, ...],
    grid: GridTensors,
    scale: Scale | None,
    options: Options,
    output: Tensor,
    packed: bool = False,
) -> None:
    batch, heads, _, queries, keys, *_ = shape
    mask = options.attn_mask
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    factor, exponent = (None, None) if scale is None else scale
    if factor is not None:
        factor = factor.expand(batch, heads, queries, 1)
    exponent = None if exponent is None else exponent.contiguous()
    inverses: tuple[Tensor, ...] | tuple[None, None] = (None, None)
    if query.is_floating_point():
        inverses = inverse(grid.query_key_step).contiguous(), inverse(grid.value_step).contiguous()
    numbers = [
        None if tensor is None else tensor.contiguous()
        for tensor in (grid.multiplier, grid.shift, grid.threshold, grid.reach)
    ]
    problem = _PROBLEM.pack(
        *(*shape, _DTYPES[query.dtype], options.is_causal, options.center, options.signed, 0.0),
        *(*cpu.strided(query), *key, *value, *(_NOTHING if mask is None else cpu.strided(mask)), 0, 0, 0),
        *(*cpu.strided(output), *(0,) * 23),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (*inverses, *numbers)),
        *(*(_NOTHING if factor is None else cpu.strided(factor)), 0 if exponent is None else exponent.data_ptr()),
        packed,
    )
    _check(_call("inhibitor_integer_forward", problem), keys, heads)


def _call(function: str, *arguments: bytes | int) -> int:
    """The fault that a function of the library reports, 0 for none."""
    return int(getattr(_LIBRARY, function)(*arguments, torch.get_num_threads()))


def _check(fault: int, keys: int, heads: int) -> None:
    if fault == _NO_MEMORY:
        raise MemoryError(f"integer attention: no memory for {keys} keys in {heads} heads")
    if fault:
        raise nan_in(_NAN_IN[fault])
