"""What the diagnosis of heads and positions says, against sums written out one entry at a time."""

import math

import pytest
import torch
from transformers import AutoModel

from inhibitor import InhibitorConfig, convert
from inhibitor.distill.diagnosis import QUERIES, diagnose
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import TEACHER, contexts, inhibitor_layers
from inhibitor.models.families import output_modules

LAYERS = {0: 0, 1: 1}


def pair(folder, **config):
    torch.manual_seed(0)
    student = convert(AutoModel.from_pretrained(folder), InhibitorConfig(**config)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return student, Teacher(AutoModel.from_pretrained(folder, attn_implementation=TEACHER))


def batch(*lengths):
    """Rows of random tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(5, 40, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def effective(norms):
    total = sum(norms)
    return math.exp(-sum(n / total * math.log(n / total) for n in norms if n)) if total else 0.0


def by_hand(student, teacher, inputs, signed=True):
    """Keys and inhibited entries of one layer and head, and errors by position, in plain loops."""
    ours, theirs = contexts(student, inputs), contexts(teacher.model, inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    found = {name: [[0.0, 0.0] for _ in LAYERS] for name in ("keys", "teacher_keys", "inhibited")}
    error: dict[int, list[float]] = {}
    for layer, attention in inhibitor_layers(student).items():
        our, their = ours[layer], theirs[layer]
        gamma, delta = attention.gamma[1], attention.delta[1]
        for row, length in enumerate(lengths):
            q, k, v = (getattr(our, name)[row, 1, :length] for name in ("query", "key", "value"))
            score = gamma * our.scale * (q[:, None] - k[None]).abs().sum(-1)
            z = (score - score.mean(-1, keepdim=True) + delta).clamp(min=0)
            weights = torch.softmax(their.query[row, 1, :length] @ their.key[row, 1, :length].T * their.scale, -1)
            size = their.value[row, 1, :length].abs().sum(-1)
            for i in range(length):
                passed = (v.abs() if signed else v.clamp(min=0)) - z[i, :, None]
                for name, value, count in (
                    ("keys", effective(passed.clamp(min=0).sum(-1).tolist()), 1),
                    ("teacher_keys", effective((weights[i] * size).tolist()), 1),
                    ("inhibited", int((passed <= 0).sum()), passed.numel()),
                ):
                    found[name][layer][0] += value
                    found[name][layer][1] += count
                if layer == 1:
                    difference = (our.context - their.context)[row, i]
                    place = error.setdefault(i.bit_length(), [0.0, 0.0])
                    place[0] += difference.square().sum().item()
                    place[1] += their.context[row, i].square().sum().item()
    ratios = {name: [above / below for above, below in layers] for name, layers in found.items()}
    return ratios, [error[interval][0] / error[interval][1] for interval in sorted(error)]


@pytest.mark.parametrize("signed", [True, False])
@torch.no_grad()
def test_heads_and_positions_are_those_of_plain_loops(teacher, signed):
    student, wise = pair(teacher, delta=0.1, signed=signed)
    inputs = batch(13, 7, 9)
    found = diagnose(student, wise, [inputs], LAYERS)
    expected, by_position = by_hand(student, wise, inputs, signed)
    for name, layers in expected.items():
        assert [heads[1] for heads in found["heads"][name]] == pytest.approx(layers, rel=1e-3), name
        assert min(layers) > 0
    assert found["positions"]["first"] == [0, 1, 2, 4, 8]
    assert found["positions"]["context_error"][1] == pytest.approx(by_position, rel=1e-3)


@torch.no_grad()
def test_batches_add_up_and_padding_never_counts(teacher):
    student, wise = pair(teacher)
    whole = batch(13, 7, 9)
    parts = [
        {name: tensor[row : row + 1, :length] for name, tensor in whole.items()}
        for row, length in enumerate((13, 7, 9))
    ]
    together, apart = (diagnose(student, wise, batches, LAYERS) for batches in ([whole], parts))
    for name, layers in together["heads"].items():
        torch.testing.assert_close(torch.tensor(layers), torch.tensor(apart["heads"][name]), rtol=2e-3, atol=0)
    for layer, errors in enumerate(together["positions"]["context_error"]):
        assert errors == pytest.approx(apart["positions"]["context_error"][layer], rel=2e-3)


@torch.no_grad()
def test_a_layer_that_lets_everything_pass_has_all_keys_and_one_that_lets_nothing_none(teacher):
    student, wise = pair(teacher)
    first, second = inhibitor_layers(student).values()
    first.gamma.zero_()
    first.delta.zero_()
    second.delta.fill_(1e6)
    inputs = batch(12)
    heads = diagnose(student, wise, [inputs], LAYERS)["heads"]
    values = contexts(student, inputs)[0].value[0].abs().sum(-1)
    assert heads["keys"][0] == pytest.approx([effective(sizes.tolist()) for sizes in values], rel=1e-3)
    assert heads["inhibited"] == [[0.0, 0.0], [1.0, 1.0]]
    assert heads["keys"][1] == [0.0, 0.0]


@torch.no_grad()
def test_the_error_of_all_heads_and_of_all_positions_is_that_of_the_state(teacher):
    from inhibitor.distill.measure import errors

    student, wise = pair(teacher)
    inputs = batch(4, 4)
    found, whole = diagnose(student, wise, [inputs], LAYERS), errors(student, wise, [inputs], LAYERS)
    sizes = torch.stack([contexts(wise.model, inputs)[layer].context.square().sum((0, 1, 3)) for layer in LAYERS])
    weighted = torch.tensor(found["heads"]["context_error"]) * sizes
    torch.testing.assert_close(weighted.sum(1) / sizes.sum(1), torch.tensor(whole["context_error"]), rtol=1e-3, atol=0)


@torch.no_grad()
def test_errors_by_length_are_those_of_the_rows_of_that_length(teacher):
    from inhibitor.distill.measure import errors

    student, wise = pair(teacher)
    padded = batch(3, 4, 9, 4)
    found = errors(student, wise, [padded], LAYERS)
    assert found["lengths"]["first"] == [2, 4, 8]
    for interval, length in enumerate((3, 4, 9)):
        alone = [
            row[:length]
            for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
            if mask.sum() == length
        ]
        inputs = {"input_ids": torch.stack(alone), "attention_mask": torch.ones(len(alone), length, dtype=torch.long)}
        expected = errors(student, wise, [inputs], LAYERS)["hidden_error"]
        assert [layer[interval] for layer in found["lengths"]["hidden_error"]] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_long_rows_are_looked_at_in_some_places(teacher):
    student, wise = pair(teacher)
    found = diagnose(student, wise, [batch(3 * QUERIES)], LAYERS)
    assert found["positions"]["first"] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert all(0 < keys <= 3 * QUERIES for layer in found["heads"]["keys"] for keys in layer)


@torch.no_grad()
def test_layers_that_were_not_converted_are_left_out(teacher):
    student, wise = pair(teacher, layers=(1,))
    found = diagnose(student, wise, [batch(8)], LAYERS)
    assert [len(layers) for layers in found["heads"].values()] == [1, 1, 1, 1, 1]


@torch.no_grad()
def test_the_parts_of_the_heads_are_those_of_the_output(teacher):
    student, wise = pair(teacher)
    inputs = batch(6)
    found = diagnose(student, wise, [inputs], LAYERS)["heads"]["output_error"]
    for layer in LAYERS:
        sides = []
        for model in (student, wise.model):
            context, projection = contexts(model, inputs)[layer].context, output_modules(model)[layer]
            alone = torch.zeros(2, *context.shape)
            for head in range(2):
                alone[head, :, :, head] = context[:, :, head]
            sides.append(projection(alone.flatten(3)) - projection.bias)
        errors = (sides[0] - sides[1]).square().sum((1, 2, 3)) / sides[1].square().sum((1, 2, 3))
        assert found[layer] == pytest.approx(errors.tolist(), rel=1e-3)
