"""Linear layers in 8 bits, two operators: ``torch.ops.inhibitor.int8_codes`` and ``int8_linear``.

The first puts inputs on their grid, the second multiplies them by oneDNN.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from inhibitor.errors import ModelError
from inhibitor.ops import integer_cpu
from inhibitor.ops.integer_reference import nan_in

# x: (…, in_features), floating point; multiplier: (in_features,) float32; zero_point: int32. The result: uint8 codes.
torch.library.define("inhibitor::int8_codes", "(Tensor x, Tensor multiplier, Tensor zero_point) -> Tensor")
int8_codes = torch.ops.inhibitor.int8_codes.default
# codes: (…, in_features) uint8; zero_point: int32; weight: (out_features, in_features) int8; scale: (out_features,)
# float32; bias: (out_features,) float32. The result: (…, out_features) float32; with an output multiplier, its codes on
# the grid that this and the output's zero point make, uint8.
torch.library.define(
    "inhibitor::int8_linear",
    "(Tensor codes, Tensor zero_point, Tensor weight, Tensor scale, Tensor? bias, str activation='none',"
    " Tensor? output_multiplier=None, Tensor? output_zero_point=None) -> Tensor",
)
int8_linear = torch.ops.inhibitor.int8_linear.default

_INPUT = "input of an int8 linear layer"
_POST_OPS = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@torch.library.impl("inhibitor::int8_linear", "CompositeExplicitAutograd")
def _forward(
    codes: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    output_multiplier: Tensor | None = None,
    output_zero_point: Tensor | None = None,
) -> Tensor:
    kept = _packed(weight)
    output_step, dtype = 1.0, torch.float32
    if output_multiplier is not None:
        output_step, dtype = 1 / output_multiplier.item(), torch.uint8
    output_zero = 0 if output_zero_point is None else int(output_zero_point)
    post_op, algorithm = _POST_OPS[activation]
    rows = codes.reshape(-1, codes.shape[-1])
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows.repeat(1, 2) if kept.halved else rows, 1.0, int(zero_point), kept.packed, scale, kept.offsets, bias,
        output_step, output_zero, dtype, post_op, [], algorithm,
    )  # fmt: skip
    return output.view(*codes.shape[:-1], len(weight))


def codes(x: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    """Inputs on their grid: ``clamp(round(x · multiplier) + zero_point, 0, 255)``, ties to even.

    A compiler is given the formula, so that it puts numbers on the grid in the loop that makes them; NaN, which has no
    code, is not looked for there and gets any.

    Args:
        x: (…, features), floating point.
        multiplier: (features,) in float32.
        zero_point: The code of 0, int32.

    Returns:
        uint8 of x's shape.

    Raises:
        ModelError: Not on a CPU, or another number of features than multipliers, or these not in float32.
        OperatorError: A number is NaN.

    Example:
        >>> codes(torch.tensor([[-9.0, 0.25, 0.75, 99.0]]), torch.full((4,), 2.0), torch.tensor(10))
        tensor([[  0,  10,  12, 208]], dtype=torch.uint8)
    """
    if torch.compiler.is_compiling():
        return _formula(x, multiplier, zero_point)
    found: Tensor = int8_codes(x, multiplier, zero_point)
    return found


@torch.library.impl("inhibitor::int8_codes", "CompositeExplicitAutograd")
def _codes(x: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    _check_device(x)
    if multiplier.dtype != torch.float32 or multiplier.device != x.device:
        raise ModelError(
            "multiplier",
            expected="torch.float32 on the CPU",
            got=f"{multiplier.dtype} on {multiplier.device}",
            remedy="Leave an int8 model as it is: its grids are not numbers to be converted.",
        )
    if x.shape[-1:] != multiplier.shape:
        raise ModelError(
            _INPUT,
            expected=f"{len(multiplier)} features",
            got=f"shape {tuple(x.shape)}",
            remedy="Pass what the float layer takes.",
        )
    if integer_cpu.INSTALLED:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
        return integer_cpu.codes(rows, multiplier, int(zero_point)).view(x.shape)
    if bool(x.isnan().any()):
        raise nan_in(_INPUT, "NaN")
    return _formula(x, multiplier, zero_point)


def _formula(x: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    return ((x * multiplier).round() + zero_point).clamp(0, 255).to(torch.uint8)


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise ModelError(
            "int8 linear layers",
            expected="a CPU, and a PyTorch with oneDNN",
            got=f"device {tensor.device}",
            remedy="Quantize with linear='float' for this machine.",
        )


class _Packed(NamedTuple):
    """A weight in oneDNN's layout.

    Args:
        source: What was packed. It shares the weight's memory, which nothing else can therefore lie in; of an inference
            tensor it is a copy.
        version: How many changes PyTorch had counted then, of an inference tensor 0.
        packed: The same in oneDNN's layout.
        offsets: The zero points of its rows, 0.
        halved: Whether it lies there as two halves, side by side, whose sum it is.
    """

    source: Tensor
    version: int
    packed: Tensor
    offsets: Tensor
    halved: bool


_PACKED: Any = WeakTensorKeyDictionary()


def _packed(weight: Tensor) -> _Packed:
    """The weight in oneDNN's layout, kept while it lives and does not change.

    Of inference tensors PyTorch counts no changes: such a weight is compared with a copy in every call. Nor does it
    count what is written through ``weight.data``.
    """
    kept: _Packed | None = _PACKED.get(weight)
    if weight.is_inference():
        if kept is None or not torch.equal(kept.source, weight):
            kept = _PACKED[weight] = _pack(weight.clone(), 0)
    elif kept is None or kept.version != weight._version or kept.source.data_ptr() != weight.data_ptr():
        kept = _PACKED[weight] = _pack(weight.detach(), weight._version)
    return kept


def _pack(weight: Tensor, version: int) -> _Packed:
    _check_device(weight)
    offsets = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    halved = bool(((weight < -64) | (weight > 64)).any()) and _saturates()
    laid = torch.cat([weight >> 1, weight - (weight >> 1)], 1) if halved else weight
    return _Packed(weight, version, torch.ops.onednn.qlinear_prepack(laid, None), offsets, halved)


@functools.cache
def _saturates() -> bool:
    """Whether oneDNN's sum of two products stops at ±32,767, as it does on x86 processors without VNNI.

    A weight of ±127 then loses what a code above 128 gives it; weights of −64 to 64 lose nothing, and larger ones can
    be halved, for twice the products (oneDNN, "Nuances of int8 computations").
    """
    with torch.device("cpu"):
        codes, weight = torch.full((1, 2), 255, dtype=torch.uint8), torch.full((1, 2), 127, dtype=torch.int8)
        scale, offset = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, offset, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found.item() != 2 * 255 * 127


def _fake(
    codes: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    output_multiplier: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    dtype = torch.float32 if output_multiplier is None else torch.uint8
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_codes(x: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise ModelError(
        "an int8 linear layer",
        expected="inference",
        got="a gradient to pass on",
        remedy="Train for integers with the float model (`integers` in a recipe), and quantize it afterwards.",
    )


torch.library.register_fake("inhibitor::int8_codes", _fake_codes)
torch.library.register_fake("inhibitor::int8_linear", _fake)
torch.library.register_autograd("inhibitor::int8_linear", _no_gradient)
