"""``convert``: swap a model's softmax attention for inhibitor attention, in place."""

import copy

import torch
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from inhibitor.config import Config
from inhibitor.errors import ModelError
from inhibitor.models.attention import NAME, InhibitorAttention
from inhibitor.models.classes import config_class, model_class
from inhibitor.models.config import InhibitorConfig
from inhibitor.models.families import PREFIX, attention_modules, family_of

BEFORE_REACH = {"reach": None, "query_gain": False}  # what a configuration means that does not speak of them


def convert(model: PreTrainedModel, config: InhibitorConfig | None = None) -> PreTrainedModel:
    """Give ``model`` inhibitor attention: all weights stay, γ, η, δ, ρ, τ and u are added.

    The class and the configuration become the inhibitor ones, so that ``save_pretrained`` writes a model that
    ``AutoModel*.from_pretrained`` loads after ``import inhibitor``, and refuses without it. A converted model is not
    yet a good one: calibrate or distil it. Dropout of attention weights, of which it has none, has no effect on it.

    Args:
        model: A BERT, DistilBERT, ELECTRA or RoBERTa model with any head: the whole model, not the base model in it.
        config: What attention it gets; the default converts every layer with parameters per head.

    Returns:
        The same object.

    Raises:
        ModelError: No model of transformers, a model type without an entry, without attention interface, converted
            before, or layers it does not have.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> type(convert(BertModel(tiny))).__name__
        'InhibitorBertModel'
    """
    config = config or InhibitorConfig()
    check_types(model, config, InhibitorConfig)
    family = family_of(model)
    name = type(model).__name__
    if model.config.model_type.startswith(PREFIX):
        raise ModelError(name, expected="a softmax model", got="a converted one", remedy="Convert its teacher instead.")
    if not model._supports_attention_backend:
        raise ModelError(
            name,
            expected="a model that calls AttentionInterface",
            got="one that does not",
            remedy="Choose an architecture with _supports_attention_backend.",
        )
    old, new = model.config, copy.deepcopy(model.config)
    new.__class__ = config_class(family.model_type)
    new.__dict__.pop("model_type", None)  # a configuration read from a file has one of its own before its class's
    new.inhibitor = config.model_dump(mode="json")
    new.output_attentions = False  # Z is asked of a call; a configuration that asks could not be saved
    _check_layers(config, len(attention_modules(model)), name)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    new._attn_implementation = NAME
    adopt(model)
    attach(model)
    return model


def check_types(model: PreTrainedModel, config: Config, kind: type[Config]) -> None:
    """Refuse what is no model of transformers, or no configuration of that kind."""
    remedies = {"model": "Load it with AutoModel.from_pretrained; a wrapped one is in its module."}
    for what, given, expected in (("model", model, PreTrainedModel), ("config", config, kind)):
        if not isinstance(given, expected):
            raise ModelError(
                what,
                expected=expected.__name__,
                got=type(given).__name__,
                remedy=remedies.get(what, f"{kind.__name__}.parse reads plain data."),
            )


def adopt(model: PreTrainedModel) -> None:
    """Give a model and the base model within it their inhibitor classes, which refuse another attention."""
    for part in {model, model.base_model}:
        if not part.config_class.model_type.startswith(PREFIX):
            part.__class__ = model_class(part.__class__)
        # As __init__ registers a class, by its name, for hidden_states; before transformers 5.23 keys were names too.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(part)), part._can_record_outputs)


def attach(model: PreTrainedModel) -> None:
    """Add the learnable parameters that ``model.config.inhibitor`` describes to its attention modules."""
    values = getattr(model.config, NAME, None)
    if values is None:
        raise ModelError(
            type(model).__name__,
            expected=f"{NAME!r} in its configuration",
            got="none",
            remedy="Make it with inhibitor.convert.",
        )
    config = InhibitorConfig.parse(BEFORE_REACH | values if isinstance(values, dict) else values, source=NAME)
    model.config.inhibitor = config.model_dump(mode="json")  # whole, whatever the file left to the defaults
    modules = attention_modules(model)
    _check_layers(config, len(modules), type(model).__name__)
    heads = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    for index, module in enumerate(modules):
        if config.layers is None or index in config.layers:
            place = next(module.parameters()).device
            with torch.device(place):
                module.inhibitor = InhibitorAttention(config, heads, head_dim)


def _check_layers(config: InhibitorConfig, depth: int, name: str) -> None:
    wrong = [layer for layer in config.layers or () if not 0 <= layer < depth]
    if wrong or config.layers == ():
        raise ModelError(
            "layers",
            expected=f"indices from 0 to {depth - 1} of {name}",
            got=str(list(config.layers or ())),
            remedy="Leave layers out to convert all.",
        )
