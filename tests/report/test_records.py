import json
from pathlib import Path

import pytest

from inhibitor.errors import RunError
from inhibitor.report.records import Finetune, read_runs

from . import samples


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "Expecting"),
        ("\xff", "Expecting value"),
        ("[]", "list"),
        ('{"kind": "benchmark"}', "'distill'"),
        ('{"kind": "finetune"}', "task: Field required"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_names_the_folder_that_holds_no_run(tmp_path: Path, text: str, fault: str) -> None:
    folder = samples.write(tmp_path / "run", samples.finetune())
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=fault) as caught:
        read_runs([folder])
    assert caught.value.subject == str(folder)


def test_names_the_folder_that_is_unfinished_or_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finished") as caught:
        read_runs([tmp_path / "nowhere"])
    assert caught.value.subject == str(tmp_path / "nowhere")
    with pytest.raises(RunError, match="at least one"):
        read_runs([])


def test_refuses_matrices_and_layers_that_do_not_fit(tmp_path: Path) -> None:
    crooked = samples.distill()
    crooked["attention"]["softmax"][3].pop()
    uneven = samples.distill()
    uneven["states"][1]["context_error"].pop()
    lacking = samples.traced()
    lacking["stages"][0]["history"][0]["traces"]["gamma"] *= 2
    ragged, late = samples.traced(), samples.traced()
    unlike = samples.quantize()
    del unlike["scores_before"]["validation"]["f1"]
    ragged["states"][0]["heads"]["keys"][2].pop()
    late["states"][-1]["positions"]["first"].pop()
    for name, metrics, fault in (
        ("ragged", ragged, "keys has not the same number of heads in every layer"),
        ("late", late, "context_error has not one value for each of 6 intervals"),
        ("crooked", crooked, "softmax is not 20 x 20"),
        ("uneven", uneven, "context_error"),
        ("unlike", unlike, "scores_before has not the splits and metrics of scores"),
        ("lacking", lacking, "gamma has not one value for each of 1 layers"),
    ):
        with pytest.raises(RunError, match=fault):
            read_runs([samples.write(tmp_path / name, metrics)])


def test_a_folder_named_twice_counts_once(tmp_path: Path) -> None:
    folder = samples.write(tmp_path / "run", samples.finetune())
    runs = read_runs([folder, tmp_path / "run" / ".." / "run"])
    assert len(runs.finetunings) == 1
    assert runs.finetunings[0].config == "kind: finetune\nseed: 0\n"
    assert json.loads(runs.finetunings[0].versions)["torch"] == "2.10.0"


def test_the_headline_is_the_first_metric_on_the_first_split() -> None:
    scores = [
        {"validation_matched": {"accuracy": score, "f1": 0.1}, "validation_mismatched": {"accuracy": 0.84}}
        for score in (0.7, 0.8)
    ]
    changes = {
        "scores": scores[-1],
        "evaluations": [{"epoch": epoch, "scores": each} for epoch, each in enumerate(scores, 1)],
        "rows": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    }
    metrics = Finetune.model_validate({**samples.finetune("mnli"), **changes})
    assert (metrics.metric, metrics.headline, metrics.measured) == ("accuracy", 0.8, ("validation_matched", 9815))
    assert metrics.headline_by_epoch() == [(1, 0.7), (2, 0.8)]


@pytest.mark.parametrize("scores", [{}, {"validation": {}}])
def test_refuses_a_run_without_a_score(tmp_path: Path, scores: dict[str, dict[str, float]]) -> None:
    with pytest.raises(RunError, match="at least 1 item"):
        read_runs([samples.write(tmp_path / "run", {**samples.finetune(), "scores": scores})])
