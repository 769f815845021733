"""What a reproduction is asked: two models, tasks, seeds, experiments, and what may be chosen for each task."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from inhibitor.config import Config, ModelName, Seed, UserPath
from inhibitor.data.files import OnBadRow
from inhibitor.data.tasks import TASKS
from inhibitor.distill.recipe import (
    CalibrationConfig,
    ContextLoss,
    FullStage,
    HiddenLoss,
    JointStage,
    LayerwiseStage,
    TaskLoss,
    Weight,
)
from inhibitor.errors import ConfigError, suggestion
from inhibitor.models.config import InhibitorConfig
from inhibitor.reproduce.published import PUBLISHED

Experiment = Literal["e0", "e1", "e2", "e1e2"]
EXPERIMENTS: tuple[Experiment, ...] = ("e0", "e1", "e2", "e1e2")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
BeforeTask = Annotated[LayerwiseStage | JointStage | FullStage, Field(discriminator="kind")]


class Choices(Config):
    """What a training may choose from. Where there are several, rows held out from train decide.

    Args:
        learning_rates: The task's own where there are none.
        epochs: The task's own where there are none.
        batch_size: Rows per step; the task's own where None.
        bf16: Whether matrix products run in bfloat16.
    """

    learning_rates: tuple[Rate, ...] = ()
    epochs: tuple[Count, ...] = ()
    batch_size: Count | None = None
    bf16: bool = False


class DistillChoices(Choices):
    """The stage of E2; see ``inhibitor.distill.recipe.TaskStage`` for its fields.

    Args:
        losses: Weight of each loss.
        temperature: Of ``soft_labels``.
        inhibitor_learning_rate: That of γ, η, δ, ρ, τ and u.
        warmup_ratio: Share of the steps in which the rate rises.
        weight_decay: AdamW's.
        dropout: Whether the student is trained with its dropout.
        before: What E2's converted student is trained on first, on the task's rows; that of E1 knows such stages
            from its text.
        add_fine_tuning: Whether E1+E2 begins with what fine-tuning changed in the teacher added to the student, whose
            layers must then be the teacher's in number and size (``origin`` in ``DistillConfig``).
    """

    losses: dict[ContextLoss | HiddenLoss | TaskLoss, Weight] = Field(
        default={"soft_labels": 0.5, "hidden_mse": 0.5}, min_length=1
    )
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    inhibitor_learning_rate: float = Field(default=5e-3, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    dropout: bool = True
    before: tuple[BeforeTask, ...] = ()
    add_fine_tuning: bool = True


class TaskChoices(Config):
    """What one task is trained with.

    Args:
        max_length: Tokens a row may have; the task's own where None.
        finetune: For E0 and E1: teacher and student choose from the same.
        e2: For E2 and E1+E2.
    """

    max_length: int | None = Field(default=None, ge=8)
    finetune: Choices = Choices()
    e2: DistillChoices = DistillChoices()


class ReproduceConfig(TaskChoices):
    """The grid of experiments, tasks and seeds. ``max_length``, ``finetune`` and ``e2`` hold for every task.

    Args:
        teacher: A local folder, a hub id or ``"minilm"``.
        student: The folder of a student distilled from it on text (E1).
        e1: In its place, the recipe that makes the student: it is run first, in its own output, if it has not been.
        data: A folder with the tasks' data, or None for the Hugging Face hub.
        on_bad_row: Whether a bad row stops a run or is left out.
        output: The folder of all runs, of ``accuracy.jsonl`` and of the tables.
        tasks: Which tasks, in this order.
        seeds: A run for each. Hyper-parameters are chosen with the first.
        experiments: e0, fine-tuning of the teacher, is always run: the others are measured against it. e1: fine-tuning
            of the student; e2: distillation on the task from the e0 model of the same seed, into that model converted;
            e1e2: the same, into the student of e1.
        held_out: The share of a training split that is kept to choose by.
        choices: By task, what differs from the choices for every task.
        inhibitor: The attention of e2's converted students.
        calibration: How its parameters are fitted first.
        executor: ``local``, processes of this machine; ``ray``, a Ray cluster.
        processes: Runs at a time. They share this machine's cores; on Ray, where the cluster decides how many there
            are at a time, each asks for that share of cores.
        curve: ``accuracy.jsonl`` of grids whose students were distilled on other amounts of text: E1's retention
            against tokens is shown with theirs.
        submission: Whether files for GLUE's test server are written, of every experiment's first seed.
    """

    teacher: ModelName
    student: ModelName | None = None
    e1: UserPath | None = None
    data: UserPath | None = None
    on_bad_row: OnBadRow = "stop"
    output: UserPath
    tasks: tuple[str, ...] = Field(default=tuple(PUBLISHED["e0"]), min_length=1)
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    experiments: tuple[Experiment, ...] = EXPERIMENTS
    held_out: float = Field(default=0.1, gt=0, lt=1)
    choices: dict[str, TaskChoices] = Field(default={})
    inhibitor: InhibitorConfig = InhibitorConfig()
    calibration: CalibrationConfig | None = CalibrationConfig()
    executor: Literal["local", "ray"] = "local"
    processes: int = Field(default=1, gt=0)
    curve: tuple[UserPath, ...] = ()
    submission: bool = False

    def task(self, name: str) -> TaskChoices:
        """What a task is trained with."""
        return self.choices.get(name, self)

    @model_validator(mode="before")
    @classmethod
    def _choices_begin_with_those_for_every_task(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("choices"), Mapping):
            return values
        shared = {key: values[key] for key in TaskChoices.model_fields if key in values}
        return {**values, "choices": {task: _over(shared, own) for task, own in values["choices"].items()}}

    @model_validator(mode="after")
    def _can_be_done(self) -> "ReproduceConfig":
        for task in (*self.tasks, *self.choices):
            if task not in TASKS:
                raise ConfigError("tasks", expected="known tasks", got=repr(task), remedy=suggestion(task, TASKS))
        for name in ("tasks", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(name, expected="each once", got=str(list(values)), remedy="Leave the second out.")
        from_student = {"e1", "e1e2"} & set(self.experiments)
        if (self.student is not None) + (self.e1 is not None) != 1 and (from_student or self.student is not None):
            raise ConfigError(
                "student",
                expected="the folder of a distilled student, or in e1 the recipe that makes it",
                got="neither" if self.student is None else "both",
                remedy="Name one of them, or leave e1 and e1e2 out of the experiments."
                if self.student is None
                else "Name one of them.",
            )
        return self


def _over(shared: Mapping[str, Any], own: Any) -> Any:
    """A task's own values over those for every task; in ``finetune`` and ``e2``, value by value."""
    if not isinstance(own, Mapping):
        return own
    both = {
        key: {**shared[key], **own[key]}
        for key in own
        if isinstance(own[key], Mapping) and isinstance(shared.get(key), Mapping)
    }
    return {**shared, **own, **both}
