"""What a model shows of itself on a batch: the same names for student and teacher.

=============  =========================================================  ==================================
name           what it is                                                 shape
=============  =========================================================  ==================================
``input-i``    what enters the attention module of layer i                (batch, length, hidden_size)
``context-i``  what leaves its attention, before the output projection    (batch, length, heads, value_dim)
``output-i``   the same, after the output projection                      (batch, length, hidden_size)
``hidden-i``   hidden states: 0 the embeddings, i + 1 those of layer i    (batch, length, hidden_size)
``logits``     what the head says                                         (batch, classes) or (batch, length,
                                                                          vocabulary)
=============  =========================================================  ==================================
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from inhibitor.models.attention import tapping
from inhibitor.models.families import attention_modules, layer_modules, output_modules

LOGITS = "logits"
T = TypeVar("T")


def observe(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    names: Collection[str],
    *,
    forced: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run a model no further than needed and return what was asked for; gradients flow.

    Args:
        model: A student, or a teacher loaded with ``attn_implementation=TEACHER``.
        inputs: A batch; what the model does not read is left out.
        names: What is wanted; see the table above.
        forced: What enters the attention module of some layers instead of what the layer below gives. Then only the
            attention of these layers is computed, and only contexts and outputs can be asked for.
    """
    parts = [name.partition("-") for name in names]
    attended = [int(index) for kind, _, index in parts if kind in ("input", "context", "output")]
    projected = any(kind == "output" for kind, _, _ in parts)
    hidden = any(kind == "hidden" for kind, _, _ in parts)
    last = None if hidden or LOGITS in names else max(attended, default=None)
    runs = model if LOGITS in names else model.base_model
    with (
        tapping(model, None if projected else last) as tapped,
        _entering(model) as entered,
        _leaving(model, last) as left,
        _forcing(model, forced or {}),
    ):
        output = runs(**readable(model, inputs), output_hidden_states=hidden)
    found = {f"context-{layer}": tap.context for layer, tap in tapped.items()}
    found |= {f"input-{layer}": states for layer, states in entered.items()}
    found |= {f"output-{layer}": states for layer, states in left.items()}
    if hidden:
        found |= {f"hidden-{index}": states for index, states in enumerate(output.hidden_states)}
    if LOGITS in names:
        found[LOGITS] = output.logits
    return {name: found[name] for name in names}


def readable(model: PreTrainedModel, batch: Mapping[str, T]) -> dict[str, T]:
    """What of a batch, labels aside, a model's forward takes; a student may read less than its teacher."""
    takes = inspect.signature(model.forward).parameters.keys() - {"labels"}
    return {name: value for name, value in batch.items() if name in takes}


@contextmanager
def _entering(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What enters each attention module, by layer."""
    entered: dict[int, Tensor] = {}

    def enter(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered[layer] = args[0] if args else kwargs["hidden_states"]

    hooks = [
        module.register_forward_pre_hook(partial(enter, layer), with_kwargs=True)
        for layer, module in enumerate(attention_modules(model))
    ]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


class _LastLayerLeft(Exception):  # noqa: N818 - a signal, not an error
    pass


@contextmanager
def _leaving(model: nn.Module, last: int | None) -> Iterator[dict[int, Tensor]]:
    """What leaves each output projection, by layer; with ``last``, the run ends there."""
    left: dict[int, Tensor] = {}

    def leave(layer: int, module: nn.Module, args: tuple[Any, ...], states: Tensor) -> None:
        left[layer] = states
        if layer == last:
            raise _LastLayerLeft

    hooks = [module.register_forward_hook(partial(leave, layer)) for layer, module in enumerate(output_modules(model))]
    try:
        yield left
    except _LastLayerLeft:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _forcing(model: nn.Module, inputs: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the layers named run their attention alone, on what they are given, and the others nothing at all."""
    layers = layer_modules(model) if inputs else []
    parts = zip(layers, attention_modules(model), output_modules(model), strict=False)
    for index, (layer, attention, projection) in enumerate(parts):
        layer.forward = _attention_only(attention, projection, inputs[index]) if index in inputs else _pass_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is behind it


def _attention_only(attention: nn.Module, projection: nn.Module, states: Tensor) -> Callable[..., Tensor]:
    inside = any(module is projection for module in attention.modules())

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
        context = attention(states, attention_mask=attention_mask, **kwargs)[0]
        if not inside:
            projection(context)
        return hidden_states

    return forward


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def on_teacher(name: str, layers: Mapping[int, int]) -> str:
    """The teacher's name for what a student calls ``name``, its layer i paired with the teacher's ``layers[i]``."""
    kind, _, index = name.partition("-")
    if kind == "hidden":
        return f"hidden-{layers[int(index) - 1] + 1}"
    return name if kind == LOGITS else f"{kind}-{layers[int(index)]}"
