"""Where a student differs from its teacher: head by head, and along the sequence.

A context vector is H_i = Σ_j h_ij over the keys j: the teacher's h_ij is its softmax weight times the value, the
student's is what inhibition leaves of the value, before η and the length exponent. The share of key j is ‖h_ij‖₁ over
the sum of these norms, and the effective number of keys of query i is exp(−Σ_j share_j ln share_j): m where m keys give
alike, 1 where one gives all, 0 where nothing passes. One definition for both, so that they can be compared.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inhibitor.distill.observe import readable
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import InhibitorAttention, Tapped, contexts, inhibitor_layers
from inhibitor.models.families import output_modules
from inhibitor.ops import masks

QUERIES = 32  # of each row, at most, that are looked at for shares
INTERVALS = 32  # of positions: 0, 1, 2–3, 4–7, …
DIGITS = 4  # that are kept

Sums = dict[tuple[str, int], Any]


@torch.no_grad()
def diagnose(
    student: PreTrainedModel, teacher: Teacher, batches: Iterable[Mapping[str, Tensor]], layers: Mapping[int, int]
) -> dict[str, Any]:
    """Look at the attention of student and teacher, each fed by its own lower layers.

    Args:
        student: Its converted layers are looked at.
        teacher: Of any depth and size; where its contexts have another shape, there is no error.
        batches: Inputs of the teacher.
        layers: The teacher's layer for each of the student's.

    Returns:
        ``heads``: by converted layer and head, ``context_error`` (relative, squared), ``output_error`` (the same of the
        head's part in the output projection's sum), ``inhibited`` (the share of value entries in sight that come
        through as 0), ``keys`` and ``teacher_keys`` (the mean effective number of keys of a query). ``positions``:
        ``first``, the first position of each interval, and by layer the ``context_error`` in it; intervals double in
        length.
    """
    converted = inhibitor_layers(student)
    sums: Sums = defaultdict(float)
    for batch in batches:
        ours = contexts(student, readable(student, batch))
        theirs = contexts(teacher.model, readable(teacher.model, batch), last=max(layers.values()))
        real = batch["attention_mask"].bool()
        for layer, attention in converted.items():
            context, target = ours[layer].context, theirs[layers[layer]].context
            if context.shape == target.shape:
                _add_errors(sums, layer, context, target, real)
                parts = _parts(student, layer, context), _parts(teacher.model, layers[layer], target)
                if parts[0].shape == parts[1].shape:
                    _add(sums, "output", layer, *parts, real)
            taught = inhibitor_layers(teacher.model).get(layers[layer])
            _add_keys(sums, layer, (attention, ours[layer]), (taught, theirs[layers[layer]]), real)
    return _result(sums, list(converted))


def _add_errors(sums: Sums, layer: int, context: Tensor, target: Tensor, real: Tensor) -> None:
    """Squared errors and sizes of (batch, length, heads, value_dim) contexts, by head and by interval of positions."""
    interval = torch.tensor([position.bit_length() for position in range(context.shape[1])], device=context.device)
    for name, squares in _add(sums, "context", layer, context, target, real).items():
        by_position = squares.sum((0, 2))
        sums[f"{name} by position", layer] += by_position.new_zeros(INTERVALS).index_add(0, interval, by_position)


def _add(sums: Sums, what: str, layer: int, ours: Tensor, theirs: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Add up by head the squared errors and sizes of (batch, length, heads, …) vectors; those of each vector."""
    found = {
        name: values.double().square().sum(-1).masked_fill(~real[..., None], 0)
        for name, values in (("error", ours - theirs), ("size", theirs))
    }
    for name, squares in found.items():
        sums[f"{what} {name}", layer] += squares.sum((0, 1))
    return found


def _parts(model: PreTrainedModel, layer: int, context: Tensor) -> Tensor:
    """What each head gives to the attention's output, (batch, length, heads, hidden_size)."""
    weight = output_modules(model)[layer].get_parameter("weight")  # (hidden_size, heads × value_dim)
    return torch.einsum("bnhd,ohd->bnho", context, weight.view(-1, *context.shape[2:]))


