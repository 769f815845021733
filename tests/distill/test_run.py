"""The whole run: it learns, resumes to the same bits, and refuses what it cannot use before it starts."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
)

from inhibitor.distill import run as run_module
from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.errors import InhibitorError, RunError
from inhibitor.report import write_report
from tests.distill.test_pairing import saved
from tests.distill.test_teacher import counted


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def weights(folder):
    return AutoModel.from_pretrained(folder / "model").state_dict()


def test_errors_fall_and_everything_is_left_behind(recipe):
    recipe["stages"][1]["tokens"] = 4096
    config = DistillConfig.parse(recipe)
    metrics = distill(config)
    assert [state["name"] for state in metrics["states"]] == ["converted", "calibrated", "layerwise", "full"]
    hidden = {state["name"]: sum(state["hidden_error"]) for state in metrics["states"]}
    assert hidden["full"] < hidden["calibrated"] < hidden["converted"]
    assert [stage["tokens"] for stage in metrics["stages"]] == [2 * 256, 4096]
    assert {"config.yaml", "versions.json", "metrics.json", "model", "stages"} == {
        path.name for path in config.output.iterdir()
    }
    assert distill(config) == json.loads((config.output / "metrics.json").read_text())


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 2, 3])  # of train(): two layers, then the whole model
def test_a_killed_run_goes_on_to_the_same_bits(recipe, calls, monkeypatch, tmp_path):
    whole = DistillConfig.parse(recipe)
    expected = distill(whole)

    recipe["output"] = str(tmp_path / "killed")
    killed = DistillConfig.parse(recipe)
    train, count = run_module.train, 0

    def train_until_killed(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:  # half of the steps, then the power goes
            from inhibitor.training import FiniteTrainer

            step = FiniteTrainer.training_step

            def dies(self, *step_args):
                if self.state.global_step == 3:
                    raise Killed
                return step(self, *step_args)

            with monkeypatch.context() as patch:
                patch.setattr(FiniteTrainer, "training_step", dies)
                return train(*args, **kwargs)
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train", train_until_killed)
        with pytest.raises(Killed):
            distill(killed)
    found = distill(killed)

    assert found["states"] == expected["states"]
    histories = [[stage["history"] for stage in metrics["stages"]] for metrics in (found, expected)]
    assert histories[0] == histories[1]
    ours, theirs = weights(killed.output), weights(whole.output)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_every_kind_of_stage_in_one_recipe(recipe):
    step = {"tokens": 512, "batch_size": 4}
    recipe["stages"] = [
        {"kind": "joint", **step},
        {"kind": "layerwise", "inputs": "teacher", **step},
        {"kind": "layerwise", **step},
        {"kind": "full", "losses": {"hidden_mse": 1, "hidden_cosine": 1, "context_relative": 0.1}, **step},
    ]
    metrics = distill(DistillConfig.parse(recipe))
    names = ["converted", "calibrated", "joint", "layerwise", "layerwise-2", "full"]
    assert [state["name"] for state in metrics["states"]] == names
    assert [stage["kind"] for stage in metrics["stages"]] == ["joint", "layerwise", "layerwise", "full"]
    context = {state["name"]: sum(state["context_error"]) for state in metrics["states"]}
    assert context["joint"] < context["calibrated"]
    traces = metrics["stages"][0]["history"][0]["traces"]
    assert traces["layers"] == [0, 1]
    assert set(traces) == {"layers", "context_error", "inhibited", "gamma", "eta", "delta", "length_exponent", "reach"}
    assert all(0 < share < 1 for share in traces["inhibited"])
    assert metrics["energy"]["joules"] is None or metrics["energy"]["joules"] > 0


def test_logits_of_a_masked_language_model(recipe, masked_lm):
    recipe["teacher"] = str(masked_lm)
    recipe["stages"] = [{"kind": "logits", "tokens": 4096, "batch_size": 4, "learning_rate": 1e-3}]
    metrics = distill(DistillConfig.parse(recipe))
    losses = [step["loss"] for step in metrics["stages"][0]["history"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_task_specific_distillation(task_recipe):
    task_recipe["stages"][0]["epochs"] = 8
    config = DistillConfig.parse(task_recipe)
    metrics = distill(config)
    hidden = [sum(state["hidden_error"]) for state in metrics["states"]]
    assert hidden[-1] < hidden[0]
    assert metrics["teacher_scores"].keys() == metrics["scores"].keys() == {"validation"}
    assert metrics["headline"] == metrics["scores"]["validation"]["accuracy"]
    assert metrics["rows"] == {"train": 48, "validation": 24}
    student = AutoModelForSequenceClassification.from_pretrained(config.output / "model")
    assert student.config.id2label == {0: "negative", 1: "positive"}


def test_distil_then_task_in_one_recipe(task_recipe, text):
    task_recipe["text"] = {"files": [str(text)], "max_length": 16}
    task_recipe["stages"].insert(0, {"kind": "joint", "tokens": 512, "batch_size": 4})
    metrics = distill(DistillConfig.parse(task_recipe))
    assert [state["name"] for state in metrics["states"]] == ["converted", "calibrated", "joint", "task"]


@pytest.mark.parametrize(
    "stage",
    [{"kind": "joint"}, {"kind": "layerwise"}, {"kind": "full", "losses": {"hidden_mse": 1}}],
    ids=lambda stage: stage["kind"],
)
def test_without_text_a_stage_reads_the_rows_of_the_task(task_recipe, stage):
    training = {"tokens": 4000, "batch_size": 8, "learning_rate": 1e-3, "inhibitor_learning_rate": 1e-2}
    task_recipe["stages"].insert(0, stage | training)
    metrics = distill(DistillConfig.parse(task_recipe))
    assert [state["name"] for state in metrics["states"]] == ["converted", "calibrated", stage["kind"], "task"]
    _, before, after, _ = (sum(state["output_error"]) for state in metrics["states"])
    assert after < before
    record = metrics["stages"][0]
    assert record["tokens"] == pytest.approx(4000 * record["units"], rel=0.15)


def test_a_teacher_below_the_floor_stops_the_run(task_recipe, capsys):
    task_recipe["stages"][0]["floor"] = 99.9
    with pytest.raises(InhibitorError, match=r"whose accuracy on reviews is at least 99.9, got \d"):
        distill(DistillConfig.parse(task_recipe))
    assert "the teacher's accuracy on reviews, validation, is" in capsys.readouterr().err


def test_a_shallower_student_of_another_family(recipe, tiny_bert, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 128}
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    recipe |= {"student": str(tmp_path / "student"), "layer_map": [1]}
    config = DistillConfig.parse(recipe)
    metrics = distill(config)
    assert metrics["student"] == {"family": "distilbert", "layers": [0], "heads": 2}
    assert [len(state["hidden_error"]) for state in metrics["states"]] == [1] * 4
    assert AutoModel.from_pretrained(config.output / "model").config.model_type == "inhibitor-distilbert"


def test_a_cache_changes_little_and_spares_the_teacher(recipe, tmp_path, monkeypatch):
    recipe["text"]["blocks"] = 24
    recipe["stages"] = [
        {"kind": "layerwise", "tokens": 1024, "batch_size": 4},
        {"kind": "joint", "tokens": 1024, "batch_size": 4},
        {"kind": "full", "tokens": 1024, "batch_size": 4},
    ]
    found: list[tuple[dict[str, Any], int]] = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        recipe |= {"cache": cache, "output": str(tmp_path / f"run{len(found)}")}
        with monkeypatch.context() as patch:
            calls = counted(patch)
            found.append((distill(DistillConfig.parse(recipe)), len(calls)))
    errors = [sum(metrics["states"][-1]["hidden_error"]) for metrics, _ in found]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # targets are rounded to bfloat16
    assert errors[1] == errors[2]
    assert found[2][1] < found[1][1] < found[0][1]


def test_a_damaged_state_gives_way_to_the_one_before(recipe, monkeypatch, capsys):
    expected = distill(DistillConfig.parse(recipe))
    recipe["output"] += "-again"
    config = DistillConfig.parse(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(run_module._Distillation, "_finish", _die)
        with pytest.raises(Killed):
            distill(config)
    path = config.output / "stages" / "full" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = distill(config)
    assert "full is damaged: model.safetensors" in capsys.readouterr().err
    assert found["states"] == expected["states"]


def _die(self):
    raise Killed


def test_another_teacher_under_the_same_name_is_refused(recipe, teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / "teacher")
    recipe["teacher"] = str(tmp_path / "teacher")
    config = DistillConfig.parse(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(run_module._Distillation, "_finish", _die)
        with pytest.raises(Killed):
            distill(config)
    model = AutoModel.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InhibitorError, match="other weights under its name"):
        distill(config)


def test_other_data_under_the_same_name_are_refused(recipe, text, tmp_path, monkeypatch):
    own = tmp_path / "text.txt"
    shutil.copy(text, own)
    recipe["text"]["files"] = [str(own)]
    config = DistillConfig.parse(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(run_module._Distillation, "_finish", _die)
        with pytest.raises(Killed):
            distill(config)
    own.write_text(own.read_text().replace("film", "plot"))
    with pytest.raises(InhibitorError, match=r"the data that this run began with, got other contents of .*text\.txt"):
        distill(config)
    shutil.copy(text, own)
    report = {"carbon_intensity": 100.0, "example": "the film", "output": str(tmp_path / "x" / ".." / "run")}
    (tmp_path / "x").mkdir()
    assert distill(DistillConfig.parse(recipe | report))["kind"] == "distill"  # which change no result


@pytest.mark.parametrize("sizes", [{"hidden_size": 64}, {"hidden_size": 64, "num_attention_heads": 4}], ids=str)
def test_a_student_of_another_hidden_size(recipe, teacher, tmp_path, sizes):
    """Nothing of it has the teacher's shape, so no error of its layers is known; it learns all the same."""
    recipe |= {"student": saved(tmp_path / "wide", teacher, **sizes), "calibration": None}
    recipe["stages"] = [{"kind": "full", "projection": True, "tokens": 4096, "batch_size": 4, "learning_rate": 1e-3}]
    config = DistillConfig.parse(recipe)
    metrics = distill(config)
    losses = [step["loss"] for step in metrics["stages"][0]["history"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [state["hidden_error"] for state in metrics["states"]] == [[], []]
    assert write_report([config.output], tmp_path / "report.html").is_file()


def test_a_state_that_cannot_be_written_is_named(recipe, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(RunError, match="stages: expected room for the state 'converted', got SafetensorError"):
        distill(DistillConfig.parse(recipe))


def test_integers_that_a_student_cannot_have_are_refused_before_any_work(recipe, masked_lm):
    stages = [{"kind": "joint", "tokens": 512}, {"kind": "logits", "tokens": 512, "integers": {}}]
    recipe |= {"teacher": str(masked_lm), "stages": [{**stage, "batch_size": 4} for stage in stages]}
    config = DistillConfig.parse(recipe)
    with pytest.raises(InhibitorError, match="embeddings of their own, got a table that the output layer shares"):
        distill(config)
    assert not (config.output / "stages").exists()


def test_bad_rows_of_text_are_set_aside_and_counted(recipe, tmp_path):
    lines = ['{"text": "the film is good and it was great"}'] * 200 + ["{broken"]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe["text"] = {"files": [str(tmp_path / "text.jsonl")], "max_length": 16, "on_bad_row": "quarantine"}
    config = DistillConfig.parse(recipe)
    counts = distill(config)["text"]
    assert counts == {str(tmp_path / "text.jsonl"): {"read": 201, "used": 200, "quarantined": 1}}
    assert len((config.output / "quarantine.jsonl").read_text().splitlines()) == 1


def test_accumulation_takes_the_same_steps(recipe, tmp_path):
    recipe["stages"] = [{"kind": "full", "tokens": 1024, "batch_size": 4, "learning_rate": 1e-3}]
    whole = distill(DistillConfig.parse(recipe))["stages"][0]["history"]
    recipe["output"] = str(tmp_path / "parts")
    recipe["stages"][0] |= {"batch_size": 1, "gradient_accumulation": 4}
    parts = distill(DistillConfig.parse(recipe))["stages"][0]["history"]
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in whole], rel=1e-5)


def test_only_chosen_layers_change_in_the_layerwise_stage(recipe, teacher):
    recipe["inhibitor"]["layers"] = [1]
    recipe["stages"] = recipe["stages"][:1]
    config = DistillConfig.parse(recipe)
    distill(config)
    before, after = AutoModel.from_pretrained(teacher).state_dict(), weights(config.output)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("encoder.layer.1.attention.self.") for name in changed)


