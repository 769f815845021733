"""Grids of real runs of tiny models: they are done, chosen from, killed, gone on with, and fail one by one."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from inhibitor.distill.recipe import TaskStage
from inhibitor.errors import ConfigError, InhibitorError, RunError
from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.grid import Standing, reproduce
from inhibitor.reproduce.pools import Child, Ended
from inhibitor.reproduce.recipe import ReproduceConfig
from inhibitor.runs import ACCURACY, Run, write_text
from tests.test_runs import WRITTEN, at_work

E2_CAN_BE_TUNED = "held_out" in TaskStage.model_fields
TWO = [1e-3, 1e-2]


def go(values, **changes):
    return reproduce(ReproduceConfig.parse(values | changes), "grid.yaml")


def records(values):
    return {record.key: record for record in accuracy.read(Path(values["output"]) / ACCURACY)}


def test_the_whole_grid(values, forks):
    """E0, E1, E2 and E1+E2 with two seeds, each chosen from two learning rates."""
    values["finetune"] = values["finetune"] | {"learning_rates": TWO}
    if E2_CAN_BE_TUNED:
        values["e2"] = values["e2"] | {"learning_rates": TWO}
    standings: list[Standing] = []
    outcome = reproduce(ReproduceConfig.parse(values), "grid.yaml", standings.append)
    assert outcome.failures == []
    output = Path(values["output"])
    found = records(values)
    assert list(found.values()) == outcome.records
    assert set(found) == {(name, "reviews", seed) for name in ("e0", "e1", "e2", "e1e2") for seed in (0, 1)}
    for (experiment, _, seed), record in found.items():
        metrics = json.loads((output / experiment / "reviews" / f"seed-{seed}" / "metrics.json").read_text())
        assert record.score == metrics["headline"]
        assert (record.trained, record.measured) == ({"train": 48}, {"validation": 24})
        assert record.teacher_score == found["e0", "reviews", seed].score
        assert record.model == values["teacher" if experiment in ("e0", "e2") else "student"]
        if experiment in ("e2", "e1e2"):
            assert metrics["teacher"] == str(output / f"e0/reviews/seed-{seed}/model")
            assert metrics["teacher_headline"] == record.teacher_score
            assert not (output / experiment / "reviews" / f"seed-{seed}" / "stages").exists()
        tried = {path: json.loads(path.read_text()) for path in (output / "tuning" / experiment).rglob("metrics.json")}
        assert len(tried) == (2 if experiment in ("e0", "e1") or E2_CAN_BE_TUNED else 0)
        for metrics in tried.values():
            assert set(metrics["rows"]) == {"train_rest", "train_held_out"}
            assert set(metrics["scores"]) == {"train_held_out"}
        if tried:
            best = max(metrics["headline"] for metrics in tried.values())
            assert f"lr-{record.learning_rate:g}-epochs-1" in {
                path.parent.name for path, metrics in tried.items() if metrics["headline"] == best
            }
    assert found["e0", "reviews", 0].distillation_tokens == 0
    assert found["e2", "reviews", 0].distillation_tokens > 100
    assert found["e1e2", "reviews", 0].distillation_tokens is None  # this student is no run's
    runs = 8 + 4 * (2 if E2_CAN_BE_TUNED else 1)
    assert len(forks.children) == runs
    assert (standings[-1].done, standings[-1].total, standings[-1].running) == (runs, runs, ())
    assert standings[-1].best.startswith("e1e2 on reviews: ")

    before = (output / ACCURACY).read_text()
    assert go(values).records == outcome.records  # finished: read, not repeated
    assert len(forks.children) == runs
    assert (output / ACCURACY).read_text() == before
    more = go(values, seeds=[0, 1, 2], experiments=["e0"])
    assert len(more.records) == 9
    assert len(forks.children) == runs + 1


def test_the_student_is_made_first_and_its_tokens_are_counted(values, forks, text, tmp_path):
    distilling = {
        "teacher": values["teacher"],
        "output": str(tmp_path / "e1"),
        "text": {"files": [str(text)], "max_length": 16},
        "calibration": None,
        "stages": [{"kind": "full", "tokens": 256, "batch_size": 4}],
        "validation_sequences": 4,
        "example": "the film is good",
    }
    (tmp_path / "e1.yaml").write_text(json.dumps(distilling))
    del values["student"]
    values |= {"e1": str(tmp_path / "e1.yaml"), "seeds": [0], "experiments": ["e1", "e1e2"]}
    outcome = go(values)
    assert outcome.failures == []
    assert forks.children[0].folder == tmp_path / "e1"
    e0, e1, e1e2 = outcome.records
    assert (e0.distillation_tokens, e1.distillation_tokens) == (0, 256)
    assert e1e2.distillation_tokens is not None
    assert e1e2.distillation_tokens > 256
    assert e1.model == e1e2.model == str(tmp_path / "e1" / "model")
    counted = {name: accuracy.tokens(str(tmp_path / "e1/stages" / name)) for name in ("converted", "full")}
    assert counted == {"converted": 0, "full": 256}  # its states are students too


def test_choosing_never_reads_what_is_reported(values, forks, tmp_path):
    """With the evaluation split turned to garbage, choosing goes as before; only the run that counts fails."""
    values |= {"seeds": [0], "experiments": ["e0"], "finetune": values["finetune"] | {"learning_rates": TWO}}
    go(values)
    spoiled = tmp_path / "spoiled"
    shutil.copytree(values["data"], spoiled)
    (spoiled / "validation.jsonl").write_text("no JSON\n")
    outcome = go(values, data=str(spoiled), output=str(tmp_path / "other"))
    assert [failure.name for failure in outcome.failures] == ["e0/reviews/seed-0"]
    assert "validation.jsonl, line 1: expected one JSON object" in outcome.failures[0].reason
    headlines = []
    for output in (values["output"], tmp_path / "other"):
        tried = sorted((Path(output) / "tuning").rglob("metrics.json"))
        headlines.append([json.loads(path.read_text())["headline"] for path in tried])
    assert len(headlines[0]) == 2
    assert headlines[0] == headlines[1]


def test_a_failed_run_stops_no_other_and_is_told(values, forks):
    broken: list[Child] = []

    def breaks(child):
        if "e0/reviews/seed-0" in str(child.folder) and not broken:
            broken.append(child)
            return Ended(-9, "Killed by nobody in particular")
        return None

    forks.before = breaks
    outcome = go(values, experiments=["e0", "e2"])
    reasons = {failure.name: failure.reason for failure in outcome.failures}
    assert set(reasons) == {"e0/reviews/seed-0", "e2/reviews/seed-0"}
    assert reasons["e0/reviews/seed-0"].startswith("ended by signal 9; ")
    assert reasons["e0/reviews/seed-0"].endswith("seed-0.log ends\nKilled by nobody in particular")
    assert reasons["e2/reviews/seed-0"] == "not begun, for e0/reviews/seed-0 is missing."
    assert {record.key for record in outcome.records} == {(name, "reviews", 1) for name in ("e0", "e2")}
    assert go(values, experiments=["e0", "e2"]).failures == []
    assert len(records(values)) == 4


def test_a_run_of_other_values_is_not_taken_for_this_one(values, forks):
    values |= {"seeds": [0], "experiments": ["e0"]}
    go(values)
    outcome = go(values, max_length=16)
    assert len(outcome.failures) == 1
    assert "another run (max_length: 32 there, 16 here)" in outcome.failures[0].reason


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda text: text[:100], "expected a metrics.json of one JSON object"),
        (lambda text: "[]", "expected a metrics.json of one JSON object"),
        *((lambda text, key=key: text.replace(f'"{key}"', '"other"'), key) for key in ("headline", "rows", "scores")),
        (lambda text: json.dumps(json.loads(text) | {"rows": 3}), "expected headline, rows and scores"),
    ],
    ids=["cut off", "list", "no headline", "no rows", "no scores", "no mapping"],
)
def test_damaged_metrics_are_the_failure_of_their_run_alone(values, forks, damage, got):
    """Also of a run that teaches another one, which then does not begin."""

    measured = {"headline": 0.5, "rows": {"train": 4, "validation": 2}, "scores": {"validation": {"accuracy": 0.5}}}

    def trained(child):
        """What a fine-tuning leaves, at once."""
        options = [option.removeprefix("--").replace("-", "_") for option in child.arguments[1::2]]
        run = Run.start(child.folder, FinetuneConfig(**dict(zip(options, child.arguments[2::2], strict=True))))
        said = json.dumps(measured)
        write_text(run.path / "metrics.json", damage(said) if "seed-0" in str(child.folder) else said)
        return Ended(0, "")

    forks.before = trained
    values |= {"experiments": ["e0"]}
    for outcome in (go(values), go(values)):  # as it ends, and when it is found
        (failure,) = outcome.failures
        assert failure.name == "e0/reviews/seed-0"
        assert got in failure.reason
        assert {record.key for record in outcome.records} == {("e0", "reviews", 1)}


def test_a_grid_has_its_folder_for_itself(values, forks):
    """A second one would take the first one's lines out of accuracy.jsonl."""
    values |= {"seeds": [0], "experiments": ["e0"]}
    folder = Path(values["output"])
    with at_work(folder) as child, pytest.raises(RunError, match=f"held by process {child}"):
        go(values)
    assert forks.children == []
    assert (folder / "config.yaml").read_text() == WRITTEN
    with pytest.raises(RunError, match="grid: expected a new folder, or a grid's, got a run's"):
        go(values)
    (folder / "config.yaml").unlink()
    forks.before = lambda child: Ended(int((folder / "run.lock").is_file()), "")
    assert [failure.reason[:13] for failure in go(values).failures] == ["exit status 1"]
    assert not (folder / "run.lock").exists()


