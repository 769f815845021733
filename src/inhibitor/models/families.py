"""Which transformers can be converted, and where their attention lies: one entry each."""

from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from inhibitor.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where the parts of a model type are.

    Args:
        model_type: The name in transformers.
        layers: Path from the base model to its list of layers.
        attention: Path from a layer to the module that calls the attention function.
        projections: Names of the query, key and value projections inside that module.
        output: Path from a layer to the projection of the attention's context.
    """

    model_type: str
    layers: str
    attention: str
    projections: tuple[str, ...]
    output: str


FAMILIES = {
    family.model_type: family
    for family in (
        Family("bert", "encoder.layer", "attention.self", ("query", "key", "value"), "attention.output.dense"),
        Family("distilbert", "transformer.layer", "attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin"),
        Family("electra", "encoder.layer", "attention.self", ("query", "key", "value"), "attention.output.dense"),
        Family("roberta", "encoder.layer", "attention.self", ("query", "key", "value"), "attention.output.dense"),
    )
}
PREFIX = "inhibitor-"


def family_of(model: nn.Module) -> Family:
    """The family of a converted or unconverted model; ``ModelError`` if there is no entry for it."""
    model_type = str(getattr(model.config, "model_type", ""))
    family = FAMILIES.get(model_type.removeprefix(PREFIX))
    if family is None:
        raise ModelError(
            type(model).__name__,
            expected="a model of type " + ", ".join(FAMILIES),
            got=f"model_type {model_type!r}",
            remedy="Add an entry to inhibitor.models.families if its attention goes through AttentionInterface.",
        )
    return family


def layer_modules(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, from the lowest."""
    return list(attrgetter(family_of(model).layers)(model.base_model))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a model, layer by layer."""
    return [attrgetter(family_of(model).attention)(layer) for layer in layer_modules(model)]


def output_modules(model: nn.Module) -> list[nn.Module]:
    """The output projections of a model's attention, layer by layer."""
    return [attrgetter(family_of(model).output)(layer) for layer in layer_modules(model)]
