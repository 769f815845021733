"""What a page says of the rows that teacher and student judge differently."""

import html
import json
import re
from typing import Any

import pytest

from inhibitor.data.labelled import SHIPPED
from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.evaluate.agreement import read_predictions
from inhibitor.evaluate.finetune import FinetuneConfig, finetune
from inhibitor.report import write_report
from inhibitor.report.disagreement import Pair, disagreements, pairs
from inhibitor.report.records import read_runs
from inhibitor.report.results import studies
from inhibitor.reproduce.output import write_results
from tests.distill.conftest import reviews  # noqa: F401 - a fixture
from tests.reproduce.conftest import record

from . import samples

ROWS = [json.loads(line) for line in (SHIPPED / "reviews" / "validation.jsonl").read_text().splitlines()[:24]]


def run(folder, data, wrong=(), **values):
    """A fine-tuned model's run on the 24 reviews: it errs on the rows named, by as much as is named."""
    samples.write(folder, samples.finetune("reviews", **values))
    config = FinetuneConfig(model="minilm", task="reviews", data=data, output=folder)
    (folder / "config.yaml").write_text(config.to_yaml())
    faults = dict(wrong)
    entries = []
    for row, entry in enumerate(ROWS):
        right, other = entry["label"], 1 - entry["label"]
        logits = {right: 1.0, other: 1.0 + faults.get(row, -2.0)}
        entries.append({"row": row, "label": right, "logits": [logits[0], logits[1]]})
    (folder / "predictions.json").write_text(json.dumps({"validation": entries}))
    return folder


def student(folder, data, wrong, seed=0):
    return run(folder, data, wrong, model="/data/e1/model", attention="inhibitor", seed=seed)


def test_rows_that_most_students_lose_come_first_with_their_texts(reviews, tmp_path):  # noqa: F811
    runs = [run(tmp_path / f"teacher-{seed}", reviews, [(5, 1.0)], seed=seed) for seed in (0, 1)]
    runs.append(student(tmp_path / "s0", reviews, [(2, 1.0), (3, 9.0), (5, 1.0)]))
    runs.append(student(tmp_path / "s1", reviews, [(2, 1.0), (4, 5.0)], seed=1))
    read = read_runs(runs)
    counts, examples = disagreements(pairs(studies(read)))
    assert [row[1:7] for row in counts.rows] == [("0", "24", "21", "2", "0", "1"), ("1", "24", "21", "2", "1", "0")]
    assert [row[0] for row in examples.rows] == [ROWS[row]["sentence"] for row in (2, 3, 4)]
    names = ["negative", "positive"]
    assert [row[1:] for row in examples.rows] == [
        (names[ROWS[row]["label"]], names[1 - ROWS[row]["label"]], f"{count} of 2")
        for row, count in ((2, 2), (3, 1), (4, 1))
    ]
    page = html.unescape(write_report(runs, tmp_path / "report.html").read_text())
    assert "Where teacher and student differ" in page
    assert ROWS[2]["sentence"] in page


def test_without_its_data_rows_are_numbered(reviews, tmp_path):  # noqa: F811
    nowhere, other = tmp_path / "nowhere", tmp_path / "other"
    other.mkdir()
    for split in ("train", "validation"):
        lines = (reviews / f"{split}.jsonl").read_text().splitlines()
        (other / f"{split}.jsonl").write_text("\n".join(reversed(lines)))
    for data in (nowhere, other):
        place = tmp_path / f"runs-{data.name}"
        read = read_runs([run(place / "teacher", data), student(place / "student", data, [(2, 1.0)])])
        _, examples = disagreements(pairs(studies(read)))
        assert examples.rows[0][0] == "validation, row 3"
        assert "not where the teacher's run had them" in examples.notes[1]


def test_runs_without_predictions_or_of_other_seeds_and_rows_are_left_out(reviews, tmp_path):  # noqa: F811
    bare = samples.write(tmp_path / "bare", samples.finetune("reviews", seed=1))
    runs = [run(tmp_path / "teacher", reviews), bare]
    runs += [student(tmp_path / f"s{seed}", reviews, [(2, 1.0)], seed=seed) for seed in (1, 2)]
    read = read_runs(runs)
    assert disagreements(pairs(studies(read))) == []
    assert "Where teacher and student differ" not in write_report(runs, tmp_path / "report.html").read_text()
    other = student(tmp_path / "other", reviews, [])
    content = json.loads((other / "predictions.json").read_text())
    (other / "predictions.json").write_text(json.dumps({"validation": content["validation"][:-1]}))
    assert disagreements([Pair("reviews", "other", 0, runs[0], other)]) == []


def test_a_distillation_on_a_task_finds_its_teacher_after_a_move(tmp_path):
    students = samples.taught(tmp_path / "grid")
    teachers = [samples.write(tmp_path / f"grid/e0/rte/seed-{seed}", samples.finetune("rte")) for seed in (0, 1)]
    found = pairs(studies(read_runs(students)))
    assert [(pair.label, pair.seed, pair.teacher, pair.student) for pair in found] == [
        ("e2/rte", seed, teacher, student) for seed, teacher, student in zip((0, 1), teachers, students, strict=True)
    ]
    assert pairs(studies(read_runs(samples.taught(tmp_path / "alone")))) == []


def test_a_grid_shows_them_on_its_page(reviews, tmp_path):  # noqa: F811
    records = []
    for experiment, wrong in (("e0", []), ("e1", [(2, 1.0)]), ("e1e2", [(3, 1.0)])):
        run(tmp_path / experiment / "reviews" / "seed-0", reviews, wrong)
        records.append(record(experiment, "reviews"))
    path = write_results(records, tmp_path)[-1]
    page = html.unescape(path.read_text())
    rows = re.findall(r'<th scope="row">(E1(?:\+E2)?)</th><td>0</td><td>24</td><td>23</td><td>1</td><td>0</td>', page)
    assert rows == ["E1", "E1+E2"]
    assert all(ROWS[row]["sentence"] in page for row in (2, 3))


def test_a_distillation_on_a_task_is_compared_with_the_run_that_taught_it(tiny_bert, reviews, tmp_path):  # noqa: F811
    options: dict[str, Any] = {"task": "reviews", "data": str(reviews), "max_length": 32}
    finetune(FinetuneConfig(model=str(tiny_bert), output=tmp_path / "teacher", max_steps=3, **options))
    recipe = {
        "teacher": str(tmp_path / "teacher" / "model"),
        "output": str(tmp_path / "e2"),
        "calibration": {"sequences": 2},
        "stages": [{"kind": "task", "epochs": 1, "batch_size": 16, **options}],
        "validation_sequences": 4,
        "example": "the film is good",
    }
    metrics = distill(DistillConfig.parse(recipe))
    said = read_predictions(tmp_path / "e2", get_task("reviews"))
    assert said is not None
    assert sum(entry.right for entry in said.values()) / len(said) == pytest.approx(metrics["headline"])
    (found,) = pairs(studies(read_runs([tmp_path / "e2"])))
    assert (found.task, found.teacher, found.student) == ("reviews", tmp_path / "teacher", tmp_path / "e2")
    counts = disagreements([found])[0]
    assert counts.rows[0][2] == "24"
