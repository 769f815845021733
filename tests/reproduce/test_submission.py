"""Files for GLUE's server: its names, its labels, the order of the rows; and secret labels nowhere else."""

import json

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import TASKS, get_task
from inhibitor.errors import DataError
from inhibitor.reproduce import submission
from inhibitor.reproduce.published import GLUE
from inhibitor.reproduce.submission import FILES, write_submission


def write(folder, task, split, labels=(-1, -1, -1)):
    folder.mkdir(exist_ok=True)
    rows = [{**dict.fromkeys(task.texts, f"film {i}"), "label": label} for i, label in enumerate(labels)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def classifier(tiny_bert, task, folder):
    head = {"num_labels": 1} if task.regression else {"id2label": dict(enumerate(task.labels))}
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, ignore_mismatched_sizes=True, **head).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return str(folder)


EXPECTED = {  # of logits that make the classes 0, 1, 1; of a regression −0.25, 2.5 and 9
    "cola": {"CoLA.tsv": ["0", "1", "1"]},
    "mnli": {name: ["entailment", "neutral", "neutral"] for name in ("MNLI-m.tsv", "MNLI-mm.tsv")},
    "mrpc": {"MRPC.tsv": ["0", "1", "1"]},
    "qnli": {"QNLI.tsv": ["entailment", "not_entailment", "not_entailment"]},
    "qqp": {"QQP.tsv": ["0", "1", "1"]},
    "rte": {"RTE.tsv": ["entailment", "not_entailment", "not_entailment"]},
    "sst2": {"SST-2.tsv": ["0", "1", "1"]},
    "stsb": {"STS-B.tsv": ["0.000", "2.500", "5.000"]},
    "wnli": {"WNLI.tsv": ["0", "1", "1"]},
}


@pytest.mark.parametrize("name", GLUE)
def test_files_are_as_the_server_takes_them(tiny_bert, tmp_path, monkeypatch, name):
    task = get_task(name)
    logits = np.array([[-0.25], [2.5], [9.0]]) if task.regression else np.eye(len(task.labels))[[0, 1, 1]]
    monkeypatch.setattr(submission, "predict", lambda model, tokenizer, rows: logits[: len(rows)])
    for split in FILES[name]:
        write(tmp_path / name, task, split, (-1.0,) * 3 if task.regression else (-1,) * 3)
    model = classifier(tiny_bert, task, tmp_path / "model")
    written = write_submission(model, name, tmp_path, tmp_path / "out", 32)
    assert {path.name: path.read_text() for path in written} == {
        file: "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))
        for file, values in EXPECTED[name].items()
    }


def test_every_glue_task_has_its_files():
    assert set(FILES) == set(GLUE)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", ["rte", "stsb"])
def test_secret_labels_are_taken_of_the_test_split_only(tmp_path, name, split):
    task = TASKS[name]
    write(tmp_path / name, task, "test")
    assert list(load_task(task, tmp_path, splits=("test",)).splits["test"].rows["label"]) == [-1, -1, -1]
    write(tmp_path / name, task, split)
    with pytest.raises(DataError, match=r"line 1, column 'label'.*got -1"):
        load_task(task, tmp_path, splits=(split,))


@pytest.mark.parametrize("label", ["-2", "-1.0", '"-1"', "true"])
def test_other_labels_stay_refused(tmp_path, label):
    (tmp_path / "test.jsonl").write_text(f'{{"sentence": "a", "label": {label}}}\n')
    with pytest.raises(DataError, match="line 1, column 'label'"):
        load_task(TASKS["sst2"], tmp_path, splits=("test",))


@pytest.mark.parametrize(("name", "labels"), [("sst2", ["-1"]), ("stsb", ["-1", "-1.0"])])
def test_tsv_may_have_them_too(tmp_path, name, labels):
    columns = [*TASKS[name].texts, "label"]
    lines = [columns, *(["a"] * (len(columns) - 1) + [label] for label in labels)]
    (tmp_path / "test.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    found = load_task(TASKS[name], tmp_path, splits=("test",)).splits["test"].rows["label"]
    assert list(found) == [-1] * len(labels)


def test_the_test_split_of_imdb_is_no_secret(tmp_path):
    write(tmp_path / "imdb", TASKS["imdb"], "test")
    with pytest.raises(DataError, match="got -1"):
        load_task(TASKS["imdb"], tmp_path, splits=("test",))


def test_a_split_that_is_missing_is_named(tiny_bert, tmp_path):
    model = classifier(tiny_bert, TASKS["rte"], tmp_path / "model")
    with pytest.raises(DataError, match=r"test\.parquet"):
        write_submission(model, "rte", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
