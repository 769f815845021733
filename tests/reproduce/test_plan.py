"""What a grid asks for: which runs, in which order, with what; and what it refuses."""

from pathlib import Path

import pytest
import yaml

from inhibitor.distill.recipe import DistillConfig, TaskStage
from inhibitor.errors import ConfigError
from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.reproduce.plan import Choice, candidates, chosen, configuration, plan
from inhibitor.reproduce.recipe import ReproduceConfig

ROOT = Path(__file__).parent.parent.parent
MINIMAL = {"teacher": "minilm", "student": "runs/e1/model", "output": "out", "tasks": ["rte"], "seeds": [3, 4]}
TWO_RATES = {"learning_rates": [2e-5, 5e-5], "epochs": [5]}
RATES = ("lr-2e-05-epochs-5", "lr-5e-05-epochs-5")


def grid(**values):
    return ReproduceConfig.parse(MINIMAL | values)


def jobs(config):
    return {job.name: job for job in plan(config)}


def test_without_choices_every_run_counts():
    found = jobs(grid())
    assert list(found) == [f"{name}/rte/seed-{seed}" for name in ("e0", "e1", "e2", "e1e2") for seed in (3, 4)]
    assert {name: job.after for name, job in found.items() if job.after} == {
        f"{name}/rte/seed-{seed}": (f"e0/rte/seed-{seed}",) for name in ("e2", "e1e2") for seed in (3, 4)
    }


def test_choices_are_tried_first_and_teachers_of_e2_are_those_of_its_seed():
    found = jobs(grid(finetune=TWO_RATES, e2=TWO_RATES, seeds=[3]))
    tuning = {name: [f"tuning/{name}/rte/{rate}" for rate in RATES] for name in ("e0", "e1", "e2", "e1e2")}
    assert list(found) == [run for name in tuning for run in (*tuning[name], f"{name}/rte/seed-3")]
    for name in ("e0", "e1"):
        assert [found[run].after for run in tuning[name]] == [(), ()]
        assert found[f"{name}/rte/seed-3"].after == tuple(tuning[name])
    for name in ("e2", "e1e2"):  # while choosing, taught by models that have not seen the held-out rows
        assert [found[run].after for run in tuning[name]] == [tuple(tuning["e0"])] * 2
        assert found[f"{name}/rte/seed-3"].after == (*tuning[name], "e0/rte/seed-3")


def test_a_choice_for_e2_alone_needs_a_teacher_that_has_not_seen_the_held_out_rows():
    found = jobs(grid(e2=TWO_RATES, experiments=["e2"]))
    assert found["tuning/e2/rte/lr-2e-05-epochs-5"].after == ("tuning/e0/rte/lr-2e-05-epochs-10",)
    assert not any(name.startswith("tuning/e0") for name in jobs(grid(e2=TWO_RATES, experiments=["e1"])))


def test_e0_is_always_run_and_the_student_is_made_first(tmp_path):
    recipe = tmp_path / "e1.yaml"
    recipe.write_text(
        f"teacher: minilm\noutput: {tmp_path / 'e1'}\ntext: {{files: [a.txt], max_length: 16}}\n"
        "stages: [{kind: full, tokens: 1000}]\n"
    )
    config = ReproduceConfig.parse({**MINIMAL, "student": None, "e1": str(recipe), "experiments": ["e1"]})
    found = jobs(config)
    assert list(found) == ["student", *(f"{name}/rte/seed-{seed}" for name in ("e0", "e1") for seed in (3, 4))]
    assert found["e1/rte/seed-3"].after == ("student",)
    assert configuration(config, found["student"], {}) == DistillConfig.load(recipe)
    asked = configuration(config, found["e1/rte/seed-3"], {})
    assert isinstance(asked, FinetuneConfig)
    assert asked.model == str(tmp_path / "e1" / "model")
    recipe.write_text(recipe.read_text().replace("minilm", "other"))
    with pytest.raises(ConfigError, match="recipe on text for the teacher 'minilm', got one for 'other'"):
        configuration(config, found["student"], {})


def test_what_a_run_is_asked():
    config = grid(finetune=TWO_RATES, max_length=64, choices={"rte": {"finetune": {"bf16": True}}})
    found = jobs(config)
    scores = {f"tuning/e0/rte/{rate}": {"headline": score} for rate, score in zip(RATES, (0.5, 0.6), strict=True)}
    e0 = configuration(config, found["e0/rte/seed-4"], scores)
    assert isinstance(e0, FinetuneConfig)
    assert (e0.model, e0.output, e0.seed, e0.held_out) == ("minilm", Path("out/e0/rte/seed-4"), 4, None)
    assert (e0.learning_rate, e0.epochs, e0.batch_size, e0.max_length, e0.bf16) == (5e-5, 5, 16, 64, True)
    tried = configuration(config, found[f"tuning/e0/rte/{RATES[0]}"], {})
    assert isinstance(tried, FinetuneConfig)
    assert (tried.learning_rate, tried.seed, tried.held_out) == (2e-5, 3, 0.1)
    for name, student, origin in (("e2", None, None), ("e1e2", "runs/e1/model", "minilm")):
        distilled = configuration(config, found[f"{name}/rte/seed-4"], {})
        assert isinstance(distilled, DistillConfig)
        assert (distilled.teacher, distilled.student) == ("out/e0/rte/seed-4/model", student)
        assert distilled.origin == origin
        assert isinstance(distilled.task, TaskStage)
        assert (distilled.task.task, distilled.task.epochs, distilled.task.max_length) == ("rte", 10, 64)


