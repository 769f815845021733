"""The integer operator on a GPU, to the last bit what ``integer_reference`` gives, by the float operator's kernels.

What these add up are whole numbers below 2²⁴, which float32 holds exactly: distances are at most 65280, sums of values
up to 127 · 2¹⁷ (docs/integer.md). So it does not matter in which order they are added. What is heard, up to 255 · 2¹⁷,
is added up in integers.
"""

import torch
from torch import Tensor

from inhibitor.ops.cpu import empty_result
from inhibitor.ops.integer_grid import GridTensors
from inhibitor.ops.integer_reference import Scale, on_grid, scaled
from inhibitor.ops.masks import Options
from inhibitor.ops.triton.launch import Call


def forward(
    query: Tensor, key: Tensor, value: Tensor, grid: GridTensors, scale: Scale | None, options: Options
) -> Tensor:
    """H in int32, or in float32 times a factor: ``integer_reference.forward``'s arguments.

    Raises:
        OperatorError: A number in sight is NaN.
    """
    query, key, value = on_grid(query, key, value, grid, options)
    output = empty_result(query, value.shape[3], grid.reach, torch.int32)
    if output.numel() == 0 or key.shape[2] == 0:
        output.zero_()
    else:
        value = value.clamp(min=-127)
        call = Call(query, key, value, options, backward=False, reach=grid.reach)
        tensors = (query, key, value, call.mask)
        with call.on_device():
            means, _ = call.means()
            middles = (means if options.center else means.zero_()).sub_(grid.threshold.view(-1, 1))
            numbers = grid.multiplier.contiguous(), grid.shift.contiguous()
            call.launch("forward", "forward", (*tensors, middles, *numbers, output), tensors, (output,))
    return output if scale is None else scaled(output, scale, grid.reach)
