"""Inhibitor models as transformers knows them: a ``model_type`` and a class for each architecture.

A converted BERT saves itself as ``inhibitor-bert``. ``AutoModel*.from_pretrained`` then finds an inhibitor model
after ``import inhibitor``, and fails on an unknown type without it. Configurations are registered at import; model
classes when the first such configuration is made, so that ``import inhibitor`` loads no model code. A published student
(``inhibitor publish``) loads by the same call, and its teacher with it. Every class is found in this module by its
name, as pickle looks for it.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from inhibitor.errors import ModelError
from inhibitor.models.families import FAMILIES, PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@cache
def config_class(model_type: str) -> type["PreTrainedConfig"]:
    """The configuration class of a family's inhibitor models, registered with ``AutoConfig``."""
    base = CONFIG_MAPPING[model_type]

    def __post_init__(self: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__post_init__(self, **kwargs)
        _register_models(model_type)

    def output_attentions(self: Any) -> Any:
        return self._output_attentions

    def set_output_attentions(self: Any, value: Any) -> None:
        if value:  # transformers would ask for its eager softmax
            raise ModelError(
                "output_attentions",
                expected="an argument of a call",
                got="one of the configuration",
                remedy="Call model(..., output_attentions=True).",
            )
        self._output_attentions = value

    name = f"Inhibitor{base.__name__}"
    members = {
        "__doc__": f"Configuration of a {model_type} model with inhibitor attention.",
        "__module__": __name__,
        "__post_init__": __post_init__,
        "model_type": PREFIX + model_type,
        "output_attentions": property(output_attentions, set_output_attentions),
    }
    created: type[PreTrainedConfig] = type(name, (base,), members)
    AutoConfig.register(PREFIX + model_type, created)
    return created


@cache
def _register_models(model_type: str) -> None:
    """Make a class for every head that transformers has for this model type, and register each."""
    from transformers.models.auto import modeling_auto

    plain, inhibitor = CONFIG_MAPPING[model_type], config_class(model_type)
    for name in dir(modeling_auto):
        mapping = getattr(modeling_auto, name)
        if name.startswith("MODEL_") and name.endswith("MAPPING") and plain in mapping:
            architecture = mapping[plain]
            if isinstance(architecture, type):
                mapping.register(inhibitor, model_class(architecture), exist_ok=True)


@cache
def model_class(architecture: type["PreTrainedModel"]) -> type["PreTrainedModel"]:
    """The inhibitor form of an architecture: ``InhibitorBertModel`` for ``BertModel``."""
    from inhibitor.models.attention import NAME, InhibitorAttention
    from inhibitor.models.convert import adopt, attach
    from inhibitor.models.int8 import attach_int8, freeze
    from inhibitor.models.int8_layers import Int8Embedding

    def refuse_other(attn_implementation: Any) -> None:
        if attn_implementation not in (None, NAME):
            raise ModelError(
                "attn_implementation",
                expected=repr(NAME),
                got=repr(attn_implementation),
                remedy="This model was trained with inhibitor attention; load its teacher for softmax.",
            )

    def __init__(self: Any, config: "PreTrainedConfig", *args: Any, **kwargs: Any) -> None:  # noqa: N807
        refuse_other(config._attn_implementation)
        config._attn_implementation = NAME
        architecture.__init__(self, config, *args, **kwargs)
        adopt(self)
        attach(self)
        attach_int8(self)

    def _init_weights(self: Any, module: Any) -> None:
        if isinstance(module, InhibitorAttention):
            module.reset_parameters()
        else:
            architecture._init_weights(self, module)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_input_embeddings(), Int8Embedding):
            raise ModelError(
                "embeddings in int8",
                expected="the size that they have",
                got="another",
                remedy="Resize the float model, and quantize that.",
            )
        return architecture.resize_token_embeddings(self, *args, **kwargs)

    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        refuse_other(attn_implementation)

    def from_pretrained(
        cls: Any, /, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        from inhibitor.models.difference import find_difference, read_difference

        name = source = pretrained_model_name_or_path
        given = kwargs.get("state_dict") is not None
        difference = None if name is None or given else find_difference(str(name), **kwargs)
        if difference is not None:
            source, config = None, config or str(name)
            kwargs["state_dict"] = read_difference(difference, **kwargs)
        found = architecture.from_pretrained.__func__(cls, source, *args, config=config, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if difference is not None:  # a pipeline takes the tokenizer from there, an adapter is saved with it
            model.name_or_path = model.config._name_or_path = str(name)
        freeze(model)
        return found

    members = {
        "__doc__": f"{architecture.__name__} with inhibitor attention.",
        "__module__": __name__,
        "__init__": __init__,
        "_init_weights": _init_weights,
        "from_pretrained": classmethod(from_pretrained),
        "resize_token_embeddings": resize_token_embeddings,
        "set_attn_implementation": set_attn_implementation,
        "config_class": config_class(architecture.config_class.model_type),
    }
    return type(f"Inhibitor{architecture.__name__}", (architecture,), members)


def __getattr__(name: str) -> Any:
    plain = getattr(transformers, name.removeprefix("Inhibitor"), None) if name.startswith("Inhibitor") else None
    for model_type in FAMILIES:
        base = CONFIG_MAPPING[model_type]
        if plain is base:
            return config_class(model_type)
        if getattr(plain, "config_class", None) is base:
            return model_class(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _model_type in FAMILIES:
    config_class(_model_type)
