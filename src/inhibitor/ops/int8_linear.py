"""``torch.ops.inhibitor.int8_linear``: inputs put on their grid and multiplied by oneDNN; one node in a graph."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from inhibitor.errors import ModelError
from inhibitor.ops import integer_cpu
from inhibitor.ops.integer_reference import nan_in

_ROWS = 128  # put on the grid at a time: what they need between stays in the cache

# x: (…, in_features) floating point; multiplier: (in_features,) float32; zero_point: int32; weight: (out_features,
# in_features) int8; scale: (out_features,) float32; bias: (out_features,) float32. The result: (…, out_features).
torch.library.define(
    "inhibitor::int8_linear",
    "(Tensor x, Tensor multiplier, Tensor zero_point, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
)
int8_linear = torch.ops.inhibitor.int8_linear.default


@torch.library.impl("inhibitor::int8_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, multiplier: Tensor, zero_point: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    packed, zero, offsets = _packed(weight, zero_point)
    rows = x.reshape(-1, x.shape[-1]).float()
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes(rows, multiplier, zero), 1.0, zero, packed, scale, offsets, bias, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return output.to(x.dtype).view(*x.shape[:-1], len(weight))


def codes(x: Tensor, multiplier: Tensor, zero_point: int) -> Tensor:
    """Inputs on their grid: ``clamp(round(x · multiplier) + zero_point, 0, 255)``, ties to even.

    Args:
        x: (rows, features) in float32.
        multiplier: (features,) in float32.
        zero_point: The code of 0.

    Returns:
        uint8 of x's shape.

    Raises:
        OperatorError: A number is NaN.

    Example:
        >>> codes(torch.tensor([[-9.0, 0.25, 0.75, 99.0]]), torch.full((4,), 2.0), 10)
        tensor([[  0,  10,  12, 208]], dtype=torch.uint8)
    """
    if integer_cpu.INSTALLED:
        return integer_cpu.codes(x, multiplier, zero_point)
    if bool(x.isnan().any()):
        raise nan_in("input of an int8 linear layer", "NaN")
    found = torch.empty(x.shape, dtype=torch.uint8)
    for rows, written in zip(torch.split(x, _ROWS), torch.split(found, _ROWS), strict=True):
        written.copy_(torch.mul(rows, multiplier).round_().add_(zero_point).clamp_(0, 255))
    return found


_PACKED: Any = WeakTensorKeyDictionary()


def _packed(weight: Tensor, zero_point: Tensor) -> tuple[Tensor, int, Tensor]:
    """The weight in oneDNN's layout, the zero point as a number, and the weight's own zero points; kept by weight."""
    state = _state(weight), _state(zero_point)
    if _PACKED.get(weight, (None,))[0] != state:
        if weight.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
            raise ModelError(
                "int8 linear layers",
                expected="a CPU, and a PyTorch with oneDNN",
                got=f"device {weight.device}",
                remedy="Quantize with linear='float' for this machine.",
            )
        offsets = torch.zeros(len(weight), dtype=torch.int32)
        made = torch.ops.onednn.qlinear_prepack(weight, None), int(zero_point), offsets
        _PACKED[weight] = state, made
    kept: tuple[Tensor, int, Tensor] = _PACKED[weight][1]
    return kept


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor does; of inference tensors PyTorch counts no changes."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _fake(x: Tensor, multiplier: Tensor, zero_point: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise ModelError(
        "an int8 linear layer",
        expected="inference",
        got="a gradient to pass on",
        remedy="Train for integers with the float model (`integers` in a recipe), and quantize it afterwards.",
    )


torch.library.register_fake("inhibitor::int8_linear", _fake)
torch.library.register_autograd("inhibitor::int8_linear", _no_gradient)
