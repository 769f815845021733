"""Linear layers in 8 bits: the grid of their inputs, and ``torch.ops.inhibitor.int8_linear``, the product by oneDNN."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from inhibitor.errors import ModelError
from inhibitor.ops import integer_cpu
from inhibitor.ops.integer_reference import nan_in

# codes: (…, in_features) uint8; zero_point: int32; weight: (out_features, in_features) int8; scale: (out_features,)
# float32; bias: (out_features,) float32. The result: (…, out_features) float32; with an output multiplier, its codes on
# the grid that this and the output's zero point make, uint8.
torch.library.define(
    "inhibitor::int8_linear",
    "(Tensor codes, Tensor zero_point, Tensor weight, Tensor scale, Tensor? bias, str activation='none',"
    " Tensor? output_multiplier=None, Tensor? output_zero_point=None) -> Tensor",
)
int8_linear = torch.ops.inhibitor.int8_linear.default

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
    packed, offsets, zero, output_step, output_zero = _packed(weight, zero_point, output_multiplier, output_zero_point)
    dtype = torch.float32 if output_multiplier is None else torch.uint8
    post_op, algorithm = _POST_OPS[activation]
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes.reshape(-1, codes.shape[-1]), 1.0, zero, packed, scale, offsets, bias,
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
        OperatorError: A number is NaN.

    Example:
        >>> codes(torch.tensor([[-9.0, 0.25, 0.75, 99.0]]), torch.full((4,), 2.0), torch.tensor(10))
        tensor([[  0,  10,  12, 208]], dtype=torch.uint8)
    """
    if torch.compiler.is_compiling():
        return _formula(x, multiplier, zero_point).to(torch.uint8)
    if integer_cpu.INSTALLED:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
        return integer_cpu.codes(rows, multiplier, int(zero_point)).view(x.shape)
    if bool(x.isnan().any()):
        raise nan_in("input of an int8 linear layer", "NaN")
    return _formula(x, multiplier, zero_point).to(torch.uint8)


def _formula(x: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    return ((x * multiplier).round() + zero_point).clamp(0, 255)


_PACKED: Any = WeakTensorKeyDictionary()


def _packed(weight: Tensor, *grids: Tensor | None) -> tuple[Tensor, Tensor, int, float, int]:
    """The weight in oneDNN's layout, the weight's own zero points, and the grids as numbers; kept by weight.

    Args:
        weight: As the operator's.
        *grids: Zero point; multiplier and zero point of the output.
    """
    state = [None if tensor is None else _state(tensor) for tensor in (weight, *grids)]
    if _PACKED.get(weight, (None,))[0] != state:
        if weight.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
            raise ModelError(
                "int8 linear layers",
                expected="a CPU, and a PyTorch with oneDNN",
                got=f"device {weight.device}",
                remedy="Quantize with linear='float' for this machine.",
            )
        zero_point, multiplier, output_zero_point = (0.0 if tensor is None else tensor.item() for tensor in grids)
        offsets = torch.zeros(len(weight), dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        made = packed, offsets, int(zero_point), 1 / multiplier if multiplier else 1.0, int(output_zero_point)
        _PACKED[weight] = state, made
    kept: tuple[Tensor, Tensor, int, float, int] = _PACKED[weight][1]
    return kept


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor does; of inference tensors PyTorch counts no changes."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


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


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise ModelError(
        "an int8 linear layer",
        expected="inference",
        got="a gradient to pass on",
        remedy="Train for integers with the float model (`integers` in a recipe), and quantize it afterwards.",
    )


torch.library.register_fake("inhibitor::int8_linear", _fake)
torch.library.register_autograd("inhibitor::int8_linear", _no_gradient)
