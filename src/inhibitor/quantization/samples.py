"""What passes through a model's parts on a few batches: the data that steps are found on."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inhibitor.errors import DataError
from inhibitor.models.attention import tapping

TOKENS = 2048  # at most that are kept of each part, spread evenly over the batches


@dataclass
class Samples:
    """Rows of real tokens, padding left out.

    Args:
        inputs: What enters each linear layer, (tokens, in_features), by the layer's path.
        ranges: The least and the largest number of each feature of all tokens, (2, in_features), by the layer's path.
        heads: Query and key of each layer's attention, (heads, tokens, features) each, by the layer's index.
        largest: The largest magnitude of the values of all tokens, (heads,), by the layer's index.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def collect(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], linears: Mapping[str, nn.Module]
) -> Samples:
    """Run a model over batches and keep what enters its attention and some of its linear layers.

    Args:
        model: In evaluation mode.
        batches: Inputs as the base model takes them, with ``attention_mask`` where there is padding.
        linears: The linear layers to watch, by path.

    Raises:
        DataError: There is no batch, no token in them, or a NaN or infinity comes by.
    """
    batches = list(batches)
    share, generator = max(1, TOKENS // max(len(batches), 1)), torch.Generator().manual_seed(0)
    kept: dict[str, list[Tensor]] = {}
    samples = Samples()
    heads: dict[int, list[tuple[Tensor, ...]]] = {}
    for batch in batches:
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool().flatten().nonzero().flatten()
        chosen = real[torch.randperm(len(real), generator=generator)[:share].to(real.device)]
        with _watching(linears, real, chosen, kept, samples.ranges), tapping(model) as tapped:
            model.base_model(**batch)
        for layer, tap in tapped.items():
            taken = (tensor.transpose(1, 2).flatten(0, 1)[chosen] for tensor in (tap.query, tap.key))
            heads.setdefault(layer, []).append(tuple(taken))
            if len(real):
                magnitudes = tap.value.transpose(1, 2).flatten(0, 1)[real].float().abs().amax((0, 2))
                before = samples.largest.get(layer, magnitudes)
                samples.largest[layer] = torch.maximum(before, magnitudes)
    samples.inputs = {path: torch.cat(rows) for path, rows in kept.items()}
    samples.heads = {layer: _joined(parts) for layer, parts in heads.items()}
    _check(samples)
    return samples


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    query, key = (torch.cat(tensors).transpose(0, 1).float() for tensors in zip(*parts, strict=True))
    return query, key


@contextmanager
def _watching(
    linears: Mapping[str, nn.Module],
    real: Tensor,
    chosen: Tensor,
    kept: dict[str, list[Tensor]],
    ranges: dict[str, Tensor],
) -> Iterator[None]:
    def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        kept.setdefault(path, []).append(rows[chosen])
        if len(real):
            low, high = torch.aminmax(rows[real], dim=0)
            before = ranges.get(path, torch.stack([low, high]))
            ranges[path] = torch.stack([torch.minimum(before[0], low), torch.maximum(before[1], high)])

    hooks = [module.register_forward_pre_hook(partial(keep, path)) for path, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(samples: Samples) -> None:
    tensors = [*samples.inputs.values(), *(tensor for taps in samples.heads.values() for tensor in taps)]
    tensors += [largest.unsqueeze(0) for largest in samples.largest.values()]
    tokens = min((tensor.shape[-2] for tensor in tensors), default=0)
    if tokens == 0:
        raise DataError(
            "batches",
            expected="sentences to find steps on",
            got="no token",
            remedy="Pass a few hundred sentences like those that the model will read.",
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataError(
            "batches",
            expected="finite numbers in every layer",
            got="NaN or infinity",
            remedy="The model's weights are broken: train it anew, or choose an earlier state.",
        )
