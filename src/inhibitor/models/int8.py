"""Which parts of a model turn into integers; made empty here, filled by ``quantize``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation

from inhibitor.errors import ModelError
from inhibitor.models.attention import NAME, inhibitor_layers
from inhibitor.models.config import Int8Config
from inhibitor.models.families import attention_modules, feed_forward_modules, layer_modules
from inhibitor.models.int8_attention import IntegerInhibitorAttention
from inhibitor.models.int8_layers import FakeInt8Embedding, FakeInt8Linear, Int8Embedding, Int8Linear

INT8 = "int8"
Kind = Literal["attention", "linear", "activation", "embeddings"]

ACTIVATIONS: dict[type[nn.Module], str] = {  # that can follow a product in 8 bits, and their names there
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}


@dataclass(frozen=True)
class Part:
    """A module that turns into integers.

    Args:
        kind: What of the model it is.
        path: Of the module.
        module: As it is now.
        activation: What a linear layer's output goes through, if that becomes one with the layer.
        reader: The path of the linear layer that reads its codes then.
    """

    kind: Kind
    path: str
    module: Any
    activation: str | None = None
    reader: str | None = None


def parts(model: PreTrainedModel, config: Int8Config) -> Iterator[Part]:
    """Each part that ``config`` turns into integers and is none yet; a layer that gives codes before their reader."""
    names = {module: name for name, module in model.named_modules()}
    for attention in inhibitor_layers(model).values():
        if not isinstance(attention, IntegerInhibitorAttention):
            yield Part("attention", names[attention], attention)
    if config.embeddings != "float":
        rounded = FakeInt8Embedding if config.embeddings == "fake" else ()
        for module in model.base_model.modules():
            if isinstance(module, nn.Embedding) and not isinstance(module, rounded):
                yield Part("embeddings", names[module], module)
    if config.linear != "float":
        done = FakeInt8Linear if config.linear == "fake" else ()
        for layer, feed_forward in zip(layer_modules(model), feed_forward_modules(model), strict=True):
            first, between, second = feed_forward
            plain = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)  # not wrapped, as an adapter does
            activation = ACTIVATIONS.get(type(between)) if plain else None
            for module in layer.modules():
                if isinstance(module, nn.Linear) and not isinstance(module, done):
                    given = (activation, names[second]) if module is first and activation else ()
                    yield Part("linear", names[module], module, *given)
                elif module is between and activation and config.linear == "int8":
                    yield Part("activation", names[module], module)


def empty(part: Part, config: Int8Config) -> nn.Module:
    """The integer part that takes a module's place, of its shape and on its device; attention keeps its parameters."""
    module = part.module
    if part.kind == "activation":  # the linear layer before it has it
        return nn.Identity()
    with torch.device(next(module.parameters()).device):
        match part.kind:
            case "attention":
                made = IntegerInhibitorAttention(module.config, module.heads, module.head_dim, config.attention)
                made.load_state_dict(module.state_dict(), strict=False)
                return made
            case "embeddings":
                if config.embeddings == "fake":
                    return FakeInt8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
                return Int8Embedding(module.num_embeddings, module.embedding_dim)
        sizes = module.in_features, module.out_features, module.bias is not None
        if config.linear == "fake":
            return FakeInt8Linear(*sizes, config.weights)
        return Int8Linear(*sizes, part.activation, config.weights)


def attach_int8(model: PreTrainedModel) -> None:
    """Put empty integer parts in the places that ``model.config.int8`` names, if it names any; weights come after.

    Raises:
        ConfigError: What is written there is not an ``Int8Config``.
        ModelError: Another dtype than float32 was asked for: scales must not be rounded.
    """
    values = getattr(model.config, INT8, None)
    if values is None:
        return
    config = Int8Config.parse(values, source=INT8)
    if torch.get_default_dtype() != torch.float32:
        raise ModelError(
            "dtype",
            expected="float32 for what is not int8",
            got=str(torch.get_default_dtype()),
            remedy="Load an int8 model with dtype=torch.float32.",
        )
    model.config.int8 = config.model_dump(mode="json")  # whole, whatever the file left to the defaults
    for part in list(parts(model, config)):
        model.set_submodule(part.path, empty(part, config))
    freeze(model)


def freeze(model: PreTrainedModel) -> None:
    """Where ``model.config.int8`` has int8 linear layers, which pass no gradient on, train no more than the head."""
    if (getattr(model.config, INT8, None) or {}).get("linear") == INT8:
        model.base_model.requires_grad_(False)


def integer_layers(model: nn.Module) -> dict[int, IntegerInhibitorAttention]:
    """The layers of a model that have integer attention, by index."""
    found = ((index, getattr(module, NAME, None)) for index, module in enumerate(attention_modules(model)))
    return {index: attention for index, attention in found if isinstance(attention, IntegerInhibitorAttention)}
