"""Which runs a reproduction consists of, what each waits for, and what each is asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import ConfigError
from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.reproduce.recipe import EXPERIMENTS, Choices, Experiment, ReproduceConfig
from inhibitor.runs import Run

STUDENT = "student"  # the name of the run that makes it

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """One way to train."""

    learning_rate: float
    epochs: int


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: Its folder within the output, too.
        after: The names of the runs that have to be finished first.
        experiment: None for the run that makes the student.
        task: The task.
        seed: Of everything random.
        choice: What is tried on held-out rows; None where the run counts.
    """

    name: str
    after: tuple[str, ...] = ()
    experiment: Experiment | None = None
    task: str = ""
    seed: int = 0
    choice: Choice | None = None


def plan(config: ReproduceConfig) -> list[Job]:
    """Every run, task after task, each behind those it waits for."""
    jobs = [Job(STUDENT)] if config.e1 is not None and {"e1", "e1e2"} & set(config.experiments) else []
    for task in config.tasks:
        for experiment in _wanted(config):
            jobs += _of_experiment(config, experiment, task)
    return jobs


def _wanted(config: ReproduceConfig) -> list[Experiment]:
    return [experiment for experiment in EXPERIMENTS if experiment == "e0" or experiment in config.experiments]


def _of_experiment(config: ReproduceConfig, experiment: Experiment, task: str) -> list[Job]:
    needed: tuple[str, ...] = (STUDENT,) if experiment in ("e1", "e1e2") and config.e1 is not None else ()
    distilled = experiment in ("e2", "e1e2")
    teachers = tuple(tuned(config, "e0", task).values()) if distilled else ()
    tuning = tuned(config, experiment, task)
    jobs = [
        Job(name, (*needed, *teachers), experiment, task, config.seeds[0], choice) for choice, name in tuning.items()
    ]
    for seed in config.seeds:
        teacher = (final("e0", task, seed),) if distilled else ()
        after = (*needed, *tuning.values(), *teacher)
        jobs.append(Job(final(experiment, task, seed), after, experiment, task, seed))
    return jobs


def final(experiment: Experiment, task: str, seed: int) -> str:
    """The name of a run that counts."""
    return f"{experiment}/{task}/seed-{seed}"


def candidates(config: ReproduceConfig, experiment: Experiment, task: str) -> list[Choice]:
    """What an experiment may choose from on a task; the first goes before its equals."""
    found, own = choices(config, experiment, task), get_task(task)
    pairs = product(found.learning_rates or (own.learning_rate,), found.epochs or (own.epochs,))
    return [Choice(rate, epochs) for rate, epochs in dict.fromkeys(pairs)]


def choices(config: ReproduceConfig, experiment: Experiment, task: str) -> Choices:
    """E0 and E1 are trained with one set of choices, E2 and E1+E2 with the other."""
    return config.task(task).finetune if experiment in ("e0", "e1") else config.task(task).e2


def tuned(config: ReproduceConfig, experiment: Experiment, task: str) -> dict[Choice, str]:
    """The runs that try what may be chosen, by name; none where there is no choice.

    Where E2 has one, its runs need a teacher that has not seen the rows they are measured on: that of E0's.
    """
    found = candidates(config, experiment, task)
    students: list[Experiment] = [other for other in _wanted(config) if other in ("e2", "e1e2")]
    teaches = experiment == "e0" and any(len(candidates(config, other, task)) > 1 for other in students)
    if len(found) == 1 and not teaches:
        return {}
    return {
        choice: f"tuning/{experiment}/{task}/lr-{choice.learning_rate:g}-epochs-{choice.epochs}" for choice in found
    }


def chosen(config: ReproduceConfig, experiment: Experiment, task: str, results: Results) -> Choice:
    """The candidate with the best score on held-out rows, or the only one."""
    tuning = tuned(config, experiment, task)
    if not tuning:
        return candidates(config, experiment, task)[0]
    return max(tuning, key=lambda choice: float(results[tuning[choice]]["headline"]))


def student(config: ReproduceConfig) -> str:
    """Where the student of E1 lies, or will lie."""
    if config.e1 is None:
        return str(config.student)
    return str(Run(e1_recipe(config).output).model)


def e1_recipe(config: ReproduceConfig) -> DistillConfig:
    """The recipe that makes the student.

    Raises:
        ConfigError: It cannot be read, or teaches from another teacher than the grid's.
    """
    recipe = DistillConfig.load(Path(str(config.e1)))
    if recipe.teacher != config.teacher or recipe.task is not None:
        raise ConfigError(
            f"e1: {config.e1}",
            expected=f"a recipe on text for the teacher {config.teacher!r}",
            got=f"one on {recipe.task.task}" if recipe.task is not None else f"one for {recipe.teacher!r}",
            remedy="Name the same teacher in both.",
        )
    return recipe


def configuration(config: ReproduceConfig, job: Job, results: Results) -> FinetuneConfig | DistillConfig:
    """What a run is asked, now that those it waited for are finished."""
    if job.experiment is None:
        return e1_recipe(config)
    task = config.task(job.task)
    choice = job.choice or chosen(config, job.experiment, job.task, results)
    of_experiment = choices(config, job.experiment, job.task)
    common = {"output": config.output / job.name, "seed": job.seed}
    training = {
        "task": job.task,
        "data": config.data,
        "on_bad_row": config.on_bad_row,
        "learning_rate": choice.learning_rate,
        "epochs": choice.epochs,
        "batch_size": of_experiment.batch_size or get_task(job.task).batch_size,
        "max_length": task.max_length or get_task(job.task).max_length,
        "bf16": of_experiment.bf16,
        **({} if job.choice is None else {"held_out": config.held_out}),
    }
    if job.experiment in ("e0", "e1"):
        model = config.teacher if job.experiment == "e0" else student(config)
        return FinetuneConfig.parse({"model": model, **common, **training}, source=job.name)
    own = task.e2.model_dump(exclude={*Choices.model_fields, "before", "add_fine_tuning"})
    stage = {"kind": "task", **own, **training}
    if job.experiment == "e1e2":
        origin = config.teacher if task.e2.add_fine_tuning else None
        begin: dict[str, Any] = {"student": student(config), "origin": origin, "stages": [stage]}
    else:
        begin = {
            "inhibitor": config.inhibitor.model_dump(),
            "calibration": config.calibration and config.calibration.model_dump(),
            "stages": [*(before.model_dump() for before in task.e2.before), stage],
        }
    teacher = str(Run(config.output / _teacher(config, job, results)).model)
    return DistillConfig.parse({**common, "teacher": teacher, **begin}, source=job.name)


def _teacher(config: ReproduceConfig, job: Job, results: Results) -> str:
    """The E0 run that teaches: of the same seed; while choosing, the best that has not seen the held-out rows."""
    if job.choice is None:
        return final("e0", job.task, job.seed)
    return tuned(config, "e0", job.task)[chosen(config, "e0", job.task, results)]
