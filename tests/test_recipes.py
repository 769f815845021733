"""The recipes and scripts of the repository: they fit together, and those of the paper say what it published."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from inhibitor.cli import finetune
from inhibitor.distill.recipe import DistillConfig, FullStage, LayerwiseStage, TaskStage
from inhibitor.reproduce.plan import configuration, plan
from inhibitor.reproduce.recipe import ReproduceConfig
from inhibitor.runs import MODEL

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
LAYERWISE, FULL, E2, GRID = ("paper-e1-layerwise", "paper-e1", "paper-e2", "reproduce-paper")


def load(name, *overrides):
    return DistillConfig.load(RECIPES / f"{name}.yaml", overrides)


def commands(script):
    """Processes, verb and arguments of every line that runs inhibitor."""
    for line in script.read_text(encoding="utf-8").splitlines():
        found = re.match(r"(?:torchrun .*--nproc_per_node (\d+) -m )?inhibitor (\w+) (.*)", line)
        if found:
            yield int(found[1] or 1), found[2], shlex.split(found[3])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_run_recipes_that_are_valid(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(script))
    assert found
    for processes, verb, arguments in found:
        overrides = [argument for argument in arguments[1:] if "=" in argument]
        if verb == "distill":
            config = DistillConfig.load(arguments[0], overrides)
            if "paper" in arguments[0]:
                (stage,) = config.stages
                batch = {"layerwise": 64, "full": 512}[stage.kind]
                assert processes * stage.batch_size * stage.gradient_accumulation == batch
        if verb == "reproduce":
            assert ReproduceConfig.load(arguments[0], overrides).student is not None
    assert script.stat().st_mode & 0o100


def test_one_recipe_of_the_paper_begins_where_the_other_ends():
    assert load(FULL).student == str(load(LAYERWISE).output / MODEL)
    assert ReproduceConfig.load(RECIPES / f"{GRID}.yaml").student == str(load(FULL).output / MODEL)
    teachers = {load(LAYERWISE).teacher, load(FULL).teacher, ReproduceConfig.load(RECIPES / f"{GRID}.yaml").teacher}
    assert teachers == {"distilbert/distilbert-base-uncased"}


def test_the_first_stage_is_the_published_one():
    config = load(LAYERWISE)
    (stage,) = config.stages
    assert isinstance(stage, LayerwiseStage)
    assert config.text is not None
    assert config.text.blocks == 85_965
    assert stage.tokens == 2 * config.text.blocks * config.text.max_length  # epochs
    assert (stage.learning_rate, stage.inhibitor_learning_rate, stage.warmup_ratio) == (5e-4, 5e-4, 0.05)
    assert (stage.inputs, stage.losses) == ("student", {"context_mse": 1.0})
    attention = config.inhibitor
    assert (attention.per, attention.gamma, attention.eta, attention.delta) == ("layer", 1.0, 1.0, 0.5)
    assert attention.length_exponent == 0.0
    assert config.calibration is None


def test_the_second_stage_is_the_published_one():
    config = load(FULL)
    (stage,) = config.stages
    assert isinstance(stage, FullStage)
    assert config.text is not None
    assert (config.text.dataset, config.text.max_length) == ("wikimedia/wikipedia", 512)
    assert (stage.tokens, stage.learning_rate, stage.losses) == (9_700_000_000, 3e-4, {"hidden_mse": 1.0})
    assert stage.train_embeddings


def test_the_recipe_of_e2_is_what_the_grid_does():
    grid = ReproduceConfig.load(RECIPES / f"{GRID}.yaml")
    jobs = {job.name: job for job in plan(grid)}
    planned, recipe = configuration(grid, jobs["e2/qnli/seed-0"], {}), load(E2)
    assert isinstance(planned, DistillConfig)
    assert (planned.stages, planned.inhibitor, planned.calibration, planned.student) == (
        recipe.stages,
        recipe.inhibitor,
        recipe.calibration,
        recipe.student,
    )


@pytest.mark.parametrize("name", ["paper-e2", "e2"])
def test_the_command_above_a_recipe_of_e2_makes_its_teacher(name, monkeypatch):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    line = re.search(r"^#\s+inhibitor finetune (.*)$", text, flags=re.MULTILINE)
    assert line is not None
    asked: dict[str, Any] = {}
    monkeypatch.setattr("inhibitor.evaluate.finetune.finetune", lambda config: asked.update(config=config))
    monkeypatch.setattr("inhibitor.cli.show", lambda run: None)
    app = typer.Typer()
    app.command()(finetune.run)
    result = typer.testing.CliRunner().invoke(app, shlex.split(line[1]))
    assert result.exit_code == 0, result.output
    recipe = load(name)
    (stage,) = recipe.stages
    assert isinstance(stage, TaskStage)
    assert recipe.teacher == str(asked["config"].output / MODEL)
    assert (asked["config"].task, asked["config"].data) == (stage.task, stage.data)