def test_what_was_asked_last_is_marked_as_that(values, forks):
    forks.before = lambda child: Ended(1, "")
    for seeds in ([0], [1]):
        config = ReproduceConfig.parse(values | {"seeds": seeds, "experiments": ["e0"]})
        reproduce(config, "grid.yaml")
        written = Path(values["output"]) / "config.yaml"
        assert written.read_text().startswith(
            "# As it was called last; each run's own folder says what that run was asked.\n"
        )
        assert ReproduceConfig.load(written) == config


def recipe(values):
    file = Path(values["output"]).with_suffix(".yaml")
    file.write_text(json.dumps(values))
    return str(file)


def test_a_grid_that_was_stopped_and_killed_goes_on(values, zygote, tmp_path):
    """The real command: SIGTERM while a child trains, a kill while another does, then to the end."""
    values |= {"seeds": [0], "experiments": ["e0"], "finetune": values["finetune"] | {"epochs": [100]}}
    run, log = Path(values["output"]) / "e0" / "reviews" / "seed-0", tmp_path / "said"

    def ended(number, than=-1):
        process = zygote.start("reproduce", recipe(values), log=log)
        deadline = time.monotonic() + 120
        while newest(run) <= than:
            assert not process.ended(0.02), log.read_text()
            assert time.monotonic() < deadline
        process.kill(number)
        return process.wait()

    assert ended(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in log.read_text()
    assert "the same command goes on from there" in run.with_suffix(".log").read_text()
    assert ended(signal.SIGKILL, than=newest(run)) == -signal.SIGKILL  # its child goes on alone, and is waited for
    assert zygote.start("reproduce", recipe(values), log=log).wait() == 0
    assert "results.html" in log.read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert [entry["epoch"] for entry in metrics["evaluations"]] == list(range(1, 101))
    assert len(records(values)) == 1
    assert {f"results.{suffix}" for suffix in ("json", "md", "tex", "html")} < {
        p.name for p in run.parents[2].iterdir()
    }


def newest(run):
    """The step of the newest checkpoint, or -1."""
    steps = [int(path.name.removeprefix("checkpoint-")) for path in (run / "checkpoints").glob("checkpoint-*")]
    return max(steps, default=-1)


def test_failures_end_in_status_1(values, monkeypatch, capsys, forks):
    from inhibitor.cli import main

    values |= {"seeds": [0], "experiments": ["e0"]}
    (Path(values["data"]) / "train.jsonl").write_text("no JSON\n")
    monkeypatch.setattr(sys, "argv", ["inhibitor", "reproduce", recipe(values)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "inhibitor: e0/reviews/seed-0: exit status 2" in said
    assert "train.jsonl, line 1: expected one JSON object" in said


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("teacher", "nowhere/it: expected a model folder"),
        ("student", "nowhere/it: expected a model folder"),
        ("data", "nowhere/it: expected a folder with reviews/"),
        ("e1", r"nowhere/it: expected a file that ends in"),
    ],
)
def test_what_is_missing_is_named_before_any_run(key, match, values, forks, tmp_path):
    missing = str(tmp_path / "nowhere/it")
    if key == "e1":
        asked = {"teacher": values["teacher"], "output": str(tmp_path / "e1"), "text": {"files": [missing]}}
        stages = [{"kind": "full", "tokens": 4096, "batch_size": 4}]
        (tmp_path / "e1.yaml").write_text(json.dumps(asked | {"stages": stages}))
        values |= {"student": None, "e1": str(tmp_path / "e1.yaml")}
    else:
        values[key] = missing
    with pytest.raises(InhibitorError, match=match):
        go(values)
    assert forks.children == []
    assert not Path(values["output"]).exists()


def test_ray_is_refused_where_it_is_missing(values, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"got ray\. pip install 'inhibitor-attention\[ray\]'"):
        go(values, executor="ray")
    assert not Path(values["output"]).exists()


def test_a_broken_record_is_named_before_any_run(values, forks):
    Path(values["output"]).mkdir()
    (Path(values["output"]) / ACCURACY).write_text("{}\n")
    with pytest.raises(RunError, match="line 1: expected a record"):
        go(values)
    assert forks.children == []


def test_a_grid_that_cannot_begin_shows_no_bar(values, monkeypatch, capsys):
    from inhibitor.cli import main

    Path(values["output"]).mkdir()
    (Path(values["output"]) / ACCURACY).write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["inhibitor", "reproduce", recipe(values)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().startswith("inhibitor: ")