def test_a_student_that_begins_as_it_is():
    config = grid(e2={"add_fine_tuning": False})
    asked = configuration(config, jobs(config)["e1e2/rte/seed-4"], {})
    assert isinstance(asked, DistillConfig)
    assert (asked.student, asked.origin) == ("runs/e1/model", None)


def test_a_converted_student_may_be_trained_before_its_task():
    before = [{"kind": "joint", "tokens": 1000, "losses": {"output_relative": 1}}]
    config = grid(e2={"before": before, "epochs": [2]})
    assert ReproduceConfig.parse(yaml.safe_load(config.to_yaml())) == config
    for name, kinds in (("e2", ["joint", "task"]), ("e1e2", ["task"])):
        asked = configuration(config, jobs(config)[f"{name}/rte/seed-4"], {})
        assert isinstance(asked, DistillConfig)
        assert [stage.kind for stage in asked.stages] == kinds
    with pytest.raises(ConfigError, match="joint"):
        grid(e2={"before": [{"kind": "task", "task": "rte"}]})


def test_the_first_of_equals_is_chosen_and_student_and_teacher_choose_from_the_same():
    config = grid(finetune=TWO_RATES | {"epochs": [5, 10, 5]})
    assert candidates(config, "e0", "rte") == candidates(config, "e1", "rte")
    assert candidates(config, "e0", "rte") == [Choice(r, e) for r in (2e-5, 5e-5) for e in (5, 10)]
    names = [job.name for job in plan(config) if job.experiment == "e0" and job.choice]
    scores = {name: {"headline": 0.5 + 0.1 * ("10" in name)} for name in names}
    assert chosen(config, "e0", "rte", scores) == Choice(2e-5, 10)


def test_e2_is_tuned_with_a_teacher_that_has_not_seen_the_held_out_rows():
    config = grid(finetune=TWO_RATES, e2=TWO_RATES)
    scores = {f"tuning/e0/rte/{rate}": {"headline": score} for rate, score in zip(RATES, (0.5, 0.6), strict=True)}
    asked = configuration(config, jobs(config)[f"tuning/e2/rte/{RATES[0]}"], scores)
    assert isinstance(asked, DistillConfig)
    assert asked.teacher == f"out/tuning/e0/rte/{RATES[1]}/model"
    assert asked.task is not None
    assert asked.task.model_dump()["held_out"] == 0.1


def test_choices_of_a_task_go_over_those_for_every_task_and_survive_a_round_trip():
    shared = {"finetune": TWO_RATES | {"bf16": True}, "e2": {"losses": {"soft_labels": 1}, "temperature": 4}}
    own = {"rte": {"finetune": {"epochs": [3]}, "e2": {"losses": {"hidden_mse": 2}}}}
    config = grid(**shared, choices=own)
    assert config.task("rte").finetune.learning_rates == (2e-5, 5e-5)
    assert (config.task("rte").finetune.epochs, config.task("cola").finetune.epochs) == ((3,), (5,))
    assert (config.task("rte").finetune.bf16, config.task("rte").e2.temperature) == (True, 4)
    assert config.task("rte").e2.losses == {"hidden_mse": 2}
    assert ReproduceConfig.parse(yaml.safe_load(config.to_yaml())) == config


FAULTS = {
    "unknown key": ({"task": ["rte"]}, "Did you mean 'tasks'"),
    "unknown task": ({"tasks": ["sst3"]}, "Did you mean 'sst2'"),
    "unknown task among the choices": ({"choices": {"rtt": {}}}, "Did you mean 'rte'"),
    "unknown loss": ({"e2": {"losses": {"hidden": 1}}}, "losses"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: expected each once"),
    "no student": ({"student": None}, "the folder of a distilled student.*got neither.*leave e1 and e1e2 out"),
    "two students": ({"e1": "recipes/e1.yaml"}, "got both"),
    "nothing held out": ({"held_out": 0}, "held_out"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        grid(**changes)


def test_no_student_is_needed_without_its_experiments():
    assert len(plan(grid(student=None, experiments=["e2"]))) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("reproduce-*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ReproduceConfig.load(path)
    found = plan(config)
    assert len({job.name for job in found}) == len(found)
    finals = [job for job in found if job.experiment and not job.choice]
    assert len(finals) == 4 * len(config.tasks) * len(config.seeds)
