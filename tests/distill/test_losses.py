"""Losses: golden numbers, zero at the teacher, blind to padding, the same in parts as whole."""

import math

import pytest
import torch

from inhibitor.distill import losses
from inhibitor.errors import ModelError

BY_TOKEN = (losses.mse, losses.relative, losses.cosine, lambda s, t, m: losses.masked_lm(s, t, m, 2.0))
BY_ROW = (lambda s, t: losses.soft_probabilities(s, t, 3.0), losses.predictions_mse)


def test_mse_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # batch 1, length 2, heads 1, value_dim 2
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]]])
    assert losses.mse(student, teacher, torch.tensor([[1, 1]])).item() == pytest.approx((1 + 4) / 4)
    assert losses.mse(student, teacher, torch.tensor([[1, 0]])).item() == pytest.approx(1 / 2)


def test_relative_by_hand():
    student = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    teacher = torch.tensor([[[0.0, 2.0], [3.0, 2.0]]])
    assert losses.relative(student, teacher, torch.tensor([[1, 1]])).item() == pytest.approx((1 + 4) / (4 + 9 + 4))
    assert losses.relative(10 * student, 10 * teacher, torch.tensor([[1, 1]])).item() == pytest.approx(5 / 17)


def test_cosine_by_hand():
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[0.0, 2.0], [3.0, 3.0]]])
    assert losses.cosine(student, teacher, torch.tensor([[1, 1]])).item() == pytest.approx((1 + 0) / 2)


def test_soft_probabilities_by_hand():
    student, teacher, temperature = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 2.0
    p = math.exp(1.0) / (math.exp(1.0) + 1)  # softmax of (2, 0) / 2
    expected = temperature**2 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert losses.soft_probabilities(student, teacher, temperature).item() == pytest.approx(expected)
    assert losses.soft_probabilities(teacher, student, temperature).item() != pytest.approx(expected)  # no symmetry


def test_temperature_leaves_the_size_of_gradients():
    teacher = torch.tensor([[0.3, -0.2, 0.1]])
    slopes = []
    for temperature in (50.0, 100.0):
        student = torch.zeros(1, 3, requires_grad=True)
        losses.soft_probabilities(student, teacher, temperature).backward()
        slopes.append(student.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.02, atol=0)


def test_masked_lm_is_soft_probabilities_at_real_tokens():
    student, teacher = torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    by_token = torch.stack([losses.soft_probabilities(student[1, :1], teacher[1, :1], 2.0)])
    whole = losses.soft_probabilities(student[0], teacher[0], 2.0)
    expected = (whole + by_token[0]) / 2
    torch.testing.assert_close(losses.masked_lm(student, teacher, mask, 2.0), expected)


def test_predictions_mse_by_hand():
    assert losses.predictions_mse(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [2.0]])).item() == 2.5


def test_hard_labels_are_the_tasks_own_loss():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    assert losses.hard_labels(logits, torch.tensor([0, 1])).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert losses.hard_labels(torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 2.0])).item() == pytest.approx(2.5)


def test_rows_without_a_label_cost_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = losses.hard_labels(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    one, both = losses.hard_labels(logits[:1], torch.tensor([2])), losses.hard_labels(logits, torch.tensor([2, -100]))
    torch.testing.assert_close(both, one / 2)


@pytest.mark.parametrize("loss", BY_TOKEN)
def test_a_perfect_student_has_no_loss_and_no_gradient(loss):
    teacher = torch.randn(2, 3, 5)
    student = teacher.clone().requires_grad_()
    found = loss(student, teacher, torch.ones(2, 3))
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", BY_ROW)
def test_a_perfect_student_has_no_loss_by_row(loss):
    teacher = torch.randn(4, 1)
    student = teacher.clone().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", BY_TOKEN)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_never_counts(loss, poison):
    teacher, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    clean = torch.randn(2, 4, 6)
    padding = ~mask.bool().unsqueeze(-1)
    student = clean.masked_fill(padding, poison).requires_grad_()
    found = loss(student, teacher.masked_fill(padding, poison), mask)
    found.backward()
    assert found.item() == pytest.approx(loss(clean, teacher, mask).item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert not student.grad[~mask.bool()].any()


@pytest.mark.parametrize("loss", BY_TOKEN)
def test_parts_of_a_batch_cost_what_it_costs(loss):
    student, teacher = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    parts = [loss(student[rows], teacher[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0] / 4 + parts[1] * 3 / 4, loss(student, teacher, mask))


@pytest.mark.parametrize("loss", BY_TOKEN)
def test_an_empty_row_costs_nothing(loss):
    states = torch.randn(1, 3, 4, requires_grad=True)
    found = loss(states, torch.zeros(1, 3, 4), torch.zeros(1, 3))
    found.backward()
    assert found.item() == 0
    assert states.grad is not None
    assert not states.grad.any()


@pytest.mark.parametrize("loss", BY_TOKEN)
def test_shapes_that_differ_are_refused_instead_of_broadcast(loss):
    with pytest.raises(ModelError, match=r"teacher's shape \(2, 3, 1\), got the student's \(2, 3, 4\)"):
        loss(torch.ones(2, 3, 4), torch.ones(2, 3, 1), torch.ones(2, 3))


@pytest.mark.parametrize("loss", BY_ROW)
def test_classes_that_differ_are_refused(loss):
    with pytest.raises(ModelError, match=r"\(4, 3\), got the student's \(4, 2\)"):
        loss(torch.ones(4, 2), torch.ones(4, 3))


def test_squared_errors_add_up_over_batches():
    student, teacher = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) > 0.3
    whole = losses.squared_errors(student, teacher, mask)
    parts = sum(losses.squared_errors(student[i : i + 2], teacher[i : i + 2], mask[i : i + 2]) for i in (0, 2))
    torch.testing.assert_close(whole, parts)
    real = mask.unsqueeze(-1)
    expected = ((student - teacher) * real).square().sum() / (teacher * real).square().sum()
    assert (whole[0] / whole[1]).item() == pytest.approx(expected.item())
