"""Who is right where, and McNemar's test, against counts and sums written out."""

import json
from math import comb

import pytest

from inhibitor.data.tasks import get_task
from inhibitor.errors import RunError
from inhibitor.evaluate.agreement import Prediction, compare, read_predictions


def predictions(*said, labels=None, split="validation"):
    """A classifier's: each number is the class that it says."""
    labels = labels or [1] * len(said)
    return {
        (split, row): Prediction(label, [2.0 if c == answer else -1.0 for c in (0, 1, 2)])
        for row, (answer, label) in enumerate(zip(said, labels, strict=True))
    }


def test_every_row_is_counted_once_and_on_its_side():
    found = compare(predictions(1, 1, 0, 2, 1), predictions(1, 0, 1, 0, 2))
    assert (found.both, found.lost, found.won, found.neither) == (
        1,
        (("validation", 1), ("validation", 4)),
        (("validation", 2),),
        1,
    )
    assert found.rows == 5


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (7, 2), (2, 7), (5, 5), (30, 12)])
def test_mcnemar_is_the_two_sided_binomial_test(lost, won):
    teacher = predictions(*([1] * lost + [0] * won + [1, 0]))
    student = predictions(*([0] * lost + [1] * won + [1, 2]))
    count = lost + won
    tail = sum(comb(count, k) for k in range(min(lost, won) + 1)) / 2**count
    assert compare(teacher, student).p_value == pytest.approx(min(1.0, 2 * tail) if count else 1.0)


def test_the_fault_is_how_far_the_answer_is_above_the_label():
    entry = Prediction(2, [0.5, 3.0, -1.0])
    assert (entry.said, entry.right, entry.fault) == (1, False, 4.0)
    assert Prediction(1, [0.5, 3.0]).fault == 0.0


def test_a_number_is_right_within_a_point():
    assert [Prediction(3.0, [said]).right for said in (2.0, 3.9, 4.0, 4.01, 1.9)] == [True, True, True, False, False]
    assert Prediction(3.0, [4.5]).fault == 1.5


@pytest.mark.parametrize(
    "other", [predictions(1, 1), predictions(1, 1, 1, split="test"), predictions(1, 1, 1, labels=[1, 1, 0])]
)
def test_other_rows_are_not_compared(other):
    with pytest.raises(RunError, match="the same rows"):
        compare(predictions(1, 1, 1), other)


def test_a_run_without_predictions_has_none(tmp_path):
    assert read_predictions(tmp_path, get_task("sst2")) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"validation": [{"row": 0}]}',
        '{"validation": [{"row": 0, "label": 1}]}',
        '{"validation": [{"row": 0, "label": 1, "logits": []}]}',
        '{"validation": [{"row": 0, "label": 2, "logits": [0, 1]}]}',
        '{"validation": [{"row": 0, "label": 0.5, "logits": [0, 1]}]}',
        '{"validation": [{"row": 0, "label": 1, "logits": [0, 1, 2]}]}',
    ],
)
def test_damaged_predictions_are_named(tmp_path, text):
    (tmp_path / "predictions.json").write_text(text)
    with pytest.raises(RunError, match=r"predictions\.json: expected predictions as finetune writes them"):
        read_predictions(tmp_path, get_task("sst2"))


def test_predictions_are_read_by_split_and_row(tmp_path):
    classes, numbers = tmp_path / "classes", tmp_path / "numbers"
    for folder, content in (
        (classes, {"a": [{"row": 0, "label": 1, "logits": [0.5, 2]}], "b": [{"row": 3, "label": 0, "logits": [1, 0]}]}),
        (numbers, {"validation": [{"row": 0, "label": 2.5, "logits": [3.25]}]}),
    ):
        folder.mkdir()
        (folder / "predictions.json").write_text(json.dumps(content))
    assert read_predictions(classes, get_task("sst2")) == {
        ("a", 0): Prediction(1, [0.5, 2.0]),
        ("b", 3): Prediction(0, [1.0, 0.0]),
    }
    assert read_predictions(numbers, get_task("stsb")) == {("validation", 0): Prediction(2.5, [3.25])}
