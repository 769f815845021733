"""The metrics of the GLUE benchmark (Wang et al., 2018, arXiv:1804.07461), never NaN."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from inhibitor.data.tasks import Task

Vector = npt.NDArray[Any]


def compute(task: Task, predictions: Vector, references: Vector) -> dict[str, float]:
    """Score predictions with every metric of a task.

    Args:
        task: Names the metrics.
        predictions: Class ids, or finite numbers for a regression, of shape ``(rows,)``.
        references: The labels, of shape ``(rows,)``.

    Returns:
        Fractions, not percent, in the task's order. F1 takes class 1 as positive. Where predictions or labels are
        constant, a correlation is 0.0, as is F1 where class 1 is neither predicted nor there.

    Example:
        >>> compute(get_task("mrpc"), np.array([1, 1, 0]), np.array([1, 0, 0]))
        {'f1': 0.6666666666666666, 'accuracy': 0.6666666666666666}
    """
    return {name: float(_METRICS[name](references, predictions)) for name in task.metrics}


def _f1(references: Vector, predictions: Vector) -> Any:
    return f1_score(references, predictions, zero_division=0.0)


def _matthews(references: Vector, predictions: Vector) -> Any:
    return 0.0 if _constant(references, predictions) else matthews_corrcoef(references, predictions)


def _pearson(references: Vector, predictions: Vector) -> Any:
    if _constant(references, predictions):
        return 0.0
    return pearsonr(references.astype(np.float64), predictions.astype(np.float64)).statistic


def _spearman(references: Vector, predictions: Vector) -> Any:
    return 0.0 if _constant(references, predictions) else spearmanr(references, predictions).statistic


def _constant(*vectors: Vector) -> bool:
    return any(np.ptp(vector) == 0 for vector in vectors)


_METRICS: Mapping[str, Callable[[Vector, Vector], Any]] = {
    "accuracy": accuracy_score,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
