"""What the integers of a model's attention really are: how wide they get, and how many are clipped."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inhibitor.models.attention import Tapped, contexts
from inhibitor.models.int8 import integer_layers
from inhibitor.models.int8_attention import IntegerInhibitorAttention
from inhibitor.ops import masks
from inhibitor.ops.integer import integer_attention
from inhibitor.ops.integer_grid import quantize_query_key, quantize_value
from inhibitor.ops.integer_reference import distance, inhibition


@torch.no_grad()
def seen_widths(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Bits that the intermediates of integer attention need on an input, sign included, over all layers and heads.

    Args:
        model: With integer attention, in evaluation mode.
        inputs: A batch as the base model takes it.

    Returns:
        Bits by the names of ``inhibitor.bench.count.widths``, of those that depend on the input.
    """
    found: dict[str, int] = {}
    tapped = contexts(model, inputs)
    for layer, attention in integer_layers(model).items():
        for name, tensor in _intermediates(attention, tapped[layer]).items():
            found[name] = max(found.get(name, 0), _bits(tensor))
    return found


@torch.no_grad()
def clipped_shares(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, dict[str, float]]:
    """The share of attention's numbers that lie beyond their grid and become its last code, all heads together.

    Args:
        model: With integer attention, in evaluation mode.
        batches: Inputs as the base model takes them; padding does not count.

    Returns:
        By layer, the shares ``query_key`` and ``value``, from 0 to 1.
    """
    found: dict[int, dict[str, list[Tensor]]] = {}
    for batch in batches:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        tapped = contexts(model, batch)
        for layer, attention in integer_layers(model).items():
            tap, (query_key, value) = tapped[layer], attention.steps()
            half = 1 << attention.bits - 1
            sides = found.setdefault(layer, {"query_key": [], "value": []})
            sides["query_key"] += [_beyond(x, real, query_key, -half, half - 1) for x in (tap.query, tap.key)]
            sides["value"].append(_beyond(tap.value, real, value, 1 - half, half - 1))
    return {
        layer: {name: float(torch.cat(beyond).double().mean()) for name, beyond in sides.items()}
        for layer, sides in found.items()
    }


def _beyond(x: Tensor, real: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Whether the codes of x, (batch, heads, tokens, features), at real tokens need clipping."""
    codes = (x.transpose(1, 2)[real] / step.view(-1, 1)).round()
    return ((codes < low) | (codes > high)).flatten()


def _intermediates(attention: IntegerInhibitorAttention, tap: Tapped) -> dict[str, Tensor]:
    grid = attention.grid(tap.scale)
    query, key = (quantize_query_key(x, grid.query_key_step, attention.bits) for x in (tap.query, tap.key))
    value = quantize_value(tap.value, grid.value_step, attention.bits)
    size = (*query.shape[:3], key.shape[2])
    allowed = masks.dense(tap.attn_mask, tap.is_causal, size[2], size[3], query.device).expand(size)
    distances = distance(query, key).to(torch.int64) * allowed
    total, count = distances.sum(-1), allowed.sum(-1)
    middle = (2 * total + count).div((2 * count).clamp(min=1), rounding_mode="floor")
    shift = (middle if attention.config.center else 0 * middle) - grid.threshold.view(-1, 1)
    excess = ((distances - shift.unsqueeze(-1)).clamp(min=0)) * allowed
    z = inhibition(query, key, grid.tensors, allowed, attention.config.center) * allowed
    sums = integer_attention(
        query,
        key,
        value,
        grid,
        attn_mask=tap.attn_mask,
        is_causal=tap.is_causal,
        center=attention.config.center,
        signed=attention.config.signed,
    )
    found = {
        "distance D": distances,
        "sum of distances T": total,
        "2T + n": 2 * total + count,
        "shift t": shift,
        "excess e": excess,
        "product e · m": excess.clamp(max=65535) * grid.multiplier.to(torch.int64).view(-1, 1, 1),
        "inhibition z": z,
        "difference |v| − z": value.abs().to(torch.int64).amax(-1, keepdim=True).mT - z,
        "sum of values H": sums[..., : value.shape[3]],
    }
    if grid.reach is not None:
        found |= {"difference w − z": grid.reach.view(-1, 1, 1) - z, "sum of what is heard R": sums[..., -1]}
    return found


def _bits(tensor: Tensor) -> int:
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    return max(high, -low - 1).bit_length() + (low < 0)
