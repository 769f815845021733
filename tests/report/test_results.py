import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.report import summarise, write_report
from inhibitor.report.records import read_runs
from inhibitor.report.results import apart, recipe, results_table, retention, short, studies, task_table
from inhibitor.report.tables import number

from . import samples


def test_one_row_per_state_with_errors_scores_and_retention(tmp_path: Path) -> None:
    runs = samples.experiment(tmp_path)
    (table,) = summarise(runs)
    assert table.title == f"Inhibitor attention in {samples.TEACHER}"
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
        ["SST-2", "calibrated", "accuracy", "872 rows of validation", "90.9", "86.1", "94.7"],
        ["SST-2", "after full-layer", "accuracy", "872 rows of validation", "90.9", "89.4", "98.3"],
    ]


def on(split: str, rows: int, **options: Any) -> dict[str, Any]:
    """A fine-tuning measured on a part of the development set, and trained on a part of train."""
    metrics = samples.finetune("qnli", **options)
    scores = {split: {"accuracy": metrics["headline"]}}
    return metrics | {"scores": scores, "rows": {"train_subset2k": 2000, split: rows}}


def test_scores_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    student: dict[str, Any] = {"model": "e1", "attention": "inhibitor", "score": 0.5}
    runs = [
        samples.write(tmp_path / "teacher", on("validation", 5463, score=0.9)),
        samples.write(tmp_path / "student", on("validation_subset300", 300, **student)),
    ]
    found = studies(read_runs(runs))
    assert retention(found[0].students[0], found[0].teacher, ["qnli"]) is None
    assert [row[-2:] for row in results_table(found).rows] == [("90.0", "100.0"), ("50.0", "-")]
    table = task_table(found)
    assert table.rows[0][1:] == ("e1 (inhibitor)", "accuracy", "300 rows of validation_subset300", "90.0", "50.0", "-")
    assert "QNLI: trained on 2,000 rows of train_subset2k." in table.notes
    assert (
        "QNLI was not measured on the same rows, and is not compared: "
        f"{samples.TEACHER} (softmax) on 5,463 rows of validation; e1 (inhibitor) on 300 rows of validation_subset300."
    ) in results_table(found).notes


def test_scores_on_other_rows_have_no_mean(tmp_path: Path) -> None:
    student: dict[str, Any] = {"model": "e1", "attention": "inhibitor"}
    runs = [
        samples.write(tmp_path / "teacher", on("validation", 5463, score=0.5)),
        samples.write(tmp_path / "a", on("validation", 5463, score=0.4, **student)),
        samples.write(tmp_path / "b", on("train_held_out", 200, score=0.9, seed=1, **student)),
    ]
    (table,) = summarise(runs)
    assert [row[1:] for row in table.rows] == [("50.0", "100.0"), ("-", "-")]
    assert any("e1 (inhibitor) on 5,463 rows of validation and 200 rows of train_held_out." in n for n in table.notes)
    assert write_report(runs, tmp_path / "report.html").is_file()


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


def test_a_distillation_on_a_task_has_its_own_scores(tmp_path: Path) -> None:
    (table,) = summarise(samples.taught(tmp_path / "grid", seeds=[0]))
    assert list(table.columns) == ["state", "context error", "hidden error", "RTE", "retention %"]
    rows = {row[0]: row[3:] for row in table.rows}
    assert rows == {
        "teacher": ("62.5", "100.0"),
        "converted": ("50.0", "80.0"),
        "calibrated": ("55.0", "88.0"),
        "after task": ("60.0", "96.0"),
    }
    assert table.title == "Inhibitor attention in e0/rte/seed-0"
    assert any("of each state as it is" in note for note in table.notes)


def test_seeds_of_a_distillation_on_a_task_become_one_study(tmp_path: Path) -> None:
    found = studies(read_runs([run for task in ("rte", "wnli") for run in samples.taught(tmp_path / "grid", task)]))
    assert [study.name for study in found] == ["e2/rte", "e2/wnli"]
    assert [study.taught_by for study in found] == ["e0/rte", "e0/wnli"]
    assert results_table(found).rows[3][3:] == ("61.0 ± 1.4", "-", "97.6")
    tasks = task_table(found)
    assert list(tasks.rows[2]) == [
        "RTE",
        "e2/rte: after task",
        "accuracy",
        "277 rows of validation",
        "62.5 ± 0.0",
        "61.0 ± 1.4",
        "97.6",
    ]
    cut = "longer than max_length, and cut: 30 of 2,490 rows of train, 4 of 277 rows of validation."
    assert tasks.notes == (f"RTE: {cut}", f"WNLI: {cut}")


