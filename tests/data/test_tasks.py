import re

import pytest

from inhibitor.data.tasks import TASKS, get_task
from inhibitor.errors import DataError


def test_tasks_are_the_nine_of_glue_imdb_and_the_shipped_reviews():
    glue = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"}
    assert set(TASKS) == glue | {"imdb", "reviews"}
    assert all(TASKS[name].configuration == name for name in glue)


def test_hyper_parameters_are_the_authors():
    epochs = {"mnli": 5, "qnli": 5, "sst2": 5, "qqp": 3, "imdb": 4}
    for task in (task for task in TASKS.values() if task.name != "reviews"):  # which is ours
        assert task.epochs == epochs.get(task.name, 10)
        assert task.learning_rate == (4e-5 if task.name == "stsb" else 2e-5)
        assert (task.max_length, task.batch_size) == ((512, 32) if task.name == "imdb" else (128, 16))


def test_headline_metrics_are_those_of_the_benchmark():
    headlines = {"cola": "matthews", "stsb": "spearman", "mrpc": "f1", "qqp": "f1"}
    assert {name: task.metrics[0] for name, task in TASKS.items()} == {
        name: headlines.get(name, "accuracy") for name in TASKS
    }


def test_a_regression_has_a_range():
    assert {task.name: task.range for task in TASKS.values() if task.regression} == {"stsb": (0, 5)}
    assert all(task.regression != bool(task.labels) for task in TASKS.values())


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(DataError, match=re.escape("Did you mean 'sst2'?")):
        get_task("sst3")


@pytest.mark.parametrize("name", ["SST-2", "sst2", "sst-2"])
def test_a_task_has_the_names_that_tables_print_too(name):
    assert get_task(name) is TASKS["sst2"]
