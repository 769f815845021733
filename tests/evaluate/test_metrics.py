from typing import Any

import numpy as np
import pytest

from inhibitor.data.tasks import get_task
from inhibitor.evaluate.metrics import Vector, compute


def confusion(predictions: Vector, references: Vector) -> list[int]:
    return [int(((predictions == p) & (references == r)).sum()) for p, r in ((1, 1), (1, 0), (0, 1), (0, 0))]


def by_hand(predictions: Vector, references: Vector) -> dict[str, float]:
    """The binary metrics from their definitions."""
    tp, fp, fn, tn = confusion(predictions, references)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": (tp + tn) / len(references),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
        "matthews": (tp * tn - fp * fn) / spread**0.5 if spread else 0.0,
    }


def ranks(values: Vector) -> Vector:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pearson(x: Vector, y: Vector) -> Any:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())


def test_classes_agree_with_the_definitions():
    rng = np.random.default_rng(0)
    for _ in range(300):
        predictions, references = rng.integers(0, 2, (2, rng.integers(1, 12)))
        expected = by_hand(predictions, references)
        for name in ("cola", "mrpc", "rte"):
            for metric, value in compute(get_task(name), predictions, references).items():
                assert value == pytest.approx(expected[metric], abs=1e-12), metric


def test_correlations_agree_with_the_definitions():
    rng = np.random.default_rng(0)
    for _ in range(100):
        predictions = rng.normal(size=20).astype(np.float32)
        references = rng.integers(0, 6, 20).astype(np.float32)  # with ties
        scores = compute(get_task("stsb"), predictions, references)
        assert list(scores) == ["spearman", "pearson"]
        assert scores["spearman"] == pytest.approx(pearson(ranks(predictions), ranks(references)), abs=1e-12)
        assert scores["pearson"] == pytest.approx(
            pearson(predictions.astype(float), references.astype(float)), abs=1e-12
        )


def test_golden_values():
    # 6 rows: 3 true positives, 1 false positive, 1 false negative, 1 true negative
    predictions, references = np.array([1, 1, 1, 1, 0, 0]), np.array([1, 1, 1, 0, 1, 0])
    assert compute(get_task("cola"), predictions, references) == {"matthews": pytest.approx(0.25)}
    assert compute(get_task("mrpc"), predictions, references) == {"f1": 0.75, "accuracy": pytest.approx(2 / 3)}
    assert compute(get_task("mnli"), np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "rte"])
@pytest.mark.parametrize("predictions", [[0, 0, 0], [1, 1, 1], [0, 1, 1]])
@pytest.mark.parametrize("references", [[0, 0, 0], [1, 1, 1], [0, 1, 0]])
@pytest.mark.filterwarnings("error")
def test_constant_vectors_have_defined_values(name, predictions, references):
    scores = compute(get_task(name), np.array(predictions), np.array(references))
    assert all(np.isfinite(value) for value in scores.values())
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        assert all(scores[metric] == 0.0 for metric in {"matthews", "spearman", "pearson"} & set(scores))