def test_a_folder_of_another_run_is_refused(recipe):
    config = DistillConfig.parse(recipe)
    config.output.mkdir()
    (config.output / "config.yaml").write_text(config.model_copy(update={"seed": 9}).to_yaml())
    with pytest.raises(InhibitorError, match="another run"):
        distill(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "no/such/folder/at/all"}, "no/such"),
        ({"text": {"files": ["nowhere.txt"], "max_length": 16}}, "nowhere.txt"),
        ({"text": {"files": []}}, "either files or a dataset"),
        ({"stages": []}, "stages"),
        ({"stages": [{"kind": "layerwise", "tokens": 10}]}, "at least 256"),
        ({"stages": [{"kind": "layer-wise", "tokens": 10}]}, "layerwise"),
        ({"stages": [{"kind": "full", "tokens": 10000, "lerning_rate": 1}]}, "learning_rate"),
        ({"inhibitor": {"layers": [7]}}, "layers"),
        ({"validation_sequence": 3}, "validation_sequences"),
        ({"text": None}, "text for the layerwise stage, or a task stage"),
        (
            {
                "text": None,
                "stages": [{"kind": "joint", "tokens": 9, "min_length": 8}, {"kind": "task", "task": "rte"}],
            },
            "min_length of the joint stage: expected None",
        ),
        ({"cache": "cache"}, "a fixed number of blocks"),
        ({"stages": [{"kind": "joint", "tokens": 9999, "losses": {"hidden_mse": 1}}]}, "context_mse"),
        ({"stages": [{"kind": "joint", "tokens": 9999, "losses": {}}]}, "losses"),
        ({"stages": [{"kind": "full", "tokens": 9999, "losses": {"hidden_mse": -1}}]}, "greater than 0"),
        (
            {"stages": [{"kind": "logits", "tokens": 9999}, {"kind": "task", "task": "reviews"}]},
            "stages that one teacher can teach",
        ),
        ({"stages": [{"kind": "task", "task": "revews"}]}, "reviews"),
        ({"stages": [{"kind": "task", "task": "rte"}, {"kind": "task", "task": "rte", "max_length": 64}]}, "2 that"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_before_any_work(recipe, change, message):
    with pytest.raises(InhibitorError, match=message):
        distill(DistillConfig.parse({**recipe, **change}))


def test_text_longer_than_the_teacher_reads_is_refused(recipe):
    recipe["text"]["max_length"] = 256
    recipe["stages"][0]["tokens"] = recipe["stages"][1]["tokens"] = 4096
    with pytest.raises(InhibitorError, match="max_length"):
        distill(DistillConfig.parse(recipe))


def test_text_that_is_not_utf8_is_refused(recipe, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("na\xefve".encode("latin-1"))
    recipe["text"]["files"] = [str(path)]
    with pytest.raises(InhibitorError, match="UTF-8"):
        distill(DistillConfig.parse(recipe))
