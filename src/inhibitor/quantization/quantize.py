"""``quantize``: put a model's parts on integers, in place, with steps found on a few hundred sentences."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inhibitor.errors import DataError, ModelError
from inhibitor.models.attention import inhibitor_layers
from inhibitor.models.config import Int8Config
from inhibitor.models.convert import check_types
from inhibitor.models.families import PREFIX
from inhibitor.models.int8 import INT8, empty, freeze, integer_layers, parts
from inhibitor.models.int8_layers import FakeInt8Linear
from inhibitor.quantization.calibrate import calibrate_attention, input_grid
from inhibitor.quantization.samples import collect


def quantize(
    model: PreTrainedModel, config: Int8Config | None, batches: Iterable[Mapping[str, Tensor]]
) -> PreTrainedModel:
    """Turn a float inhibitor model's attention, linear layers and embeddings into integers.

    Steps that quantisation-aware training has learned are kept. ``save_pretrained`` then writes int8 weights, and
    ``AutoModel*.from_pretrained`` loads them after ``import inhibitor``.

    Args:
        model: With inhibitor attention, in float32, in evaluation mode; changed in place.
        config: What becomes integers; the default is everything there is.
        batches: Inputs of the base model, a few hundred sentences like those that it will read, with ``attention_mask``
            where there is padding; or one of them.

    Returns:
        The same object; with int8 linear layers all but its head is frozen.

    Raises:
        ModelError: A softmax model, one with int8 layers already, of another dtype, in training mode, with a γ or τ
            that is not above 0, or with an output layer that shares the embedding table.
        DataError: No inputs or no token in the batches, or NaN or infinity in some layer.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from inhibitor import Int8Config, convert, quantize
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> batch = {"input_ids": torch.randint(0, 100, (8, 16))}
        >>> quantize(convert(BertModel(tiny)).eval(), Int8Config(), [batch])(**batch).last_hidden_state.shape
        torch.Size([8, 16, 32])
    """
    config = config or Int8Config()
    check(model, config)
    batches = list(batches) if not isinstance(batches, Mapping) else [batches]
    if not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches):
        raise DataError(
            "batches",
            expected="a list of a model's inputs by name, with input_ids",
            got=", ".join(sorted({type(batch).__name__ for batch in batches})),
            remedy="For example [{'input_ids': ids, 'attention_mask': mask}].",
        )
    found = list(parts(model, config))
    linears = {part.path: part.module for part in found if part.kind == "linear"}
    readers = {part.reader: part.path for part in found if part.reader is not None}
    samples = collect(model, batches, linears)
    learned = set(integer_layers(model))
    for part in found:
        made: Any = empty(part, config)
        model.set_submodule(part.path, made)
        if part.kind == "linear":
            even = part.path in readers
            if isinstance(part.module, FakeInt8Linear):
                grid = part.module.multiplier, part.module.zero_point
            else:
                seen = samples.inputs[part.path], samples.ranges[part.path]
                grid = input_grid(part.module, *seen, even, config.weights)
            made.fill(part.module, *grid)
            if even and config.linear == INT8:
                model.get_submodule(readers[part.path]).feed(made)
        elif part.kind == "embeddings":
            made.fill(part.module)
    for layer, attention in integer_layers(model).items():
        if layer not in learned:
            calibrate_attention(attention, *samples.heads[layer], samples.largest[layer])
    model.config.int8 = config.model_dump(mode="json")
    if config.embeddings == INT8 and getattr(model.config, "sinusoidal_pos_embds", False):
        model.config.sinusoidal_pos_embds = False  # DistilBERT's, which it would make anew at loading; they are codes
    freeze(model)
    return model.eval()


def check(model: PreTrainedModel, config: Int8Config) -> None:
    """Refuse a model that cannot be quantised as ``config`` says.

    Raises:
        ModelError: As ``quantize`` does.
    """
    check_types(model, config, Int8Config)
    name = type(model).__name__
    before = getattr(model.config, INT8, None)
    rounded = [part for part in ("linear", "embeddings") if before is not None and before[part] == "fake"]
    trained = [part for part in rounded if getattr(config, part) == "float"]
    weights = (before or {}).get("weights", 8)
    shared = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    if not str(model.config.model_type).startswith(PREFIX):
        expected, got = "a model with inhibitor attention", f"model_type {model.config.model_type!r}"
        remedy = "Distil it into an inhibitor student first."
    elif before is not None and (before["linear"] == INT8 or before["embeddings"] == INT8):
        expected, got, remedy = "a float model", "one with int8 layers", "Quantize the float model that it came from."
    elif before is not None and before["attention"] != config.attention:
        expected, got = f"attention of {config.attention} bits", f"one trained with {before['attention']}"
        remedy = f"Set attention={before['attention']}, or begin with the float model."
    elif "linear" in rounded and weights != config.weights:
        expected, got = f"weights of {config.weights} bits", f"some trained with {weights}"
        remedy = f"Set weights={weights}, or begin with the float model."
    elif trained:
        expected, got = f"{trained[0]}='int8'", f"{trained[0]}='float', for weights that were trained to be rounded"
        remedy = f"Set {trained[0]}='int8', or begin with the float model."
    elif {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        expected, got, remedy = "weights in float32", str(model.dtype), "Load it with dtype=torch.float32."
    elif model.training:
        expected, got, remedy = "a model in evaluation mode", "one in training", "Call model.eval() first."
    elif config.embeddings != "float" and shared:
        expected, got = "embeddings of their own", "a table that the output layer shares"
        remedy = "Leave the embeddings in float."
    else:
        _check_parameters(model)
        return
    raise ModelError(name, expected=expected, got=got, remedy=remedy)


def _check_parameters(model: PreTrainedModel) -> None:
    remedies = {
        "gamma": "A negative slope has no integer form: train that layer on.",
        "reach": "No key is heard within it: train that layer on.",
    }
    for layer, attention in inhibitor_layers(model).items():
        for name, remedy in remedies.items():
            values = getattr(attention, name)
            if values is not None and not bool((values > 0).all()):
                raise ModelError(
                    f"{name} of layer {layer}",
                    expected="numbers greater than 0",
                    got=str(values.tolist()),
                    remedy=remedy,
                )
