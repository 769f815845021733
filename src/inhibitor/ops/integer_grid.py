"""The grids of the integer operator: steps and fixed-point numbers per head, and numbers put on their grid."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import checks

ZERO = 128  # the code of 0 in queries and keys
LARGEST = 65535  # of e, which the kernels hold in 16 bits
FARTHEST = 255  # of z and of the reach, which the kernels hold in 8 bits
_LEAST, _MOST = 2.0**-16, 2.0**8 - 2.0**-8  # slopes beyond which Z is 0, or 0 and saturated, whatever they are
_FAR = 1 << 18  # thresholds beyond which the clamp of t is all there is
_RANGES = {"multiplier": (1 << 15, (1 << 16) - 1), "shift": (8, 31), "threshold": (-_FAR, _FAR), "reach": (1, FARTHEST)}


class GridTensors(NamedTuple):
    """What the backends take of an ``IntegerGrid``, which has checked it."""

    query_key_step: Tensor
    value_step: Tensor
    multiplier: Tensor
    shift: Tensor
    threshold: Tensor
    reach: Tensor | None = None


@dataclass(frozen=True, eq=False)
class IntegerGrid:
    """What makes integers of one attention layer: a step for query and key, one for the value, and Z in fixed point.

    Z in steps of the value is ``max(distance − threshold, 0) · multiplier · 2^−shift``, the distance in steps of query
    and key. All tensors are of shape (heads,) and on one device; ``IntegerGrid.of`` makes them.

    Args:
        query_key_step: float32, the step of query and key; equal for the heads that share a key head.
        value_step: float32, the step of the value; equal for the heads that share a key head.
        multiplier: int32 in [2¹⁵, 2¹⁶).
        shift: int32 in [8, 31].
        threshold: int32 in [−2¹⁸, 2¹⁸], δ in steps of the distance, and the half that rounds Z.
        reach: int32 in [1, 255], τ in steps of the value; None where all keys in sight count.

    Raises:
        OperatorError: A dtype, shape, device or number other than these. Numbers are looked at on the CPU, and
            not in a compiled graph.
    """

    query_key_step: Tensor
    value_step: Tensor
    multiplier: Tensor
    shift: Tensor
    threshold: Tensor
    reach: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor, dtype = getattr(self, field.name), torch.float32 if "step" in field.name else torch.int32
            if tensor is None and field.name == "reach":
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != self.shape:
                raise OperatorError(
                    field.name,
                    expected=f"{dtype} of shape (heads,)",
                    got=f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    if isinstance(tensor, Tensor)
                    else repr(tensor),
                    remedy="Make the grid with IntegerGrid.of.",
                )
            check_device(field.name, tensor, "query_key_step", self.query_key_step)
            if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
                _check_numbers(field.name, tensor.tolist())

    @property
    def tensors(self) -> GridTensors:
        """The tensors, in the order of the registered operator."""
        return GridTensors(*(getattr(self, field.name) for field in fields(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(heads,)."""
        return (self.query_key_step.numel(),)

    @classmethod
    def of(
        cls,
        query_key_step: float | Tensor,
        value_step: float | Tensor,
        gamma: float | Tensor,
        delta: float | Tensor,
        scale: float,
        reach: float | Tensor | None = None,
    ) -> "IntegerGrid":
        """The grid for γ, δ, the distance's scale and τ.

        Args:
            query_key_step: The step of query and key: a number, (key heads,) or (heads,); greater than 0.
            value_step: The step of the value: likewise.
            gamma: γ, a number or (heads,); greater than 0.
            delta: δ, a number or (heads,).
            scale: Factor of the distance, usually 1/√head_dim; greater than 0.
            reach: τ, a number or (heads,), greater than 0, or None. Beyond 255 steps of the value it is taken for that.

        Raises:
            OperatorError: A number that is not finite, not greater than 0 where it must be, or not one for each head.

        Example:
            >>> grid = IntegerGrid.of(0.02, torch.tensor([0.01, 0.03]), 1.0, 0.5, scale=0.125)
            >>> grid.multiplier.tolist(), grid.shift.tolist(), grid.threshold.tolist()
            ([32768, 43691], [17, 19], [202, 206])
        """
        given = {"query_key_step": query_key_step, "value_step": value_step, "gamma": gamma, "delta": delta}
        if reach is not None:
            given["reach"] = reach
        first = next(((name, number) for name, number in given.items() if isinstance(number, Tensor)), None)
        wide = {name: _vector(name, number, first) for name, number in given.items()}
        heads = max(tensor.numel() for tensor in wide.values())
        for name, tensor in wide.items():
            if heads % tensor.numel():
                raise OperatorError(
                    name,
                    expected=f"one number for each of {heads} heads, or for equal groups of them",
                    got=f"{tensor.numel()}",
                    remedy="Give one number, or one for each head.",
                )
            wide[name] = tensor.repeat_interleave(heads // tensor.numel())
        if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
            raise OperatorError(
                "scale", expected="a number greater than 0", got=repr(scale), remedy="It is usually head_dim ** -0.5."
            )
        # What is used is the step in float32, so that is what the slope is made of.
        steps = {name: wide[name].to(torch.float32) for name in ("query_key_step", "value_step")}
        by_distance = wide["gamma"] * scale * steps["query_key_step"].double()
        slope = by_distance / steps["value_step"].double()
        threshold = wide["delta"] / by_distance + 0.5 / slope
        mantissa, exponent = torch.frexp(slope.clamp(_LEAST, _MOST))
        multiplier = torch.round(mantissa * 2**16)
        over = multiplier == 2**16
        return cls(
            **steps,
            multiplier=torch.where(over, 2**15, multiplier).to(torch.int32),
            shift=(16 - exponent - over.to(torch.int32)).to(torch.int32),
            threshold=threshold.round().clamp(-_FAR, _FAR).to(torch.int32),
            reach=None
            if reach is None
            else (wide["reach"] / steps["value_step"].double()).round().clamp(1, FARTHEST).to(torch.int32),
        )

    def to(self, device: torch.device | str) -> "IntegerGrid":
        """The same grid on another device."""
        moved: list[Any] = [None if tensor is None else tensor.to(device) for tensor in self.tensors]
        return IntegerGrid(*moved)


def check_device(name: str, tensor: Tensor, other: str, there: Tensor) -> None:
    """Refuse a tensor that does not lie where another does."""
    if tensor.device != there.device:
        expected = f"{other}'s device {there.device}"
        raise OperatorError(name, expected=expected, got=str(tensor.device), remedy="Move one of them.")


def check_groups(grid: GridTensors, key_heads: int) -> None:
    """Refuse a grid with different steps for heads that share a key head."""
    if key_heads in (0, len(grid.query_key_step)):
        return
    for name in ("query_key_step", "value_step"):
        steps = getattr(grid, name).view(key_heads, -1)
        if bool((steps != steps[:, :1]).any()):
            raise OperatorError(
                f"grid.{name}",
                expected="equal steps for the heads that share a key head",
                got=str(steps.tolist()),
                remedy="Give IntegerGrid.of one step for each key head.",
            )


def _check_numbers(name: str, numbers: list[float]) -> None:
    """Refuse numbers of a field that the specification does not cover."""
    if name in _RANGES:
        low, high = _RANGES[name]
        fit, expected = all(low <= number <= high for number in numbers), f"numbers from {low} to {high}"
    else:
        fit, expected = all(0 < number < math.inf for number in numbers), "finite numbers greater than 0"
    if not fit:
        raise OperatorError(name, expected=expected, got=str(numbers), remedy="Make the grid with IntegerGrid.of.")


def _vector(name: str, number: float | Tensor, first: tuple[str, Tensor] | None) -> Tensor:
    """Finite float64 numbers, (1,) or (heads,), where the first tensor lies; of steps, γ and τ only those above 0."""
    if not isinstance(number, int | float | Tensor):
        raise OperatorError(name, expected="a number or a tensor", got=repr(number), remedy="Convert it with float().")
    if first is not None and isinstance(number, Tensor):
        check_device(name, number, *first)
    if not isinstance(number, Tensor):
        number = torch.tensor(number, dtype=torch.float64, device=None if first is None else first[1].device)
    vector = number.detach().double().reshape(-1)
    least = 0.0 if name in ("gamma", "reach") else torch.finfo(torch.float32).tiny
    if not vector.numel() or not bool(vector.isfinite().all()) or (name != "delta" and bool((vector <= least).any())):
        raise OperatorError(
            name,
            expected="finite numbers" + ("" if name == "delta" else " greater than 0"),
            got=str(vector.tolist()),
            remedy={
                "gamma": "Train with γ > 0: a negative slope has no integer form.",
                "delta": "Check δ.",
                "reach": "Train with τ > 0, or pass reach=None.",
            }.get(name, "Calibrate the step on data that is not all 0."),
        )
    return vector


def inverse(step: Tensor) -> Tensor:
    """1 ÷ step, rounded to float32: what numbers are multiplied by on their way to the grid."""
    return 1.0 / step


def quantize_query_key(x: Tensor, step: Tensor, bits: int = 8) -> Tensor:
    """Put queries or keys on their grid: round x · (1 ÷ step) to the nearest integer, ties to even, 0 at 128.

    Args:
        x: (batch, heads, length, head_dim), floating point; taken as float32. NaN becomes 0, infinity the end.
        step: float32 of shape (heads,), or (1,), on x's device.
        bits: Width: codes lie between 128 − 2^(bits − 1) and 127 + 2^(bits − 1).

    Returns:
        uint8 of x's shape.

    Raises:
        OperatorError: x is not floating point, the step does not fit it, or there are fewer than 2 bits or more than 8.

    Example:
        >>> quantize_query_key(torch.tensor([[[[-9.0, 0.25, 0.75, 9.0]]]]), torch.tensor([0.5])).flatten().tolist()
        [110, 128, 130, 146]
    """
    half = _half(bits)
    return (_scaled(x, step).clamp(-half, half - 1) + ZERO).to(torch.uint8)


def quantize_value(x: Tensor, step: Tensor, bits: int = 8) -> Tensor:
    """Put values on their grid: round x · (1 ÷ step) to the nearest integer, ties to even, with equal ends.

    Args:
        x: (batch, heads, length, value_dim), floating point; taken as float32. NaN becomes 0, infinity the end.
        step: float32 of shape (heads,), or (1,), on x's device.
        bits: Width: values lie between −(2^(bits − 1) − 1) and 2^(bits − 1) − 1.

    Returns:
        int8 of x's shape.

    Raises:
        OperatorError: x is not floating point, the step does not fit it, or there are fewer than 2 bits or more than 8.

    Example:
        >>> quantize_value(torch.tensor([[[[-99.0, -0.25, 0.75]]]]), torch.tensor([0.5])).flatten().tolist()
        [-127, 0, 2]
    """
    half = _half(bits)
    return _scaled(x, step).clamp(1 - half, half - 1).to(torch.int8)


def _half(bits: int) -> int:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise OperatorError("bits", expected="2 to 8", got=repr(bits), remedy="The kernels hold a number in 8 bits.")
    return 1 << (bits - 1)


def _scaled(x: Tensor, step: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in checks.FLOATS:
        raise OperatorError(
            "x",
            expected="a floating-point tensor",
            got=str(getattr(x, "dtype", type(x).__name__)),
            remedy="Integers are on a grid already.",
        )
    checks.dense("x", x)
    heads = x.shape[1]
    fits = isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == x.device
    if not fits or step.shape not in ((1,), (heads,)):
        raise OperatorError(
            "step",
            expected=f"torch.float32 of shape ({heads},) or (1,) on {x.device}",
            got=f"{step.dtype} of shape {tuple(step.shape)} on {step.device}"
            if isinstance(step, Tensor)
            else type(step).__name__,
            remedy="Give one step, or one for each head of x.",
        )
    return (x.to(torch.float32).nan_to_num(nan=0.0) * inverse(step).view(-1, 1, 1)).round()
