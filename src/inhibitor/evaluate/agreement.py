"""Two models on the same rows: which of them is right where, and whether the difference could be chance."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from inhibitor.data.labelled import LabelledData
from inhibitor.data.tasks import Task
from inhibitor.errors import RunError

PREDICTIONS = "predictions.json"
WITHIN = 1.0  # a predicted number counts as right where it is no farther from the label

Row = tuple[str, int]  # a split's name, and the row's number in it


@dataclass(frozen=True)
class Prediction:
    """What a model says of one row.

    Args:
        label: The class id or number that the row has.
        logits: One for each class; of a regression, the predicted number.
    """

    label: float
    logits: Sequence[float]

    @property
    def said(self) -> float:
        """The class with the highest logit, or the number."""
        return self.logits[0] if len(self.logits) == 1 else self.logits.index(max(self.logits))

    @property
    def right(self) -> bool:
        """Whether that is the label, or for a number within a point of it."""
        return abs(self.said - self.label) <= (WITHIN if len(self.logits) == 1 else 0)

    @property
    def fault(self) -> float:
        """How wrong it is: the number's distance, or how far the highest logit is above the label's."""
        if len(self.logits) == 1:
            return abs(self.said - self.label)
        return max(self.logits) - self.logits[int(self.label)]


@dataclass(frozen=True)
class Agreement:
    """How two models do on the same rows.

    Args:
        both: Rows that both have right.
        lost: Rows that the teacher has right and the student wrong.
        won: Rows that the student has right and the teacher wrong.
        neither: Rows that both have wrong.
    """

    both: int
    lost: tuple[Row, ...]
    won: tuple[Row, ...]
    neither: int

    @property
    def rows(self) -> int:
        """All of them."""
        return self.both + len(self.lost) + len(self.won) + self.neither

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how probable rows so unevenly lost and won are between equal models.

        Source: Q. McNemar, Psychometrika 12 (1947).
        """
        differing = len(self.lost) + len(self.won)
        return float(binomtest(len(self.lost), differing).pvalue) if differing else 1.0


def compare(teacher: Mapping[Row, Prediction], student: Mapping[Row, Prediction]) -> Agreement:
    """Compare two models' predictions.

    Raises:
        RunError: They are not of the same rows.
    """
    labels = [{row: prediction.label for row, prediction in side.items()} for side in (teacher, student)]
    if labels[0] != labels[1]:
        raise RunError(
            PREDICTIONS,
            expected="predictions of the same rows",
            got=f"{len(labels[0])} and {len(labels[1])} rows, or other labels",
            remedy="Measure both models on the same data.",
        )
    sides = {row: (teacher[row].right, student[row].right) for row in teacher}
    found = {
        outcome: tuple(row for row, side in sides.items() if side == outcome)
        for outcome in ((True, True), (True, False), (False, True), (False, False))
    }
    return Agreement(len(found[True, True]), found[True, False], found[False, True], len(found[False, False]))


def as_json(labelled: LabelledData, logits: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What ``predictions.json`` holds: by what the rows are, each row's number, label and logits."""
    labels = {split.name: split.rows["label"] for split in labelled.splits.values()}
    return {
        name: [
            {"row": row, "label": label, "logits": values}
            for row, (label, values) in enumerate(zip(labels[name], rows.round(5).tolist(), strict=True))
        ]
        for name, rows in logits.items()
    }


def read_predictions(run: Path, task: Task) -> dict[Row, Prediction] | None:
    """The predictions of a run finished on a task; None where it has none.

    Raises:
        RunError: The file is damaged, or of another task.
    """
    path = run / PREDICTIONS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            (str(split), int(entry["row"])): _prediction(task, entry["label"], entry["logits"])
            for split, entries in content.items()
            for entry in entries
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(
            str(path),
            expected="predictions as finetune writes them",
            got=f"{type(error).__name__}: {error}"[:200],
            remedy="Repeat the run, or delete that file.",
        ) from None


def _prediction(task: Task, label: float, logits: Sequence[float]) -> Prediction:
    if len(logits) != (len(task.labels) or 1) or not (task.regression or label in range(len(task.labels))):
        raise ValueError(f"label {label} and {len(logits)} logits are not those of {task.name}")
    return Prediction(float(label) if task.regression else int(label), [float(value) for value in logits])


def texts(labelled: LabelledData) -> dict[Row, tuple[str, ...]]:
    """The one or two texts of every row."""
    return {
        (split.name, number): row
        for split in labelled.splits.values()
        for number, row in enumerate(zip(*(split.rows[column] for column in labelled.task.texts), strict=True))
    }


def name(task: Task, said: float) -> str:
    """A class by its name, or a number."""
    return f"{said:.2f}" if task.regression else task.labels[int(said)]
