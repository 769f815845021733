"""Losses: golden numbers, zero at the teacher, blind to padding."""

import pytest
import torch

from inhibitor.distill.losses import context_mse, hidden_states_mse, squared_errors


def test_context_mse_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # batch 1, length 2, heads 1, value_dim 2
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]]])
    assert context_mse(student, teacher, torch.tensor([[1, 1]])).item() == pytest.approx((1 + 4) / 4)
    assert context_mse(student, teacher, torch.tensor([[1, 0]])).item() == pytest.approx(1 / 2)


def test_hidden_states_mse_sums_layers():
    student = [torch.full((1, 2, 3), 1.0), torch.full((1, 2, 3), 2.0)]
    teacher = [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)]
    assert hidden_states_mse(student, teacher, torch.tensor([[1, 1]])).item() == pytest.approx(1 + 4)


def test_a_perfect_student_has_no_loss_and_no_gradient():
    teacher = torch.randn(2, 3, 4, 5)
    student = teacher.clone().requires_grad_()
    loss = context_mse(student, teacher, torch.ones(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_never_counts(poison):
    teacher, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    clean = torch.randn(2, 4, 6)
    student = clean.masked_fill(~mask.bool().unsqueeze(-1), poison).requires_grad_()
    loss = hidden_states_mse([student], [teacher], mask)
    loss.backward()
    assert loss.item() == pytest.approx(hidden_states_mse([clean], [teacher], mask).item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert not student.grad[~mask.bool()].any()


def test_the_mean_is_over_real_entries():
    mask = torch.tensor([[1, 1, 0]])
    loss = hidden_states_mse([torch.ones(1, 3, 7)], [torch.zeros(1, 3, 7)], mask)
    assert loss.item() == pytest.approx(1.0)


def test_an_empty_batch_costs_nothing():
    states = torch.randn(1, 3, 4, requires_grad=True)
    loss = hidden_states_mse([states], [torch.zeros(1, 3, 4)], torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert states.grad is not None
    assert not states.grad.any()


def test_a_different_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        hidden_states_mse([torch.ones(1, 1, 1)], [torch.ones(1, 1, 1)] * 2, torch.ones(1, 1))


def test_squared_errors_add_up_over_batches():
    student, teacher = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) > 0.3
    whole = squared_errors(student, teacher, mask)
    parts = sum(squared_errors(student[i : i + 2], teacher[i : i + 2], mask[i : i + 2]) for i in (0, 2))
    torch.testing.assert_close(whole, parts)
    real = mask.unsqueeze(-1)
    expected = ((student - teacher) * real).square().sum() / (teacher * real).square().sum()
    assert (whole[0] / whole[1]).item() == pytest.approx(expected.item())
