"""Objectives: what they train, what they leave alone, that the teacher is used; and switches that change no result."""

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModel, AutoModelForSequenceClassification, TrainingArguments

import inhibitor
from inhibitor.distill import losses
from inhibitor.distill.recipe import AnyStage, FullStage, JointStage, LayerwiseStage, LogitsStage, Stage, TaskStage
from inhibitor.distill.rows import Rows
from inhibitor.distill.stages import DistillationTrainer, Objective, is_traced, rehearse, train, units
from inhibitor.distill.teacher import Teacher
from inhibitor.errors import ModelError
from inhibitor.models.attention import TEACHER
from inhibitor.models.config import InhibitorConfig
from tests.models.test_convert import ACTIVE, batch, softmax_model

LAYERS = {0: 0, 1: 1}
STAGES: dict[str, AnyStage] = {
    "layerwise": LayerwiseStage(tokens=1),
    "layerwise, teacher's inputs": LayerwiseStage(tokens=1, inputs="teacher", losses={"context_relative": 1.0}),
    "joint": JointStage(tokens=1),
    "full": FullStage(tokens=1, losses={"hidden_mse": 1.0, "hidden_cosine": 0.5, "context_mse": 2.0}),
    "task": TaskStage(
        task="reviews", dropout=False, losses={"soft_labels": 1.0, "hard_labels": 1.0, "hidden_mse": 1.0}
    ),
}


def pair(config=ACTIVE, auto_class=AutoModel):
    teacher = softmax_model(auto_class=auto_class)
    teacher.set_attn_implementation(TEACHER)
    return inhibitor.convert(softmax_model(auto_class=auto_class), config), Teacher(teacher.train())


def make(stage, config=ACTIVE, **changes):
    task = isinstance(stage, TaskStage)
    student, teacher = pair(config, AutoModelForSequenceClassification if task else AutoModel)
    layer = 1 if isinstance(stage, LayerwiseStage) else None
    return Objective(student, teacher, stage.model_copy(update=changes), LAYERS, layer)


def rows(stage, lengths=(9, 4)):
    labels = {"labels": torch.arange(len(lengths)) % 3} if isinstance(stage, TaskStage) else {}
    return {**batch(lengths), **labels}


def trained(objective, inputs):
    objective.unfreeze()
    objective(**inputs)["loss"].backward()
    return {name for name, parameter in objective.named_parameters() if parameter.grad is not None}


def attention_parts(layer):
    attention = f"student.encoder.layer.{layer}.attention.self."
    parts = {f"{p}.{kind}" for p in ("query", "key", "value") for kind in ("weight", "bias")}
    return {attention + part for part in parts | {f"inhibitor.{p}" for p in vars(ACTIVE) if p in TRAINED}}


TRAINED = ("gamma", "eta", "delta", "length_exponent", "reach", "query_gain")


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_layerwise_trains_one_layers_attention_only(inputs):
    stage = LayerwiseStage(tokens=1, inputs=inputs)
    assert trained(make(stage), rows(stage)) == attention_parts(1)


def test_joint_trains_the_attention_of_all_converted_layers():
    assert trained(make(STAGES["joint"]), rows(STAGES["joint"])) == attention_parts(0) | attention_parts(1)
    one = make(STAGES["joint"], InhibitorConfig(delta=0.0, layers=(1,)))
    assert trained(one, rows(STAGES["joint"])) == attention_parts(1)
    assert {name for name, parameter in one.named_parameters() if parameter.requires_grad} == attention_parts(1)


def test_outputs_are_compared_with_their_projection():
    stage = JointStage(tokens=1, losses={"output_relative": 1.0, "output_mse": 1.0})
    projections = {
        f"student.encoder.layer.{i}.attention.output.dense.{kind}" for i in LAYERS for kind in ("weight", "bias")
    }
    assert trained(make(stage), rows(stage)) == attention_parts(0) | attention_parts(1) | projections


def test_full_trains_everything_that_hidden_states_depend_on():
    objective = make(STAGES["full"], train_embeddings=True)
    left = {name for name, _ in objective.named_parameters()} - trained(objective, rows(STAGES["full"]))
    assert left == {"student.pooler.dense.weight", "student.pooler.dense.bias"}


def test_embeddings_that_are_the_teachers_stay_so():
    objective = make(STAGES["full"])
    with torch.no_grad():
        objective.student.embeddings.position_embeddings.weight[0, 0] += 1e-6  # another one, so it is trained
    embeddings = {name for name in trained(objective, rows(STAGES["full"])) if ".embeddings." in name}
    assert embeddings == {"student.embeddings.position_embeddings.weight"}


