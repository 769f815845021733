"""A stage on integers: measured as integers, trained for them, stopped and resumed like any other."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from inhibitor import InhibitorError, Int8Config, quantize
from inhibitor.distill import run as run_module
from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.models.int8 import integer_layers
from inhibitor.models.int8_layers import FakeInt8Embedding, FakeInt8Linear, Int8Embedding, Int8Linear
from inhibitor.training import FiniteTrainer


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def integers(recipe):
    """A recipe that trains in float, then for four bits, where training matters."""
    recipe["stages"] = [
        {"kind": "full", "tokens": 256, "batch_size": 4, "checkpoints": 2},
        {
            "kind": "full",
            "tokens": 1024,
            "batch_size": 4,
            "checkpoints": 2,
            "integers": {"attention": 4, "sequences": 8},
        },
    ]
    return recipe


def test_training_on_integers_makes_good_what_rounding_cost(integers):
    integers["stages"][1] |= {"tokens": 4096, "learning_rate": 1e-3}
    config = DistillConfig.parse(integers)
    states = distill(config)["states"]
    assert [state["name"] for state in states] == ["converted", "calibrated", "full", "full-2-rounded", "full-2"]
    error = {state["name"]: sum(state["hidden_error"]) for state in states}
    assert error["full"] < error["full-2-rounded"]
    assert error["full-2"] < error["full-2-rounded"]

    model = AutoModel.from_pretrained(config.output / "model").eval()
    rounded = AutoModel.from_pretrained(config.output / "stages" / "full-2-rounded")
    for layer, attention in integer_layers(model).items():
        assert not torch.equal(attention.log2_value_step, integer_layers(rounded)[layer].log2_value_step)
        assert not torch.equal(attention.log2_query_key_step, integer_layers(rounded)[layer].log2_query_key_step)
    assert any(isinstance(module, FakeInt8Linear) for module in model.modules())


def test_what_was_trained_is_what_the_integers_say(integers):
    config = DistillConfig.parse(integers)
    distill(config)
    model = AutoModel.from_pretrained(config.output / "model").eval()
    batch = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        trained = model(**batch).last_hidden_state
        quantize(model, Int8Config(attention=4), [batch])
        kinds = {type(module) for module in model.modules()}
        assert {Int8Linear, Int8Embedding} <= kinds
        assert not {FakeInt8Linear, FakeInt8Embedding} & kinds
        torch.testing.assert_close(model(**batch).last_hidden_state, trained, rtol=1e-3, atol=2e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", ["before", "rounded", "trained"])
def test_a_killed_run_goes_on_to_the_same_bits(integers, where, monkeypatch, tmp_path):
    whole = DistillConfig.parse(integers)
    expected = distill(whole)

    integers["output"] = str(tmp_path / "killed")
    killed = DistillConfig.parse(integers)
    with monkeypatch.context() as patch:
        if where == "trained":  # half of the second stage's steps
            step = FiniteTrainer.training_step

            def dies(self, *args):
                if self.state.global_step == 10:
                    raise Killed
                return step(self, *args)

            patch.setattr(FiniteTrainer, "training_step", dies)
        else:
            train = run_module.train

            def train_or_die(objective, *args, **kwargs):
                if objective.stage.integers is not None:
                    raise Killed
                return train(objective, *args, **kwargs)

            def die(*args):
                raise Killed

            patch.setattr(run_module, *(("train", train_or_die) if where == "rounded" else ("quantize", die)))
        with pytest.raises(Killed):
            distill(killed)
    found = distill(killed)
    weights = [AutoModel.from_pretrained(config.output / "model").state_dict() for config in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [state["hidden_error"] for state in found["states"]] == [
        state["hidden_error"] for state in expected["states"]
    ]


def test_a_task_is_trained_on_integers(task_recipe):
    task_recipe["stages"].append({**task_recipe["stages"][0], "epochs": 1, "integers": {}})
    config = DistillConfig.parse(task_recipe)
    metrics = distill(config)
    assert [state["name"] for state in metrics["states"]][-2:] == ["task-2-rounded", "task-2"]
    assert all("scores" in state for state in metrics["states"])
    model = AutoModelForSequenceClassification.from_pretrained(config.output / "model")
    assert len(integer_layers(model)) == 2


def test_the_float_student_teaches_itself_on_integers(task_recipe, tmp_path):
    first = DistillConfig.parse(task_recipe)
    distill(first)
    stage = task_recipe["stages"][0] | {"epochs": 1, "integers": {}, "losses": {"soft_labels": 1, "hidden_mse": 1}}
    taught = {"teacher": str(first.output / "model"), "output": str(tmp_path / "taught"), "stages": [stage]}
    kept = {key: value for key, value in task_recipe.items() if key not in ("inhibitor", "calibration")}
    metrics = distill(DistillConfig.parse(kept | taught))
    assert [state["name"] for state in metrics["states"]] == ["given", "task-rounded", "task"]
    given, rounded, _ = (sum(state["hidden_error"]) for state in metrics["states"])
    assert given == 0 < rounded
    heads = metrics["states"][0]["heads"]
    assert heads["keys"] == heads["teacher_keys"]
    assert metrics["attention"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compile": True, "integers": {}}, "without compile"),
        ({"integers": {"attention": 5}}, "attention"),
        ({"integers": {"steps": 5}}, "steps"),
    ],
)
def test_impossible_wishes(recipe, change, message):
    recipe["stages"][1] |= change
    with pytest.raises(InhibitorError, match=message):
        DistillConfig.parse(recipe)


def test_one_run_has_one_kind_of_integers(integers):
    integers["stages"].append({**integers["stages"][1], "integers": {"attention": 8}})
    with pytest.raises(InhibitorError, match="the same parts and bits"):
        DistillConfig.parse(integers)
