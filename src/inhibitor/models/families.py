"""Which transformers can be converted, and where their attention lies: one entry each."""

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import nn

from inhibitor.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where the parts of a model type are.

    Args:
        model_type: The name in transformers.
        layers: Path from the base model to its list of layers.
        attention: Path from a layer to the module that calls the attention function.
        projections: Names of the query, key and value projections inside that module.
        output: Path from a layer to the projection of the attention's context.
        feed_forward: Paths from a layer to its feed-forward part: the first linear layer, its activation, the second.
        pads_positions: Whether a token's position is counted from behind the padding token's id, as RoBERTa does.
    """

    model_type: str
    layers: str
    attention: str
    projections: tuple[str, ...]
    output: str
    feed_forward: tuple[str, str, str]
    pads_positions: bool = False


def _like_bert(model_type: str) -> Family:
    return Family(
        model_type,
        layers="encoder.layer",
        attention="attention.self",
        projections=("query", "key", "value"),
        output="attention.output.dense",
        feed_forward=("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
        pads_positions=model_type == "roberta",
    )


FAMILIES = {
    family.model_type: family
    for family in (
        *(_like_bert(model_type) for model_type in ("bert", "electra", "roberta")),
        Family(
            "distilbert",
            layers="transformer.layer",
            attention="attention",
            projections=("q_lin", "k_lin", "v_lin"),
            output="attention.out_lin",
            feed_forward=("ffn.lin1", "ffn.activation", "ffn.lin2"),
        ),
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


def longest_input(model: "PreTrainedModel") -> int | None:
    """Tokens that a model reads at most; None where nothing limits them."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    family = FAMILIES.get(model.config.model_type.removeprefix(PREFIX))
    if positions is None or family is None or not family.pads_positions:
        return positions
    return positions - int(model.config.pad_token_id) - 1


def layer_modules(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, from the lowest."""
    return list(attrgetter(family_of(model).layers)(model.base_model))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a model, layer by layer."""
    return [attrgetter(family_of(model).attention)(layer) for layer in layer_modules(model)]


def output_modules(model: nn.Module) -> list[nn.Module]:
    """The output projections of a model's attention, layer by layer."""
    return [attrgetter(family_of(model).output)(layer) for layer in layer_modules(model)]


def feed_forward_modules(model: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """The first linear layer, the activation and the second linear layer of a model's layers, layer by layer."""
    paths = attrgetter(*family_of(model).feed_forward)
    return [paths(layer) for layer in layer_modules(model)]
