"""Tables from records that nobody measured: against what they should look like, and against sums by hand."""

import json
import re
import statistics
from pathlib import Path

import pytest

from inhibitor import __version__
from inhibitor.errors import RunError
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.output import to_latex, write_results
from inhibitor.reproduce.published import GLUE, OFFICIAL_ROWS, PUBLISHED
from inhibitor.reproduce.tables import columns, tables
from tests.report import samples
from tests.reproduce.conftest import record

GOLDEN = Path(__file__).parent / "golden"


def handwritten():
    """E0, E1 and E2 on CoLA and RTE with three seeds, and on a part of QNLI."""
    found = []
    for task, scores in {
        "cola": {"e0": (0.40, 0.42, 0.44), "e1": (0.38, 0.40, 0.42), "e2": (0.41, 0.41, 0.41)},
        "rte": {"e0": (0.60, 0.62, 0.64), "e1": (0.61, 0.63, 0.65)},
    }.items():
        metric = "matthews" if task == "cola" else "accuracy"
        for experiment, values in scores.items():
            found += [record(experiment, task, seed, score, metric=metric) for seed, score in enumerate(values)]
    part = {"trained": {"train_subset2k": 2000}, "measured": {"validation": 5463}}
    found += [record(experiment, "qnli", 0, score, **part) for experiment, score in (("e0", 0.8), ("e1", 0.75))]
    return accuracy.with_teachers(found)


def test_tables_are_as_they_were(tmp_path):
    """Regenerate with: python -m tests.reproduce.test_tables"""
    write_results(handwritten(), tmp_path)
    for name in ("results.md", "results.tex", "results.json"):
        assert (tmp_path / name).read_text() == (GOLDEN / name).read_text(), name


def test_means_deviations_and_retention_by_hand():
    data = {column.task: column for column in columns(handwritten())}
    assert data["cola"].scores("e1") == pytest.approx([38, 40, 42])
    scores = {row[0]: row[1:] for row in tables(handwritten())[0].rows}
    assert scores["E0"] == ("42.0 ± 2.0", "62.0 ± 2.0")
    assert scores["E1"] == ("40.0 ± 2.0", "63.0 ± 2.0")
    assert scores["E2"] == ("41.0 ± 0.0", "-")
    assert scores["E1, published"] == ("40.0", "59.2")
    kept = {row[0]: row[1:] for row in tables(handwritten())[1].rows}
    assert kept["E1"] == ("95.2", "101.6", "99.0")  # 40/42, 63/62, 103/104
    assert kept["E2"] == ("97.6", "-", "-")  # no average where a task is missing
    assert kept["E1, published"] == ("78.0", "98.8", "89.2")  # 40/51.3, 59.2/59.9, 99.2/111.2


def test_retention_is_of_the_seeds_that_both_have():
    found = [record("e0", seed=0, score=0.5), record("e1", seed=0, score=0.4), record("e1", seed=1, score=0.1)]
    found = accuracy.with_teachers(found)
    assert [one.teacher_score for one in found] == [0.5, 0.5, None]
    assert columns(found)[0].of_teacher("e1") == pytest.approx((40, 50))


def test_a_teacher_of_other_rows_is_no_teacher():
    other = record("e0", measured={"validation_part": 100})
    assert [one.teacher_score for one in accuracy.with_teachers([other, record("e1")])] == [0.5, None]


@pytest.mark.parametrize(
    "rows",
    [
        {"trained": {"train_subset2k": 2000}},
        {"trained": {"train": 2000}},  # a part under the name of the whole
        {"measured": {"validation_first": 1043}},
        {"measured": {"train_held_out": 855}},
        {"trained": {"train": 8550}},  # a row set aside
    ],
)
def test_a_part_stands_apart_and_is_named(rows):
    (column,) = columns([record(**rows)])
    assert not column.official
    titles = [table.title for table in tables([record(**rows)])]
    assert titles == ["Apart: scores on other rows than the benchmark's", "Rows and choices"]
    (cells,) = tables([record(**rows)])[-1].rows
    name, count = next(iter(next(iter(rows.values())).items()))
    assert f"{name} {count:,}" in cells


def test_whole_and_part_of_a_task_are_two_columns():
    found = columns([record("e0"), record("e1", trained={"train_part": 10})])
    assert [column.official for column in found] == [True, False]


