"""A published student: it loads wherever a model does, and its card says what its run measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.errors import RunError
from inhibitor.evaluate.finetune import FinetuneConfig, finetune
from inhibitor.models.difference import DIFFERENCE
from inhibitor.publish import publish
from inhibitor.reproduce import accuracy
from tests.cli.conftest import cli  # noqa: F401 - a fixture
from tests.distill.conftest import reviews, teacher, text  # noqa: F401 - fixtures
from tests.reproduce.conftest import record


@pytest.fixture(scope="module")
def run(teacher, text, tmp_path_factory):  # noqa: F811
    """A finished distillation of eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "e1"
    recipe = {
        "teacher": str(teacher),
        "output": str(folder),
        "text": {"files": [str(text)], "max_length": 16},
        "calibration": {"sequences": 2, "lengths": [8]},
        "stages": [
            {"kind": "joint", "tokens": 256, "batch_size": 4, "learning_rate": 2e-3},
            {"kind": "full", "tokens": 256, "batch_size": 4},
        ],
        "validation_sequences": 4,
        "example": "the film is good",
        "seed": 5,
    }
    distill(DistillConfig.parse(recipe))
    return folder


def scores(run, teacher, path, **values):  # noqa: F811
    lines = [
        record("e0", score=0.5, model=str(teacher)),
        record("e1", score=0.45, **{"model": str(run / "model"), **values}),
        record("e1", "rte", score=0.99, model="somewhere/else/model"),
    ]
    accuracy.write(path, lines)
    return path


def test_a_published_student_is_the_runs_and_can_be_fine_tuned(run, teacher, reviews, tmp_path):  # noqa: F811
    done = publish(run, tmp_path / "models" / "tiny")
    assert {path.name for path in tmp_path.joinpath("models").iterdir()} == {"tiny"}
    found, ours = (AutoModel.from_pretrained(folder) for folder in (done.folder, run / "model"))
    moved = [tensor - ours.state_dict()[name] for name, tensor in found.state_dict().items()]
    assert 0 < sum(part.square().sum() for part in moved).sqrt() < 1e-3
    assert 0 < done.rounding < 1e-5
    assert done.size == sum(path.stat().st_size for path in done.folder.iterdir())
    kept = {name for name in found.state_dict() if name.startswith(("embeddings", "pooler"))}  # none was trained
    assert set(done.equal) == kept
    metrics = finetune(
        FinetuneConfig(model=str(done.folder), task="reviews", data=reviews, output=tmp_path / "ft", max_steps=2)
    )
    assert metrics["attention"] == "inhibitor"


def test_into_the_working_folder_with_a_word_on_the_teachers(run, teacher, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert publish(run, Path()).folder == tmp_path
    assert f"only where its teacher lies in {teacher}" in capsys.readouterr().err


def test_rounding_is_measured_on_what_was_written(run, tmp_path, monkeypatch):
    before = publish(run, tmp_path / "one").rounding
    from inhibitor import publish as module

    write = module.write_difference

    def spoiled(student, teacher, folder):  # noqa: F811
        with torch.no_grad():
            student.encoder.layer[0].attention.self.value.bias.add_(1.0)
        equal = write(student, teacher, folder)
        with torch.no_grad():
            student.encoder.layer[0].attention.self.value.bias.sub_(1.0)
        return equal

    monkeypatch.setattr(module, "write_difference", spoiled)
    assert publish(run, tmp_path / "two").rounding > 1000 * before


def test_the_card_says_what_the_run_and_the_grid_measured(run, teacher, tmp_path):  # noqa: F811
    done = publish(run, tmp_path / "tiny", scores(run, teacher, tmp_path / "accuracy.jsonl"))
    card, metrics = (done.folder / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"on {sum(stage['tokens'] for stage in metrics['stages']):,} tokens of text" in card
    assert "| joint | 1 × context\\_mse | 256 | 0.002 | 4 |" in card
    last = metrics["states"][-1]["hidden_error"]
    assert f"| after full-layer |{_numbers(card, 'after full-layer')}" in card
    assert float(_numbers(card, "after full-layer").split("|")[-2]) == pytest.approx(sum(last) / len(last), rel=5e-3)
    assert "seed 5" in card
    assert f"relative squared error of {done.rounding:.1e}" in card
    retention = re.search(r"\| E1 \| ([\d.]+) \|", card[card.index("Retention") :])
    assert retention is not None
    assert float(retention[1]) == 90.0
    assert "99.0" not in card  # another student's
    assert str(tmp_path) not in card.replace(str(teacher), "")


def _numbers(card, label):
    return next(line for line in card.splitlines() if line.startswith(f"| {label} |")).removeprefix(f"| {label} |")


def test_python_in_the_card_runs(run, tmp_path, monkeypatch):
    done = publish(run, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    program = re.findall(r"```py\n(.*?)```", (done.folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(program[0], "card", "exec"), names)  # noqa: S102 - ours
    assert type(names["model"]).__name__ == "InhibitorBertForSequenceClassification"


def test_what_cannot_be_published_is_named_and_leaves_nothing(run, teacher, reviews, tmp_path):  # noqa: F811
    place = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    finetune(
        FinetuneConfig(model=str(run / "model"), task="reviews", data=reviews, output=tmp_path / "ft", max_steps=1)
    )
    other = scores(run, teacher, tmp_path / "accuracy.jsonl", model="runs/e9/model")
    for arguments, message in (
        ((tmp_path, place), "finished run"),
        ((run, tmp_path / "full"), "new or empty folder, got one in use"),
        ((tmp_path / "ft", place), "got a fine-tuning"),
        ((run, place, other), "expected scores of .*, got those of runs/e9/model"),
    ):
        with pytest.raises(RunError, match=f"(?s){message}"):
            publish(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "ft", "accuracy.jsonl"}


def test_an_error_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch):
    from inhibitor import publish as module

    monkeypatch.setattr(module, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        publish(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_verb_says_what_it_wrote(cli, run, tmp_path):  # noqa: F811
    status, out, _ = cli("publish", run, "--output", tmp_path / "tiny")
    assert status == 0
    assert re.search(r"tiny: 0\.\d MB; rounding changes the last hidden states by \d\.\de-\d", out)
    assert "Left to the teacher: embeddings.word_embeddings.weight, " in out
    assert (tmp_path / "tiny" / DIFFERENCE).is_file()
    status, _, err = cli("publish", run, "--output", tmp_path / "tiny")
    assert (status, "new or empty folder" in err) == (2, True)