def test_joint_is_the_sum_of_layers_that_the_teacher_feeds():
    joint = make(STAGES["joint"])
    single = [
        Objective(joint.student, joint.teacher, LayerwiseStage(tokens=1, inputs="teacher"), LAYERS, layer)
        for layer in LAYERS
    ]
    expected = sum(objective(**batch())["loss"] for objective in single)
    torch.testing.assert_close(joint(**batch())["loss"], expected)


def test_joint_runs_the_teacher_once():
    objective, calls = make(STAGES["joint"]), []
    for layer in objective.teacher.model.encoder.layer:
        layer.attention.register_forward_hook(lambda *_: calls.append("attention"))
        layer.output.register_forward_hook(lambda *_: calls.append("feed-forward"))
    objective(**batch())
    assert calls == ["attention", "feed-forward"]  # the last layer ends inside its attention


def test_a_task_stage_adds_its_losses_up():
    stage = STAGES["task"]
    alone = [make(stage, losses={loss: 1.0})(**rows(stage))["loss"].item() for loss in stage.losses]
    assert make(stage)(**rows(stage))["loss"].item() == pytest.approx(sum(alone))
    assert all(loss > 0 for loss in alone)
    weighted = make(stage, losses=dict.fromkeys(stage.losses, 3.0))(**rows(stage))["loss"].item()
    assert weighted == pytest.approx(3 * sum(alone))


def test_soft_labels_are_the_teachers_at_the_stages_temperature():
    for temperature in (1.0, 4.0):
        objective = make(STAGES["task"], losses={"soft_labels": 1.0}, temperature=temperature)
        ours, theirs = (model(**batch()).logits for model in (objective.student, objective.teacher.model))
        expected = losses.soft_probabilities(ours, theirs, temperature)
        torch.testing.assert_close(objective(**batch())["loss"], expected)


def test_soft_labels_of_a_regression_are_its_predictions():
    student, teacher = pair(auto_class=AutoModelForSequenceClassification)
    for model in (student, teacher.model):
        model.classifier = torch.nn.Linear(32, 1)
    stage = STAGES["task"].model_copy(update={"losses": {"soft_labels": 1.0}})
    ours, theirs = (model(**batch()).logits for model in (student, teacher.model))
    found = Objective(student, teacher, stage, LAYERS)(**batch())["loss"]
    torch.testing.assert_close(found, (ours - theirs).square().mean())


def test_the_teacher_is_no_part_of_the_objective():
    objective = make(STAGES["full"])
    assert all(name.startswith("student.") for name in objective.state_dict())
    assert not objective.train().student.training
    assert not objective.teacher.model.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.model.parameters())


def test_dropout_is_the_task_stages_choice():
    assert make(STAGES["task"], dropout=True).student.training
    assert not make(STAGES["task"], dropout=False).student.training


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_teacher_is_used(stage):
    first = make(stage)(**rows(stage))["loss"].item()
    objective = make(stage)
    with torch.no_grad():
        for parameter in objective.teacher.model.base_model.encoder.parameters():
            parameter.mul_(1.1)
    assert objective(**rows(stage))["loss"].item() != first


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_batch_in_parts_costs_what_it_costs(stage):
    objective, whole = make(stage), rows(stage, (9, 4, 6))
    parts = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 2), slice(2, 3))]
    total = sum(objective(**part)["loss"] * len(part["attention_mask"]) / 3 for part in parts)
    torch.testing.assert_close(total, objective(**whole)["loss"])


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_padding_changes_no_loss(stage):
    objective = make(stage)
    padded = {name: tensor[1:] for name, tensor in rows(stage).items()}
    alone = {name: tensor[:, :4] if tensor.dim() == 2 else tensor for name, tensor in padded.items()}
    torch.testing.assert_close(objective(**alone)["loss"], objective(**padded)["loss"], rtol=1e-4, atol=1e-6)


def test_a_student_like_its_teacher_has_no_loss():
    _, teacher = pair()
    assert Objective(pair()[1].model, teacher, FullStage(tokens=1), LAYERS)(**batch())["loss"].item() == 0


def test_a_layer_map_pairs_other_layers():
    student, teacher = pair()
    other = Objective(student, teacher, LayerwiseStage(tokens=1, inputs="teacher"), {0: 1}, 0)
    assert other.targets() == {"context-1", "input-1"}
    assert other(**batch())["loss"] > 0
    assert Objective(student, teacher, FullStage(tokens=1), {0: 1}).targets() == {"hidden-2"}