def test_the_run_that_taught_a_distillation_is_its_teacher(tmp_path: Path) -> None:
    runs = samples.taught(tmp_path / "grid", seeds=[0])
    teacher = samples.write(tmp_path / "grid/e0/rte/seed-0", samples.finetune("rte", model="minilm", score=0.625))
    (study,) = studies(read_runs([*runs, teacher]))
    assert study.teacher is not None
    assert study.teacher.scores("rte") == [62.5]
    assert [folder.path for folder in study.teacher.finetunings["rte"]] == [teacher]


def test_a_folded_configuration_of_two_seeds_is_one_recipe(tmp_path: Path) -> None:
    place = "/home/user/a folder of runs that is so deep/and so wordy that its path is/written on two lines, rte/seed"
    runs = []
    for seed in (0, 1):
        config = FinetuneConfig(model="minilm", task="rte", seed=seed, output=Path(f"{place} {seed}")).to_yaml()
        assert "\n  " in config
        runs.append(samples.write(tmp_path / str(seed), samples.finetune("rte", seed=seed), config))
    first, second = read_runs(runs).finetunings
    assert recipe(first) == recipe(second)
    assert "learning_rate" in recipe(first)
    assert summarise(runs)[0].notes[-1] == "Mean ± standard deviation of 2 runs."


def test_rows_cut_and_rows_of_train_are_told(tmp_path: Path) -> None:
    cut = {"truncated": {"train": 0, "validation": 36}}
    runs = [
        samples.write(tmp_path / "a", samples.finetune(model="a") | cut | {"overlap": {"validation": 12}}),
        samples.write(tmp_path / "b", samples.finetune(model="b") | cut | {"overlap": {"validation": 0}}),
    ]
    assert task_table(studies(read_runs(runs))).notes == (
        "SST-2: longer than max_length, and cut: 36 of 872 rows of validation.",
        "SST-2, a (softmax): in train too: 12 of 872 rows of validation.",
    )


def test_names_that_would_be_one_keep_more_of_their_paths() -> None:
    assert apart(["a/x/e1/model", "b/x/e1/model", "c/e2/model"]) == {
        "a/x/e1/model": "a/x/e1",
        "b/x/e1/model": "b/x/e1",
        "c/e2/model": "e2",
    }
    assert apart(["/e1", "/e1/model", "e1"]) == {"/e1": "/e1", "/e1/model": "/e1/model", "e1": "e1"}


def test_models_and_studies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    models = [f"/data/{place}/e1/model" for place in "ab"]
    runs = [samples.write(tmp_path / model[6], samples.finetune(model=model)) for model in models]
    (study,) = studies(read_runs(runs))
    assert [row.label for row in study.rows] == ["a/e1 (softmax)", "b/e1 (softmax)"]
    places = [tmp_path / place / "same" / "e1" for place in ("x", "y", "z")]
    found = studies(
        read_runs([samples.write(path, samples.distill(layers=n, heads=1)) for n, path in enumerate(places, 2)])
    )
    assert [study.name for study in found] == ["x/same/e1", "y/same/e1", "z/same/e1"]


def test_seeds_of_two_recipes_in_one_grid_keep_their_seeds(tmp_path: Path) -> None:
    runs = samples.taught(tmp_path / "grid", seeds=[0, 1, 2, 3])
    for run in runs[2:]:
        (run / "config.yaml").write_text("epochs: 9\n", encoding="utf-8")
    assert [study.name for study in studies(read_runs(runs))] == ["e2/rte/seed-0", "e2/rte/seed-2"]


def test_short_names() -> None:
    assert short("/grid/e0/wnli/seed-0/model") == short("grid/e0/wnli/seed-0") == "e0/wnli/seed-0"
    assert short("grid/e1/wnli/seed-12/stages/full") == "e1/wnli/seed-12/full"
    assert short("/seed-0") == "seed-0"
    assert short("bert-base-uncased") == "bert-base-uncased"
    assert short("/data/models/bert") == "bert"
    assert short("runs/e1/stages/full") == "e1/full"
    assert short("runs/e1/model") == "e1"
    assert short("/") == "/"
