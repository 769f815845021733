"""How far a student is from its teacher, layer by layer, and how one head of each looks at one sentence."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.distill.losses import squared_errors
from inhibitor.models.attention import contexts, inhibitor_layers, tapping


@torch.no_grad()
def errors(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, list[float]]:
    """Relative squared errors of context and hidden states per layer, each model fed by its own lower layers.

    Returns:
        ``context_error`` and ``hidden_error``: Σ(student − teacher)² / Σ teacher² over all real tokens.
    """
    totals: Tensor | None = None
    for batch in batches:
        found = [_states(model, batch) for model in (student, teacher)]
        pairs = [
            torch.stack([squared_errors(s, t, batch["attention_mask"]) for s, t in zip(*kind, strict=True)])
            for kind in zip(*found, strict=True)
        ]
        sums = torch.stack(pairs)
        totals = sums if totals is None else totals + sums
    if totals is None:
        raise ValueError("no batches to measure on")
    context_error, hidden_error = (totals[..., 0] / totals[..., 1]).tolist()
    return {"context_error": context_error, "hidden_error": hidden_error}


def _states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Contexts and hidden states of every layer, embeddings excluded."""
    with tapping(model) as tapped:
        output = model.base_model(**batch, output_hidden_states=True)
    return [tap.context for tap in tapped], output.hidden_states[1:]


def parameters(student: PreTrainedModel) -> dict[str, list[list[float]]]:
    """γ, η, δ and ρ: a list of heads (or one value) for each converted layer."""
    layers = [dict(attention.named_parameters()) for attention in inhibitor_layers(student).values()]
    return {name: [layer[name].tolist() for layer in layers] for name in layers[0]}


@torch.no_grad()
def attention_example(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> dict[str, Any]:
    """The teacher's softmax weights and the student's inhibition Z on one sentence, in the middle converted layer.

    The head is the one whose teacher attends most narrowly there (lowest mean entropy).
    """
    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
    inputs = {"input_ids": encoded["input_ids"].to(teacher.device)}
    layers = inhibitor_layers(student)
    layer = list(layers)[len(layers) // 2]
    theirs = contexts(teacher, inputs, last=layer)[-1]
    ours = contexts(student, inputs, last=layer)[-1]
    weights = torch.softmax(theirs.query @ theirs.key.mT * theirs.scale, -1)[0]
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean(-1)
    head = int(entropy.argmin())
    inhibition = layers[layer].inhibition(ours.query, ours.key, ours.attn_mask, ours.is_causal, ours.scale)[0, head]
    return {
        "text": text,
        "tokens": tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist()),
        "layer": layer,
        "head": head,
        "softmax": weights[head].tolist(),
        "inhibition": inhibition.tolist(),
    }
