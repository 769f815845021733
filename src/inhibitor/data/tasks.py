"""What each labelled task is: its columns, its classes, its metrics and how the authors fine-tuned on it."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from inhibitor.errors import DataError, suggestion


@dataclass(frozen=True)
class Task:
    """One labelled task, in the names and label ids of the Hugging Face hub.

    Args:
        name: How the user asks for it.
        texts: The one or two columns a model reads.
        labels: The class names in the hub's order, so a name's place is its id; empty for a regression.
        metrics: What is measured; the first is the headline.
        evaluation: The splits that are scored; the first gives the headline.
        repository: The hub's dataset, empty for the one that this package carries.
        configuration: Its configuration on the hub.
        max_length: Tokens a row may have, special tokens included.
        epochs: Passes over the training split.
        learning_rate: The peak of the linear schedule.
        batch_size: Rows per step.
        range: The least and the greatest label of a regression; None where labels are classes.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluation: tuple[str, ...] = ("validation",)
    repository: str = "nyu-mll/glue"
    configuration: str | None = None
    max_length: int = 128
    epochs: int = 10
    learning_rate: float = 2e-5
    batch_size: int = 16
    range: tuple[float, float] | None = None

    @property
    def regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return self.range is not None

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split a fine-tuning run reads."""
        return ("train", *self.evaluation)


_PAIR = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), configuration="cola"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            evaluation=("validation_matched", "validation_mismatched"),
            configuration="mnli",
            epochs=5,
        ),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), configuration="mrpc"),
        Task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), configuration="qnli", epochs=5),
        Task(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            configuration="qqp",
            epochs=3,
        ),
        Task("rte", _PAIR, ("entailment", "not_entailment"), configuration="rte"),
        Task("sst2", ("sentence",), ("negative", "positive"), configuration="sst2", epochs=5),
        Task("stsb", _PAIR, (), ("spearman", "pearson"), configuration="stsb", learning_rate=4e-5, range=(0.0, 5.0)),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), configuration="wnli"),
        Task(
            "imdb",
            ("text",),
            ("neg", "pos"),
            evaluation=("test",),
            repository="stanfordnlp/imdb",
            configuration="plain_text",
            max_length=512,
            epochs=4,
            batch_size=32,
        ),
        Task("reviews", ("sentence",), ("negative", "positive"), repository="", epochs=5, learning_rate=1e-4),
    )
}
"""The nine GLUE tasks, IMDb, and the small set of reviews shipped with the package, by name."""


def get_task(name: str) -> Task:
    """Look up a task, as tables print it too (SST-2); ``DataError`` with the nearest known name for an unknown one."""
    plain = name.lower().replace("-", "")
    if plain not in TASKS:
        raise DataError(
            f"task {name!r}", expected="a known task", got="an unknown one", remedy=suggestion(plain, TASKS)
        )
    return TASKS[plain]


def _task_default(value: Any, info: ValidationInfo) -> Any:
    task = info.data.get("task")
    return getattr(TASKS[task], str(info.field_name)) if value is None and task in TASKS else value


TaskName = Annotated[str, AfterValidator(lambda name: get_task(name).name)]
"""In a configuration, the field ``task``: a known task's name."""

TaskDefault = BeforeValidator(_task_default)
"""Of a field behind ``task``: None is the task's own value of that name."""