def _add_keys(
    sums: Sums,
    layer: int,
    ours: tuple[InhibitorAttention, Tapped],
    theirs: tuple[InhibitorAttention | None, Tapped],
    real: Tensor,
) -> None:
    """What reaches some queries of each row from each key; of a teacher without inhibitor attention, its softmax's."""
    stride = -(-real.shape[1] // QUERIES)
    weight = real[:, None, ::stride].double()
    passed, inhibited = _passed(*ours, stride)
    attention, tapped = theirs
    given = _given(tapped, stride) if attention is None else _passed(attention, tapped, stride)[0]
    entries = ours[1].value.shape[-1] * _allowed(ours[1], stride).expand_as(passed).sum(-1)
    for name, values in (
        ("inhibited", inhibited.sum(-1)),
        ("entries", entries),
        ("keys", _effective(passed)),
        ("teacher_keys", _effective(given)),
        ("queries", torch.ones_like(weight)),
    ):
        sums[name, layer] += (values * weight).sum((0, 2))


def inhibited_share(attention: InhibitorAttention, tapped: Tapped) -> float:
    """The share of value entries in sight that come through as 0, over all heads and at most QUERIES queries."""
    stride = -(-tapped.query.shape[2] // QUERIES)
    passed, inhibited = _passed(attention, tapped, stride)
    entries = tapped.value.shape[-1] * _allowed(tapped, stride).expand_as(passed).sum()
    return (inhibited.sum() / entries).item()


def _allowed(tapped: Tapped, stride: int) -> Tensor:
    """Which keys every ``stride``-th query may see."""
    queries, keys = tapped.query.shape[2], tapped.key.shape[2]
    return masks.dense(tapped.attn_mask, tapped.is_causal, queries, keys, tapped.query.device)[:, :, ::stride]


def _passed(attention: InhibitorAttention, tapped: Tapped, stride: int) -> tuple[Tensor, Tensor]:
    """Σ_l (|v_jl| − z_ij)⁺ of every ``stride``-th query i, and how many entries in sight come through as 0.

    Both (batch, heads, queries, keys); one feature l at a time, for there is no room for all.
    """
    z = attention.inhibition(tapped.query[:, :, ::stride], tapped.key, _allowed(tapped, stride), False, tapped.scale)
    value = tapped.value.abs() if attention.config.signed else tapped.value.clamp(min=0)
    value = value.repeat_interleave(z.shape[1] // value.shape[1], 1)
    passed, inhibited = torch.zeros_like(z), torch.zeros_like(z)
    for feature in range(value.shape[-1]):
        left = (value[..., feature].unsqueeze(2) - z).clamp_(min=0)
        passed += left
        inhibited += left == 0
    return passed, inhibited.masked_fill_(z == torch.inf, 0)


def _given(tapped: Tapped, stride: int) -> Tensor:
    """The softmax weight times ‖v_j‖₁ of every ``stride``-th query, (batch, heads, queries, keys)."""
    allowed = _allowed(tapped, stride)
    groups = tapped.query.shape[1] // tapped.key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (tapped.key, tapped.value))
    scores = tapped.query[:, :, ::stride] @ key.mT * tapped.scale
    weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), -1)
    return weights.masked_fill(~allowed, 0) * value.abs().sum(-1).unsqueeze(2)


def _effective(norms: Tensor) -> Tensor:
    """The exponential of the entropy of the shares along the last dimension; 0 where all are 0."""
    total = norms.sum(-1, keepdim=True)
    shares = norms / total.masked_fill(total == 0, 1)
    return torch.exp(-torch.special.xlogy(shares, shares).sum(-1)).masked_fill(total.squeeze(-1) == 0, 0)


def _result(sums: Mapping[tuple[str, int], Any], layers: Sequence[int]) -> dict[str, Any]:
    def ratios(above: str, below: str) -> list[list[float]]:
        pairs = [(sums[above, layer], sums[below, layer]) for layer in layers if (above, layer) in sums]
        found = [(top / bottom)[(bottom > 0).expand_as(top)].tolist() for top, bottom in pairs]
        return [[float(f"{value:.{DIGITS}g}") for value in values] for values in found]

    heads = {
        "context_error": ratios("context error", "context size"),
        "output_error": ratios("output error", "output size"),
        "inhibited": ratios("inhibited", "entries"),
        "keys": ratios("keys", "queries"),
        "teacher_keys": ratios("teacher_keys", "queries"),
    }
    errors = ratios("error by position", "size by position")
    first = [0, *(2**interval for interval in range(len(errors[0]) - 1))] if errors else []
    return {"heads": heads, "positions": {"first": first, "context_error": errors}}