def test_units_run_bottom_up_over_converted_layers():
    student, _ = pair(InhibitorConfig(layers=(1,)))
    assert units(STAGES["layerwise"], student) == [1]
    student, _ = pair()
    assert units(STAGES["layerwise"], student) == [0, 1]
    assert units(STAGES["joint"], student) == units(STAGES["full"], student) == [None]


def test_the_optimizer_knows_three_groups(tmp_path):
    """Matrices decay, vectors do not, and the inhibitor's parameters learn at a rate of their own."""
    stage = STAGES["full"].model_copy(update={"weight_decay": 0.5, "train_embeddings": True})
    objective = make(stage)
    objective.unfreeze()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = DistillationTrainer(objective=objective, args=arguments, rows=_Fixed([]), title="")
    found: dict[int, tuple[float, float]] = {}
    for group in trainer.create_optimizer().param_groups:
        found |= dict.fromkeys(map(id, group["params"]), (group["lr"], group["weight_decay"]))
    for name, parameter in objective.named_parameters():
        inhibitory = name.rpartition(".")[2] in TRAINED
        rate = stage.inhibitor_learning_rate if inhibitory else stage.learning_rate
        assert found[id(parameter)] == (rate, 0.5 if parameter.dim() > 1 and not inhibitory else 0.0), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_rehearsal_finds_a_loss_that_is_not_finite(poison):
    objective = make(STAGES["full"], losses={"hidden_mse": 1.0})
    rehearse(objective, batch())
    with torch.no_grad():
        objective.student.encoder.layer[1].output.LayerNorm.bias.fill_(poison)
    with pytest.raises(ModelError, match="a finite loss on its first row"):
        rehearse(objective, batch())


def test_hidden_states_of_another_size_need_a_projection():
    student, _ = pair()
    wide = softmax_model("electra", AutoModel)
    wide.config.hidden_size = 32
    teacher = AutoModel.from_config(type(wide.config)(**{**wide.config.to_dict(), "hidden_size": 48})).eval()
    teacher.set_attn_implementation(TEACHER)
    stage = FullStage(tokens=1)
    with pytest.raises(ModelError, match="teacher's shape"):
        Objective(student, Teacher(teacher), stage, LAYERS)(**batch())
    objective = Objective(student, Teacher(teacher), stage.model_copy(update={"projection": True}), LAYERS)
    assert {"projections.hidden-1.weight", "projections.hidden-2.weight"} <= trained(objective, batch())


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "compile"])
@pytest.mark.parametrize("kind", ["full", "task"])
def test_switches_change_no_result(switch, kind, tmp_path):
    """Same steps within 1e-5: compiled code may add in another order, recomputed layers may not.

    AdamW makes steps of the rate's size even of gradients that are little but rounding: a fifth of it may differ.
    """
    stage = STAGES[kind].model_copy(update={"batch_size": 2, "checkpoints": 1, "learning_rate": 5e-5})
    if kind == "task":
        stage = stage.model_copy(update={"dropout": switch == "gradient_checkpointing"})
    losses, weights = [], []
    for changes in ({}, {switch: True}):
        objective = make(stage, **changes)
        data = [{name: tensor[row] for name, tensor in rows(stage, (9, 9, 9, 9)).items()} for row in range(4)]
        trainer = train(objective, _Fixed(data), seed=0, folder=tmp_path / str(changes), title="")
        losses.append([logs["loss"] for logs in trainer.state.log_history if "loss" in logs])
        weights.append(objective.student.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


class _Fixed(Rows):
    """Four rows, in the order given by the seed, three times over."""

    def __init__(self, data):
        super().__init__(data, lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, 8)

    def steps(self, stage):
        return 6


def test_gradient_checkpointing_recomputes_layers(tmp_path):
    objective, calls = make(STAGES["full"], gradient_checkpointing=True), []
    objective.student.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    data = [{name: tensor[row] for name, tensor in batch((9, 9)).items()} for row in range(2)]
    train(objective, _Fixed(data), seed=0, folder=tmp_path, title="")
    assert len(calls) == 12  # six steps, each layer twice
    assert not objective.student.is_activation_checkpointing


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 5, 9, 13]), (2, [2, 6, 10, 14]), (3, [3, 9, 15]), (4, [4, 8, 12, 16]), (7, [7, 14])]
)
def test_traces_begin_with_the_first_log_and_keep_apart(every, expected):
    assert [step for step in range(every, 17, every) if is_traced(step, every)] == expected


def test_every_kind_reads_back_from_yaml():
    for stage in (*STAGES.values(), LogitsStage(tokens=1)):
        assert TypeAdapter(Stage).validate_python(stage.model_dump(mode="json")) == stage
