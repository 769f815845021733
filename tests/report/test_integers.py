from pathlib import Path

import pytest

from inhibitor.report import summarise, write_report
from inhibitor.report.integers import cost_table, parts_figure, tables, verdict, worst
from inhibitor.report.records import Quantize

from . import samples


def _metrics(**changes: object) -> Quantize:
    return Quantize.model_validate({**samples.quantize(), **changes})


def test_one_row_for_each_quantised_model(tmp_path: Path) -> None:
    small = samples.quantize("mrpc", model="runs/small/model")
    small["int8"] = {"attention": 4, "linear": "float", "embeddings": "float"}
    runs = [samples.write(tmp_path / "a", samples.quantize()), samples.write(tmp_path / "b", small)]
    (table,) = summarise(runs)
    kept = f"{100 * 0.889 / 0.894:.1f}"
    shared = ["89.4", "88.9", kept, "23.5", "62.0", "58.0"]
    assert [list(row) for row in table.rows] == [
        ["e1", "8", "SST-2", *shared],
        ["small", "4, linear float, embeddings float", "MRPC", *shared],
    ]


def test_beside_training_it_has_a_table_of_its_own(tmp_path: Path) -> None:
    runs = [samples.write(tmp_path / "int8", samples.quantize()), samples.write(tmp_path / "sst2", samples.finetune())]
    assert [table.title for table in summarise(runs)] == ["Fine-tuning results", "Models in integers"]


def test_repetitions_are_one_row_and_folded_away(tmp_path: Path) -> None:
    every = [samples.quantize(seed=seed, after=0.88 + 0.004 * seed) for seed in range(3)]
    runs = [samples.write(tmp_path / f"int8-{metrics['seed']}", metrics) for metrics in every]
    (table,) = summarise(runs)
    assert [row[4] for row in table.rows] == ["88.4 ± 0.4"]
    assert "3 runs" in table.notes[-1]
    page = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<section><h2>Quantisation") == 1
    assert page.count("<details><summary>Quantisation") == 2


def test_cost_of_every_metric_size_and_call() -> None:
    table = cost_table(_metrics())
    assert [row[0] for row in table.rows] == [
        "accuracy, validation, × 100",
        "f1, validation, × 100",
        "weights, MB",
        "1 × 128 tokens, ms",
        "8 × 128 tokens, ms",
    ]
    assert table.rows[2][1:] == ("90.9", "23.5", "25.9")
    assert table.notes[0] == "Scores on 872 rows."
    assert table.rows[1][1:] == ("90.40", "89.90", f"{100 * 0.899 / 0.904:.1f}")
    assert table.rows[3][2:] == ("18.0 (2.00)", "62.0")
    assert "2 threads of Processor <1>" in table.notes[-1]


def test_a_score_of_zero_has_no_retention() -> None:
    nothing = _metrics(headline_before=0.0, scores_before={"validation": {"accuracy": 0.0, "f1": 0.0}})
    assert [row[3] for row in cost_table(nothing).rows[:2]] == ["-", "-"]
    assert "changes the score on SST-2 (0.0 → 88.9)" in verdict(nothing)
    assert f"keeps {100 * 0.889 / 0.894:.1f} % of the score on SST-2 (89.4 → 88.9)" in verdict(_metrics())


def test_the_worst_part_is_named() -> None:
    loudest = "Alone in integers, “layer 1, linear” changes the logits most: 28.0 dB below them."
    assert worst(_metrics()) == f"{loudest} The score falls most, by 0.40 points, with “layer 1, linear”."
    parts = samples.quantize()["parts"]
    for score, said in (
        (0.8, "The score falls most, by 9.40 points, with “layer 0, attention”."),
        (parts[4]["score"], "The score falls most, by 0.40 points, with “layer 1, linear” and 1 other."),
    ):
        parts[1]["score"] = score
        assert worst(_metrics(parts=parts)) == f"{loudest} {said}"
    parts = [{**part, "score": 0.894} for part in parts]
    assert worst(_metrics(parts=parts)) == f"{loudest} No part alone lowers the score."


def test_a_bar_for_each_part() -> None:
    metrics = _metrics()
    figure = parts_figure(metrics)
    assert figure is not None
    decibels, score = figure.axes
    assert [label.get_text() for label in decibels.get_yticklabels()] == [part.part for part in metrics.parts]
    assert [bar.get_width() for bar in decibels.patches] == [part.sqnr for part in metrics.parts]  # type: ignore[attr-defined]
    changes = [bar.get_width() for bar in score.patches]  # type: ignore[attr-defined]
    assert changes == pytest.approx([-0.1 * cost for cost in range(5)])


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    bare = {**samples.quantize(), "parts": [], "clipped": [], "latency": []}
    assert len(tables(Quantize.model_validate(bare))) == 1
    folder = samples.write(tmp_path / "int8", bare)
    page = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figure>" not in page
    assert "Alone" not in page
    assert not list(folder.glob("*.png"))
