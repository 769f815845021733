"""Retention against tokens: by hand, and on the page."""

import itertools
import json

import pytest

from inhibitor.errors import ConfigError
from inhibitor.report.curve import curve_figure
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.curve import curve_lines, curve_table, points, read_others
from inhibitor.reproduce.output import write_results
from tests.reproduce.conftest import record


def grid(tokens, cola, rte=None):
    """E0 scores 0.4 on CoLA and 0.6 on RTE, E1 what is given."""
    found = [record("e0", "cola", score=0.4), record("e1", "cola", score=cola, distillation_tokens=tokens)]
    if rte is not None:
        found += [record("e0", "rte", score=0.6), record("e1", "rte", score=rte, distillation_tokens=tokens)]
    return accuracy.with_teachers(found)


def test_one_point_for_each_student_by_tokens():
    found = points([grid(9_000_000, 0.4, 0.6), grid(1_000_000, 0.3, 0.57), grid(4_000_000, 0.36)])
    assert [point.tokens for point in found] == [1_000_000, 4_000_000, 9_000_000]
    table = curve_table(found)
    assert table.columns == ("tokens", "CoLA", "RTE")  # one shared task needs no average
    assert table.rows == (
        ("1,000,000", "75.0", "95.0"),
        ("4,000,000", "90.0", "-"),
        ("9,000,000", "100.0", "100.0"),
    )


def test_a_grid_with_two_students_has_a_point_for_each():
    both = grid(1_000_000, 0.3) + [one for one in grid(4_000_000, 0.36, 0.57) if one.experiment == "e1"][:1]
    found = points([both[:1] + both[1:2]]) + points([both[:1] + both[2:]])
    assert points([both]) == found
    assert [point.tokens for point in found] == [1_000_000, 4_000_000]


def test_a_student_before_any_training_leaves_room_for_the_others():
    axis = curve_figure({"CoLA": [(0, 58.8), (4_000_000, 90.0), (12_000_000, 99.6), (18_000_000, 99.7)]}).axes[0]
    places = [axis.transData.transform((tokens, 50))[0] for tokens in (0, 4_000_000, 12_000_000, 18_000_000)]
    width = axis.bbox.width
    assert [after - before > 0.08 * width for before, after in itertools.pairwise(places)] == [True] * 3


def test_the_average_is_over_tasks_that_all_have():
    table = curve_table(points([grid(1000, 0.3, 0.6), grid(2000, 0.4, 0.55)]))
    assert table.columns[-1] == "these 2"
    assert [row[-1] for row in table.rows] == ["90.0", "95.0"]  # 0.9 / 1.0, 0.95 / 1.0


def test_lines_are_the_tables():
    lines = curve_lines(points([grid(1000, 0.3, 0.6), grid(2000, 0.4, 0.55)]))
    assert list(lines) == ["CoLA", "RTE", "together"]
    assert dict(lines["CoLA"]) == pytest.approx({1000: 75, 2000: 100})
    assert dict(lines["together"]) == pytest.approx({1000: 90, 2000: 95})


def test_students_whose_text_is_unknown_and_parts_of_tasks_are_left_out():
    unknown = accuracy.with_teachers([record("e0"), record("e1", distillation_tokens=None)])
    part = {"trained": {"train_subset2k": 2000}, "measured": {"validation": 5463}}
    apart = accuracy.with_teachers([record("e0", "qnli", **part), record("e1", "qnli", **part)])
    assert points([unknown, apart]) == []


def test_it_is_in_the_results(tmp_path):
    _, text, _, page = write_results(grid(2000, 0.4), tmp_path, [grid(1000, 0.3)])
    assert "Retention against tokens of text" in text.read_text()
    assert page.read_text().count("<svg") == 1
    assert json.loads((tmp_path / "results.json").read_text())["curve"][0] == {
        "tokens": 1000,
        "scores": {"cola": [30, 40]},
    }


@pytest.mark.parametrize(("name", "content"), [("none.jsonl", None), ("empty.jsonl", "")])
def test_grids_without_records_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="of another grid"):
        read_others([tmp_path / name])
