import os
import statistics
from pathlib import Path

import pytest

from inhibitor.report import summarise
from inhibitor.report.records import read_runs
from inhibitor.report.results import recipe, results_table, retention, short, studies, task_table
from inhibitor.report.tables import number

from . import samples


def test_one_row_per_state_with_errors_scores_and_retention(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path)
    (table,) = summarise(runs)
    assert table.title == "Inhibitor attention in all-MiniLM-L6-v2"
    assert list(table.columns) == ["state", "context error", "hidden error", "MRPC", "SST-2", "retention %"]
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert list(rows) == ["teacher", "converted", "calibrated", "after layer-wise", "after full-layer"]
    assert rows["teacher"] == ["0", "0", "88.9", "90.9", "100.0"]
    assert rows["converted"][2:] == ["-", "-", "-"]
    assert rows["calibrated"][2:] == ["84.1", "86.1", number(100 * (84.1 + 86.1) / (88.9 + 90.9), 1)]
    assert rows["after full-layer"][2:] == ["87.4", "89.4", "98.3"]
    expected = statistics.fmean(samples.distill()["states"][3]["context_error"])
    assert rows["after full-layer"][0] == f"{expected:.3f}"


def test_retention_counts_only_tasks_that_both_have(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path)
    (study,) = studies(read_runs([path for path in runs if path.name != "mrpc-teacher-0"]))
    assert retention(study.students[-1], study.teacher, ["sst2", "mrpc"]) == pytest.approx(100 * 0.894 / 0.909)
    assert retention(study.students[-1], study.teacher, ["mrpc"]) is None
    assert retention(study.students[0], study.teacher, ["sst2"]) is None


def test_tasks_name_metric_and_rows_measured(tmp_path: Path) -> None:
    table = task_table(studies(read_runs(samples.experiment(tmp_path, tasks=("sst2",)))))
    assert [list(row) for row in table.rows] == [
        ["SST-2", "calibrated", "accuracy", "872", "90.9", "86.1", "94.7"],
        ["SST-2", "after full-layer", "accuracy", "872", "90.9", "89.4", "98.3"],
    ]


def test_seeds_become_mean_and_standard_deviation(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path, tasks=("sst2",), seeds=3)
    runs.append(samples.write(tmp_path / "e1-seed1", samples.distill(seed=1)))
    (table,) = summarise(runs)
    rows = {row[0]: row for row in table.rows}
    assert rows["teacher"][3] == "91.2 ± 0.3"
    means = [statistics.fmean(samples.distill(seed=seed)["states"][0]["context_error"]) for seed in (0, 1)]
    assert rows["converted"][1] == f"{statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f}"
    assert "Mean ± standard deviation of 2 to 3 runs." in table.notes


def test_says_when_more_than_the_seed_differs(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path, tasks=("sst2",), seeds=2)
    (tmp_path / "sst2-student-1" / "config.yaml").write_text("learning_rate: 1.0\nseed: 1\n", encoding="utf-8")
    notes = summarise(runs)[0].notes
    assert notes[-1] == "More than the seed differs between the runs of: SST-2, after full-layer."


def test_distillations_of_other_recipes_stay_apart(tmp_path: Path) -> None:
    runs = [samples.write(tmp_path / name / "e1", samples.distill(seed=index)) for index, name in enumerate("ab")]
    (runs[1] / "config.yaml").write_text("length_exponent: 0\nseed: 1\n", encoding="utf-8")
    first, second = studies(read_runs(runs))
    assert (first.name, second.name) == ("a/e1", "b/e1")
    assert [row[0] for row in summarise(runs)[0].rows][:2] == ["a/e1: teacher", "a/e1: converted"]
    assert recipe(first.distillations[0]) == "kind: distill"


def test_finds_the_state_from_a_relative_path_after_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    samples.write(Path("runs/e1"), samples.distill())
    for name, model in (("a", "runs/e1/stages/layerwise"), ("b", "runs/e1/model"), ("c", samples.TEACHER)):
        samples.write(Path("runs") / name, samples.finetune(model=model, attention="inhibitor"))
    os.rename(tmp_path / "work/runs", tmp_path / "runs")
    (study,) = studies(read_runs([tmp_path / "runs" / name for name in ("e1", "a", "b", "c")]))
    scored = [row.label for row in study.rows if row.finetunings]
    assert scored == ["converted", "after layer-wise", "after full-layer"]


def test_models_of_no_known_distillation_are_compared_with_the_only_softmax_model(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path, tasks=("sst2",))[1:]
    (table,) = summarise(runs)
    assert [list(row) for row in table.rows] == [
        [f"{samples.TEACHER} (softmax)", "90.9", "100.0"],
        ["e1/calibrated (inhibitor)", "86.1", "94.7"],
        ["e1 (inhibitor)", "89.4", "98.3"],
    ]
    (alone,) = summarise(runs[:1])
    assert list(alone.columns) == ["model", "SST-2"]
    both = [*runs, samples.write(tmp_path / "other", samples.finetune(model="bert-base-uncased"))]
    assert "retention %" not in summarise(both)[0].columns
    assert results_table(studies(read_runs(both))).title == "Fine-tuning results"


def test_a_model_inside_a_run_that_was_not_named_is_not_attributed(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path, tasks=("sst2",))
    other = samples.write(tmp_path / "other" / "e1", samples.distill())
    found = studies(read_runs([other, runs[3]]))
    assert [study.name for study in found] == ["e1", "fine-tuned"]


def test_short_names() -> None:
    assert short("bert-base-uncased") == "bert-base-uncased"
    assert short("/data/models/bert") == "bert"
    assert short("runs/e1/stages/full") == "e1/full"
    assert short("runs/e1/model") == "e1"
    assert short("/") == "/"
