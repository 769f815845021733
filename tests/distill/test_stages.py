"""Objectives: what they train, what they leave alone, and that the teacher is used."""

import pytest
import torch
from transformers import AutoModel

import inhibitor
from inhibitor.distill.recipe import FullStage, LayerwiseStage
from inhibitor.distill.stages import FullObjective, LayerObjective, objectives
from inhibitor.models.attention import TEACHER
from inhibitor.models.config import InhibitorConfig
from tests.models.test_convert import ACTIVE, batch, softmax_model


def pair(config=ACTIVE):
    teacher = softmax_model(auto_class=AutoModel)
    teacher.set_attn_implementation(TEACHER)
    return inhibitor.convert(softmax_model(auto_class=AutoModel), config), teacher.requires_grad_(False)


def trained(objective):
    objective.unfreeze()
    objective(**batch())["loss"].backward()
    return {name for name, parameter in objective.named_parameters() if parameter.grad is not None}


def test_layerwise_trains_one_layers_attention_only():
    student, teacher = pair()
    names = trained(LayerObjective(student, teacher, layer=1))
    attention = "student.encoder.layer.1.attention.self."
    parts = {f"{p}.{kind}" for p in ("query", "key", "value") for kind in ("weight", "bias")}
    parts |= {f"inhibitor.{p}" for p in ("gamma", "eta", "delta", "length_exponent")}
    assert names == {attention + part for part in parts}


def test_full_trains_everything_that_hidden_states_depend_on():
    objective = FullObjective(*pair())
    left = {name for name, _ in objective.named_parameters()} - trained(objective)
    assert left == {"student.pooler.dense.weight", "student.pooler.dense.bias"}


def test_the_teacher_is_no_part_of_the_objective():
    objective = FullObjective(*pair())
    assert all(name.startswith("student.") for name in objective.state_dict())
    assert not objective.train().student.training
    assert not objective.teacher.training


@pytest.mark.parametrize("make", [lambda s, t: LayerObjective(s, t, 0), FullObjective])
def test_the_teacher_is_used(make):
    student, teacher = pair()
    first = make(student, teacher)(**batch())["loss"].item()
    with torch.no_grad():
        for parameter in teacher.encoder.parameters():
            parameter.mul_(1.1)
    assert make(student, teacher)(**batch())["loss"].item() != first


def test_a_student_like_its_teacher_has_no_loss():
    _, teacher = pair()
    assert FullObjective(pair()[1], teacher)(**batch())["loss"].item() == 0


def test_padding_changes_no_loss():
    student, teacher = pair()
    alone = {name: tensor[1:, :4] for name, tensor in batch((9, 4)).items()}
    padded = {name: tensor[1:] for name, tensor in batch((9, 4)).items()}
    for objective in (LayerObjective(student, teacher, 1), FullObjective(student, teacher)):
        torch.testing.assert_close(objective(**alone)["loss"], objective(**padded)["loss"], rtol=1e-4, atol=1e-6)


def test_objectives_run_bottom_up_over_converted_layers():
    student, teacher = pair(InhibitorConfig(layers=(1,)))
    assert [layer for layer, _ in objectives(LayerwiseStage(tokens=1), student, teacher)] == [1]
    student, teacher = pair()
    assert [layer for layer, _ in objectives(LayerwiseStage(tokens=1), student, teacher)] == [0, 1]
    assert [layer for layer, _ in objectives(FullStage(tokens=1), student, teacher)] == [None]
