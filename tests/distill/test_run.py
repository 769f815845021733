"""The whole run: it learns, resumes to the same bits, and refuses what it cannot use before it starts."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from inhibitor.distill import run as run_module
from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.errors import InhibitorError


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


@pytest.mark.parametrize("calls", [1, 2, 3])
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


def test_two_processes_train_one_student(recipe, tmp_path):
    single = DistillConfig.parse(recipe)
    expected = distill(single)["states"]

    recipe["output"] = str(tmp_path / "double")
    for stage in recipe["stages"]:
        stage["batch_size"] //= 2  # of each process
    double = DistillConfig.parse(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(double.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "inhibitor"]
    result = subprocess.run([*command, "distill", str(file)], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((double.output / "metrics.json").read_text())["states"]
    assert [state["name"] for state in found] == [state["name"] for state in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["hidden_error"] == pytest.approx(theirs["hidden_error"], rel=1e-3)
