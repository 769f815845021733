"""A grid of tiny models, records that nobody measured, and children that start at once."""

from concurrent.futures import Future

import pytest

from inhibitor.reproduce import grid
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.pools import Child, Ended
from inhibitor.reproduce.published import OFFICIAL_ROWS
from tests.distill.conftest import reviews, teacher, text  # noqa: F401 - fixtures
from tests.faults.zygote import Zygote


def record(experiment="e0", task="cola", seed=0, score=0.5, **values):
    rows = OFFICIAL_ROWS.get(task, {"train": 48, "validation": 24})
    defaults = {
        "model": "minilm" if experiment in ("e0", "e2") else "runs/e1/model",
        "trained": {name: count for name, count in rows.items() if name == "train"},
        "measured": {name: count for name, count in rows.items() if name != "train"},
        "metric": "accuracy",
        "scores": {"validation": {"accuracy": score}},
        "learning_rate": 2e-5,
        "epochs": 3,
        "distillation_tokens": 0 if experiment == "e0" else 1000,
        "recipe": "grid.yaml",
        "commit": "abc",
    }
    return Record(**{"experiment": experiment, "task": task, "seed": seed, "score": score, **defaults, **values})


class Forks:
    """A pool of one child at a time, each a fork of a process that has imported everything.

    ``before`` may look at a child before it starts, and answer for it.
    """

    capacity, threads = 1, 1

    def __init__(self, zygote, before=lambda child: None):
        self.zygote, self.before, self.children = zygote, before, []

    def submit(self, child: Child) -> "Future[Ended]":
        future: Future[Ended] = Future()
        self.children.append(child)
        ended = self.before(child)
        if ended is None:
            status = self.zygote.start(*child.arguments, log=child.log).wait()
            ended = Ended(status, child.log.read_text()[-2000:])
        future.set_result(ended)
        return future

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def zygote():
    process = Zygote()
    yield process
    process.close()
    process.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def forks(zygote, monkeypatch):
    """The pool of every grid in the test."""
    pool = Forks(zygote)
    monkeypatch.setattr(grid, "open_pool", lambda executor, processes: pool)
    return pool


@pytest.fixture(scope="session")
def student(teacher, tmp_path_factory):  # noqa: F811
    """The tiny teacher, converted."""
    from transformers import AutoModel, AutoTokenizer

    from inhibitor import InhibitorConfig, convert

    folder = tmp_path_factory.mktemp("student")
    model = AutoModel.from_pretrained(teacher)
    convert(model, InhibitorConfig(delta=0.0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


@pytest.fixture
def values(teacher, student, reviews, tmp_path):  # noqa: F811
    """A grid on reviews: one epoch of six steps, nothing to choose."""
    shared = {"batch_size": 8, "epochs": [1], "learning_rates": [1e-3]}
    return {
        "teacher": str(teacher),
        "student": str(student),
        "data": str(reviews),
        "output": str(tmp_path / "grid"),
        "tasks": ["reviews"],
        "seeds": [0, 1],
        "held_out": 0.25,
        "max_length": 32,
        "finetune": shared,
        "e2": shared,
        "inhibitor": {"delta": 0.0},
        "calibration": {"sequences": 2},
    }
