"""Steps, multipliers and scales that lose least on sampled data."""

import torch
from torch import Tensor, nn

from inhibitor.models.int8_attention import IntegerInhibitorAttention
from inhibitor.models.int8_layers import folded

SHARES = torch.linspace(0.1, 1.0, 46)  # of the largest magnitude, beyond which the grid clips
MIGRATIONS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # how much of the inputs' unevenness the weights take over
CLIPS = tuple(i / 20 for i in range(20, 6, -1))  # of the largest number, beyond which an even grid clips
_ROWS = 512  # of the inputs, on which a linear layer's candidates are compared
_TINY = 1e-6  # steps of parts that are 0 throughout


@torch.no_grad()
def calibrate_attention(attention: IntegerInhibitorAttention, query: Tensor, key: Tensor, largest: Tensor) -> None:
    """Set the steps of each head.

    That of query and key is the one whose rounding and clipping give the least squared error. Values are not clipped:
    inhibition sets the small ones to 0 and lets the largest through, so that clipping would meet what counts.

    Args:
        attention: Its steps are set.
        query: (heads, tokens, head_dim).
        key: (heads, tokens, head_dim).
        largest: The largest magnitude of the values, (heads,).
    """
    half = 1 << attention.bits - 1
    attention.log2_query_key_step.copy_(best_step(torch.cat([query, key], 1).flatten(1), -half, half - 1).log2())
    attention.log2_value_step.copy_((largest / (half - 1)).clamp(min=_TINY).log2())


def best_step(x: Tensor, low: int, high: int) -> Tensor:
    """The step, for each row of x, that ``clamp(round(x / step), low, high) · step`` comes nearest to x with.

    Args:
        x: (rows, samples).
        low: The least code.
        high: The largest code.

    Returns:
        (rows,), greater than 0.

    Example:
        >>> best_step(torch.tensor([[-3.0, 1.0, 2.0, 3.0]]), -3, 3)
        tensor([1.])
    """
    largest = (x.abs().amax(1) / high).clamp(min=_TINY)
    steps = largest * SHARES.to(x).unsqueeze(1)  # (shares, rows)
    errors = torch.stack([_error(x, step.unsqueeze(1), low, high) for step in steps])
    return steps.gather(0, errors.argmin(0, keepdim=True))[0]


def _error(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return ((x / step).round().clamp(low, high) * step - x).square().sum(1)


@torch.no_grad()
def input_grid(
    linear: nn.Linear, x: Tensor, ranges: Tensor, even: bool = False, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Choose the multipliers of a layer's features and their zero point.

    A feature's multiplier divides what is uneven among features out of the inputs, to a power of its own, and
    multiplies it into the weights (SmoothQuant, arXiv 2211.10438). The power is tried out: that of the least error,
    summed over tokens in relation to each one's output, because a normalisation follows that makes tokens equal. On an
    even grid features have one multiplier; what is tried out there is how much of the largest numbers to clip.

    Args:
        linear: Float.
        x: Inputs of it, (tokens, in_features).
        ranges: The least and the largest number of each feature, (2, in_features).
        even: Whether all features get the same multiplier.
        bits: Of the weights.

    Returns:
        (in_features,) in float32, and an int32.
    """
    x = x[:: max(1, len(x) // _ROWS)]
    target = nn.functional.linear(x, linear.weight)
    sizes = target.square().sum(1).clamp(min=_TINY)
    magnitudes, columns = ranges.abs().amax(0).clamp(min=_TINY), linear.weight.abs().amax(0).clamp(min=_TINY)
    tried = []
    candidates = [(0.0, clip) for clip in CLIPS] if even else [(power, 1.0) for power in MIGRATIONS]
    for power, kept in candidates:
        smoothing = magnitudes**power / columns ** (1 - power) if power else torch.ones_like(magnitudes)
        low, high = (kept * bound.item() for bound in torch.aminmax(ranges / smoothing))
        step = max(high - low, _TINY) / 255
        zero_point = min(max(round(-low / step), 0), 255)
        multiplier = 1 / (smoothing * step)
        codes = (x * multiplier).round().clamp(-zero_point, 255 - zero_point)
        weight, scale = folded(linear.weight, multiplier, bits)
        output = nn.functional.linear(codes, weight.round()) * scale
        error = ((output - target).square().sum(1) / sizes).sum().item()
        tried.append((error, multiplier, zero_point))
    _, multiplier, zero_point = min(tried, key=lambda result: result[0])
    return multiplier, torch.tensor(zero_point, dtype=torch.int32)
