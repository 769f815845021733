"""How far a student is from its teacher, layer by layer, and how one head of each looks at one sentence."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.distill.diagnosis import inhibited_share
from inhibitor.distill.losses import squared_errors
from inhibitor.distill.observe import observe, on_teacher, readable
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import PARAMETERS, contexts, inhibitor_layers


@torch.no_grad()
def errors(
    student: PreTrainedModel, teacher: Teacher, batches: Iterable[Mapping[str, Tensor]], layers: Mapping[int, int]
) -> dict[str, Any]:
    """Relative squared errors of context and hidden states per layer, each model fed by its own lower layers.

    Args:
        student: Of any depth.
        teacher: Of any depth and size; what has another shape than the student's is left out.
        batches: Inputs of the teacher.
        layers: The teacher's layer for each of the student's.

    Returns:
        ``context_error``, ``output_error`` (of contexts after the output projection) and ``hidden_error``:
        Σ(student − teacher)² / Σ teacher² over all real tokens. ``lengths``: ``first``, the first length of each
        interval of rows' lengths that occurs (1, 2–3, 4–7, …), and by layer the ``hidden_error`` of the rows in it.
    """
    names = {
        "context_error": [f"context-{i}" for i in layers],
        "output_error": [f"output-{i}" for i in layers],
        "hidden_error": [f"hidden-{i + 1}" for i in layers],
    }
    wanted = [name for kind in names.values() for name in kind]
    totals: dict[str, dict[int, Tensor]] = {}
    for batch in batches:
        mask = batch["attention_mask"]
        intervals = torch.tensor([int(length).bit_length() for length in mask.sum(1).tolist()], device=mask.device)
        ours = observe(student, batch, wanted)
        theirs = teacher.compute(batch, {on_teacher(name, layers) for name in wanted})
        for name in wanted:
            state, target = ours[name], theirs[on_teacher(name, layers)]
            if state.shape == target.shape:
                of_name = totals.setdefault(name, {})
                for interval in set(intervals.tolist()):
                    rows = intervals == interval
                    parts = squared_errors(state[rows], target[rows], mask[rows])
                    of_name[interval] = of_name.get(interval, 0) + parts
    ratios = {name: _ratio(torch.stack(list(parts.values())).sum(0)) for name, parts in totals.items()}
    found = {kind: [ratios[name] for name in known if name in ratios] for kind, known in names.items()}
    hidden = [totals[name] for name in names["hidden_error"] if name in totals]
    lengths = sorted(hidden[0]) if hidden else []
    by_length = [[_ratio(parts[interval]) for interval in lengths] for parts in hidden]
    return {**found, "lengths": {"first": [1 << interval >> 1 for interval in lengths], "hidden_error": by_length}}


def _ratio(parts: Tensor) -> float:
    return (parts[0] / parts[1]).item()


class Trace:
    """What is logged of a student while it is trained, beside its loss, on a few rows; flat, as trackers want it.

    For each converted layer i: ``context_error/i`` and ``inhibited/i``, the share of values that come through as 0; and
    the means over heads of γ, η, δ, ρ and τ, ``gamma/i`` and so on.

    Args:
        student: Read only.
        teacher: Asked once.
        batch: The rows.
        layers: The teacher's layer for each of the student's.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Teacher, batch: Mapping[str, Tensor], layers: Mapping[int, int]
    ) -> None:
        self.student, self.inputs, self.mask = student, readable(student, batch), batch["attention_mask"]
        targets = teacher.compute(batch, {f"context-{layers[layer]}" for layer in inhibitor_layers(student)})
        self.targets = {layer: targets[f"context-{layers[layer]}"] for layer in inhibitor_layers(student)}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Look at the student as it is now."""
        training = self.student.training
        found = contexts(self.student.eval(), self.inputs)
        self.student.train(training)
        traced = {}
        for layer, attention in inhibitor_layers(self.student).items():
            context, target = found[layer].context, self.targets[layer]
            if context.shape == target.shape:
                error, size = squared_errors(context, target, self.mask)
                traced[f"context_error/{layer}"] = (error / size).item()
            traced[f"inhibited/{layer}"] = inhibited_share(attention, found[layer])
            traced |= {
                f"{name}/{layer}": values.mean().item()
                for name in PARAMETERS
                if (values := getattr(attention, name)) is not None
            }
        return traced


def step(logs: Mapping[str, Any], layer: int | None) -> dict[str, Any]:
    """What the report reads of one logged step: the trainer's flat log with its traces gathered by layer."""
    entry = {name: logs[name] for name in ("step", "loss", "grad_norm", "learning_rate") if name in logs}
    flat: dict[str, dict[int, float]] = {name.partition("/")[0]: {} for name in logs if "/" in name}
    for name, value in logs.items():
        kind, slash, index = name.partition("/")
        if slash:
            flat[kind][int(index)] = value
    layers = sorted({index for values in flat.values() for index in values})
    traces = {kind: [values[index] for index in layers] for kind, values in flat.items() if len(values) == len(layers)}
    return {**entry, "layer": layer, **({"traces": {"layers": layers, **traces}} if layers else {})}


def parameters(student: PreTrainedModel) -> dict[str, list[list[float]]]:
    """γ, η, δ, ρ and τ: a list of heads (or one value) for each converted layer; empty where a model has none."""
    layers = inhibitor_layers(student).values()
    return {
        name: [values.tolist() for attention in layers if (values := getattr(attention, name)) is not None]
        for name in PARAMETERS
    }


@torch.no_grad()
def attention_example(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pairs: Mapping[int, int],
) -> dict[str, Any]:
    """The teacher's softmax weights and the student's inhibition Z on one sentence, in the middle converted layer.

    The head is the one whose teacher attends most narrowly there (lowest mean entropy).
    """
    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
    inputs = {"input_ids": encoded["input_ids"].to(teacher.device)}
    layers = inhibitor_layers(student)
    layer = list(layers)[len(layers) // 2]
    theirs = contexts(teacher, inputs, last=pairs[layer])[pairs[layer]]
    ours = contexts(student, inputs, last=layer)[layer]
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
