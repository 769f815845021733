import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import get_task
from inhibitor.errors import ConfigError, DataError, ModelError, RunError
from inhibitor.evaluate import finetune as module
from inhibitor.evaluate.evaluate import EvaluateConfig, evaluate, predict
from inhibitor.evaluate.finetune import FinetuneConfig, finetune
from inhibitor.training import FiniteTrainer

ADJECTIVES = ["good", "great", "fine", "bad", "dull"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sst2(tmp_path):
    """32 distinct rows with random labels, to be learnt by heart, in both splits."""
    rng = np.random.default_rng(0)
    rows = [
        {"sentence": f"{' '.join(rng.choice(ADJECTIVES, rng.integers(1, 9)))} {i}", "label": int(rng.integers(2))}
        for i in range(32)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def stsb(tmp_path):
    """16 pairs with scores."""
    rows = [{"sentence1": "good " * (i % 4), "sentence2": f"film {i}", "label": i % 4 * 1.25} for i in range(16)]
    (tmp_path / "stsb").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "stsb" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def configure(folder: Path, data: Path, output: Path, **options: Any) -> FinetuneConfig:
    defaults = {"task": "sst2", "epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32}
    return FinetuneConfig.parse({"model": str(folder), "data": data, "output": output, **defaults, **options})


def scored(model: Path, task: str, data: Path | None = None, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig.parse({"model": str(model), "task": task, "data": data, **options}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_learns_32_rows_by_heart_and_reports_it(tiny_bert, sst2):
    config = configure(tiny_bert, sst2, sst2 / "run", epochs=10, batch_size=2, learning_rate=3e-3)
    metrics = finetune(config)
    assert metrics["scores"] == {"validation": {"accuracy": 1.0}}
    assert metrics["headline"] == 1.0
    assert (metrics["kind"], metrics["task"], metrics["attention"]) == ("finetune", "sst2", "softmax")
    assert metrics["rows"] == {"train": 32, "validation": 32}
    assert metrics["overlap"] == {"validation": 32}
    assert metrics["truncated"] == {"train": 0, "validation": 0}
    assert [entry["epoch"] for entry in metrics["evaluations"]] == list(range(1, 11))
    assert metrics["history"][-1]["loss"] < 0.2 < metrics["history"][0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sentences = load_task(get_task("sst2"), sst2).splits["train"].rows["sentence"]
    tokens = 10 * sum(len(ids) for ids in tokenizer(list(sentences))["input_ids"])
    assert metrics["tokens_per_second"] * metrics["seconds"] == pytest.approx(tokens)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "config.yaml",
        "metrics.json",
        "model",
        "predictions.json",
        "versions.json",
    ]
    assert json.loads((config.output / "metrics.json").read_text()) == metrics
    assert finetune(config) == metrics  # finished: read, not repeated


def test_evaluate_repeats_the_score_of_the_saved_model(tiny_bert, sst2):
    metrics = finetune(configure(tiny_bert, sst2, sst2 / "run"))
    again = scored(sst2 / "run" / "model", "sst2", sst2, max_length=32)
    assert again["kind"] == "evaluate"
    for key in ("scores", "headline", "attention"):
        assert again[key] == metrics[key]
    assert again["rows"] == {"validation": 32}


def test_predictions_are_in_the_order_of_the_rows(tiny_bert, sst2):
    metrics = finetune(configure(tiny_bert, sst2, sst2 / "run"))
    rows = load_task(get_task("sst2"), sst2).splits["validation"].rows
    predictions = json.loads((sst2 / "run" / "predictions.json").read_text())["validation"]
    assert [entry["row"] for entry in predictions] == list(range(32))
    assert [entry["label"] for entry in predictions] == list(rows["label"])
    model = AutoModelForSequenceClassification.from_pretrained(sst2 / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(sst2 / "run" / "model")
    for entry, sentence in zip(predictions, rows["sentence"], strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(sentence, return_tensors="pt")).logits[0]
        assert entry["logits"] == pytest.approx(logits.tolist(), abs=2e-5)
    right = [np.argmax(entry["logits"]) == entry["label"] for entry in predictions]
    assert metrics["headline"] == np.mean(right)


def test_regression_predicts_one_number(tiny_bert, stsb):
    metrics = finetune(
        configure(tiny_bert, stsb, stsb / "run", task="stsb", epochs=10, batch_size=2, learning_rate=3e-3)
    )
    assert list(metrics["scores"]["validation"]) == ["spearman", "pearson"]
    assert metrics["headline"] == metrics["scores"]["validation"]["spearman"] > 0.5
    assert scored(stsb / "run" / "model", "stsb", stsb, max_length=32)["scores"] == metrics["scores"]
    with pytest.raises(ModelError, match="expected the classes of reviews, negative, positive, got a model of LABEL_0"):
        scored(stsb / "run" / "model", "reviews")


def test_classes_are_the_tasks_in_capitals_too(tiny_bert, sst2):
    finetune(configure(tiny_bert, sst2, sst2 / "run", epochs=1))
    file = sst2 / "run" / "model" / "config.json"
    before = scored(file.parent, "sst2", sst2, max_length=32)["scores"]
    file.write_text(file.read_text().replace("negative", "NEGATIVE").replace("positive", "POSITIVE"))
    assert scored(file.parent, "sst2", sst2, max_length=32)["scores"] == before


def test_interrupted_run_goes_on_to_the_same_weights(tiny_bert, sst2, monkeypatch):
    whole = finetune(configure(tiny_bert, sst2, sst2 / "whole", epochs=3))
    step = FiniteTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 6:  # in the second of three epochs of four steps
            raise KeyboardInterrupt
        return step(self, *args)

    config = configure(tiny_bert, sst2, sst2 / "run", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(FiniteTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    checkpoints = config.output / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    half_written = checkpoints / "checkpoint-8"
    shutil.copytree(checkpoints / "checkpoint-4", half_written)
    (half_written / "trainer_state.json").write_text('{"epoch"')
    resumed = finetune(config)
    assert not checkpoints.exists()
    for key in ("scores", "evaluations", "history"):
        assert resumed[key] == whole[key]
    expected = weights(sst2 / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(config.output).items())


def test_other_data_under_the_same_name_are_refused(tiny_bert, sst2, monkeypatch):
    config, fit = configure(tiny_bert, sst2, sst2 / "run", epochs=1), module.fit
    monkeypatch.setattr(module, "fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(config)
    monkeypatch.setattr(module, "fit", fit)
    train = sst2 / "sst2" / "train.jsonl"
    before = train.read_text()
    train.write_text(before.replace("good", "fine"))
    with pytest.raises(RunError, match="the data that this run began with, got other contents of train"):
        finetune(config)
    train.write_text(before)
    assert finetune(config)["kind"] == "finetune"
    assert not (sst2 / "run" / "data.json").exists()


def test_a_seed_that_no_generator_takes_is_refused(tiny_bert, sst2):
    with pytest.raises(ConfigError, match="seed: expected a number less than"):
        FinetuneConfig.parse({"model": str(tiny_bert), "task": "sst2", "output": str(sst2 / "run"), "seed": 2**32})


def test_same_seed_same_weights_other_seed_others(tiny_bert, sst2):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(configure(tiny_bert, sst2, sst2 / name, seed=seed, epochs=1))
        runs[name] = weights(sst2 / name)["classifier.weight"]
    assert torch.equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"], runs["c"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run(tiny_bert, sst2, monkeypatch, where):
    compute_loss = FiniteTrainer.compute_loss

    def broken(self, model, *args, **kwargs):
        loss = compute_loss(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            parameter = model.classifier.bias
            if where == "loss":
                return loss * float("inf")
            return loss + torch.sqrt(parameter - parameter.detach()).sum()  # 0, with a gradient of ±inf
        return loss

    monkeypatch.setattr(FiniteTrainer, "compute_loss", broken)
    with pytest.raises(RunError, match=r"step 3: expected a finite loss and finite gradients.*gradient of \S+ that"):
        finetune(configure(tiny_bert, sst2, sst2 / "run"))
    assert not (sst2 / "run" / "metrics.json").exists()


def test_logits_that_are_not_finite_are_refused(tiny_bert, sst2):
    finetune(configure(tiny_bert, sst2, sst2 / "run", epochs=1))
    model = AutoModelForSequenceClassification.from_pretrained(sst2 / "run" / "model")
    model.classifier.bias.data[0] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    splits, _ = encode(load_task(get_task("sst2"), sst2), tokenizer, 32)
    with pytest.raises(RunError, match="the prediction of row 1: expected finite logits"):
        predict(model, tokenizer, splits["validation"])


FAULTS = {
    "unknown task": ({"task": "sst3"}, DataError, "Did you mean 'sst2'"),
    "no data": ({"task": "rte"}, DataError, "rte"),
    "no model": ({"model": "./nowhere"}, ModelError, "no folder"),
    "rows longer than the model reads": ({"max_length": 256}, ModelError, "max_length of at most 128, got 256"),
}


@pytest.mark.parametrize(("options", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_before_the_folder_is_taken(tiny_bert, sst2, options, error, message):
    with pytest.raises(error, match=message):
        finetune(configure(tiny_bert, sst2, sst2 / "run", **options))
    assert not (sst2 / "run").exists()


def test_a_file_in_the_way_is_named_before_the_model_is_loaded(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(RunError, match="letter/run: expected a folder, got the file"):
        finetune(configure(tmp_path / "nowhere", tmp_path, tmp_path / "letter" / "run"))


def test_a_run_says_which_values_of_its_task_it_took(tiny_bert, sst2):
    own = {"epochs": 5, "learning_rate": 2e-5, "batch_size": 16, "max_length": 128}
    config = configure(tiny_bert, sst2, sst2 / "run", **dict.fromkeys(own), max_steps=1)
    finetune(config)
    written = yaml.safe_load((config.output / "config.yaml").read_text())
    assert {name: written[name] for name in own} == own
    before = config.to_yaml().replace("batch_size: 16", "batch_size: null")  # as it once was written
    (config.output / "config.yaml").write_text(before)
    assert finetune(config)["headline"] == finetune(config)["headline"]
    with pytest.raises(DataError, match="Did you mean 'sst2'"):
        EvaluateConfig.parse({"model": "minilm", "task": "sst3"})


def test_configuration_is_strict():
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        FinetuneConfig.parse({"model": "minilm", "task": "rte", "output": "x", "learningrate": 1e-5})


def test_the_folder_of_another_run_is_refused(tiny_bert, sst2):
    finetune(configure(tiny_bert, sst2, sst2 / "run", epochs=1))
    with pytest.raises(RunError, match="another run"):
        finetune(configure(tiny_bert, sst2, sst2 / "run", epochs=2))


def test_evaluate_refuses_other_classes_and_a_model_without_head(tiny_bert, sst2, tmp_path):
    with pytest.raises(ModelError, match="classes of sst2, negative, positive, got a model of LABEL_0, LABEL_1"):
        scored(tiny_bert, "sst2", sst2)
    finetune(configure(tiny_bert, sst2, sst2 / "run", epochs=1))
    folder = sst2 / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.bert.save_pretrained(folder)  # the same classes in its configuration, but no classifier
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"all its weights, got none for classifier\.bias, classifier\.weight"):
        scored(folder, "sst2", sst2)
