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
        ("[]", "dict"),
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


def test_the_headline_is_a_metric_or_the_mean_of_all() -> None:
    metrics = Finetune.model_validate(samples.finetune(score=0.9))
    assert metrics.headline_metric() == "accuracy"
    assert metrics.headline_by_epoch()[-1] == (3.0, 0.9)
    assert metrics.rows_measured() == 872
    mean = Finetune.model_validate({**samples.finetune(score=0.9), "headline": 0.905})
    assert mean.headline_metric() == "accuracy / f1"
    assert mean.headline_by_epoch()[0][1] == pytest.approx((0.876 + 0.9) / 2)
