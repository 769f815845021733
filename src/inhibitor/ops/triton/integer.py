"""The integer operator on a GPU, to the last bit what ``integer_reference`` gives."""

import torch
from torch import Tensor

from inhibitor.ops.cpu import empty_result
from inhibitor.ops.integer_grid import GridTensors
from inhibitor.ops.integer_reference import on_grid
from inhibitor.ops.masks import Options
from inhibitor.ops.triton.launch import Call


def forward(
    query: Tensor, key: Tensor, value: Tensor, grid: GridTensors, factor: Tensor | None, options: Options
) -> Tensor:
    """H in int32, or in float32 times a factor: ``integer_reference.forward``'s arguments.

    Raises:
        OperatorError: A number in sight is NaN.
    """
    query, key, value = on_grid(query, key, value, grid, options)
    output = empty_result(query, value, torch.float32)
    if output.numel() == 0 or key.shape[2] == 0:
        output.zero_()
    else:
        call = Call(query, key, value, options, backward=False)
        numbers = (tensor.contiguous() for tensor in (grid.multiplier, grid.shift, grid.threshold))
        tensors = (query, key, value, call.mask)
        with call.on_device():
            means, _ = call.means(query, key)
            call.launch("integer", "integer_forward", (*tensors, means, *numbers, output), tensors, (output,))
    return output.to(torch.int32) if factor is None else output.mul_(factor)