def test_an_average_of_glue_needs_all_nine_whole():
    nine = [record("e0", task, 0, (index + 1) / 10) for index, task in enumerate(GLUE)]
    whole = tables(nine)[0]
    assert whole.columns[-1] == "GLUE"
    assert whole.rows[0][-1] == "50.0"
    assert [row[-1] for row in whole.rows[1:]] == ["77.0", "74.5", "68.7"]  # the paper's own averages
    part = [*nine[:-1], record("e0", GLUE[-1], 0, 0.5, trained={"train": 3})]
    for table in tables(part):
        assert "GLUE" not in table.columns
    partly = [*nine, record("e1", "cola", 0, 0.5)]
    assert tables(partly)[0].rows[1][-1] == "-"


def test_published_averages_of_the_six_tasks_that_are_whole_here():
    six = [
        record(name, task) for name in ("e0", "e1", "e2") for task in ("cola", "sst2", "mrpc", "stsb", "rte", "wnli")
    ]
    kept = {row[0]: row[-1] for row in tables(accuracy.with_teachers(six))[1].rows}
    assert (kept["E1, published"], kept["E2, published"]) == ("96.0", "92.9")


def test_published_scores_average_as_the_paper_says():
    averages = [statistics.fmean(scores[task] for task in GLUE) for scores in PUBLISHED.values()]
    assert [round(average, 1) for average in averages] == [77.0, 74.5, 68.7]


def test_official_row_counts_are_those_of_the_data(shared_data):
    import pyarrow.parquet as pq

    checked = 0
    for task, rows in OFFICIAL_ROWS.items():
        for split, count in rows.items():
            for path in (shared_data / "glue" / task / f"{split}.parquet", shared_data / task / f"{split}.parquet"):
                if path.is_file():
                    assert pq.ParquetFile(path).metadata.num_rows == count
                    checked += 1
    assert checked > 0


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "accuracy.jsonl"
    assert accuracy.read(path) == []
    accuracy.write(path, handwritten())
    assert accuracy.read(path) == handwritten()
    lines = path.read_text().splitlines()
    assert set(json.loads(lines[0])) == set(accuracy.Record.model_fields)
    path.write_text("\n".join([*lines, '{"experiment": "e0"']))
    with pytest.raises(RunError, match=f"line {len(lines) + 1}: expected a record.*Delete that line"):
        accuracy.read(path)


def test_the_commit_or_the_version_is_known(monkeypatch):
    own = f"inhibitor {__version__}"
    assert re.fullmatch(rf"[0-9a-f]{{40}}(-dirty)?|{own}", accuracy.commit())
    monkeypatch.setattr("shutil.which", lambda name: None)  # as outside of a repository
    assert accuracy.commit() == own


def test_rows_cut_or_in_train_too_are_told_of_runs_that_are_there(tmp_path):
    counts = {"rows": {"train": 90, "validation": 10}, "truncated": {"train": 9, "validation": 0}}
    taught = samples.distill_on("rte", teacher="e0/rte/seed-0/model") | counts
    finetuned = samples.finetune("cola") | counts | {"overlap": {"validation": 3}}
    for name, metrics in (("e2/rte/seed-0", taught), ("e0/cola/seed-1", finetuned)):
        samples.write(tmp_path / name, metrics)
    for path in write_results([*handwritten(), record("e2", "rte")], tmp_path)[1:]:
        text = path.read_text()
        assert "CoLA: longer than max_length, and cut: 9 of 90 rows of train." in text.replace(r"\_", "_")
        assert "CoLA: in train too: 3 of 10 rows of validation." in text
        assert "RTE: longer than max_length, and cut: 9 of 90 rows of train." in text.replace(r"\_", "_")


def test_the_page_is_whole_and_latex_is_escaped(tmp_path):
    from tests.report.test_page import Page

    (tmp_path / "config.yaml").write_text("teacher: <minilm>\n")
    *_, page = write_results(handwritten(), tmp_path)
    read = Page(page)
    assert (read.tags["table"], read.tags["details"]) == (5, 1)
    assert "&lt;minilm&gt;" in read.text
    latex = to_latex(tables([record(task="cola", trained={"train_50%": 1})])[-1])
    assert r"train\_50\% 1" in latex
    assert latex.count("{") == latex.count("}")


if __name__ == "__main__":
    write_results(handwritten(), GOLDEN)
    (GOLDEN / "results.html").unlink()
