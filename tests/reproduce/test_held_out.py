"""Rows held out from train: the same ones always, copies together, and nothing else read."""

import json

import pytest

from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import get_task
from inhibitor.errors import ConfigError, DataError
from inhibitor.evaluate.finetune import FinetuneConfig, finetune

SST2 = get_task("sst2")


def write(folder, sentences, name="train"):
    folder.mkdir(exist_ok=True)
    rows = [{"sentence": sentence, "label": number % 2} for number, sentence in enumerate(sentences)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parts(folder, share=0.25, **options):
    data = load_task(SST2, folder, held_out=share, **options)
    rest, held = data.splits.values()
    return data, list(rest.rows["sentence"]), list(held.rows["sentence"])


def test_train_is_parted_and_named(tmp_path):
    sentences = [f"film {number}" for number in range(400)]
    data, rest, held = parts(write(tmp_path, sentences))  # there is no validation split
    assert sorted(rest + held) == sorted(sentences)
    assert 0.2 < len(held) / len(sentences) < 0.3
    described = data.describe()
    assert described["rows"] == {"train_rest": len(rest), "train_held_out": len(held)}
    assert described["counts"]["train_held_out"] == {"read": len(held), "used": len(held), "quarantined": 0}
    assert described["files"]["train_held_out"]["file"] == "train.jsonl"
    assert list(data.splits) == ["train", "held_out"]
    assert data.overlap() == {"train_held_out": 0}


def test_the_text_decides(tmp_path):
    sentences = [f"film {number}" for number in range(100)]
    held = set(parts(write(tmp_path / "a", sentences))[2])
    copied = parts(write(tmp_path / "b", [*reversed(sentences), "another", *sentences]))
    assert set(copied[2]) - {"another"} == held  # in another order, among other rows
    assert not set(copied[1]) & set(copied[2])  # copies stay together
    assert held < set(parts(tmp_path / "a", 0.5)[2])


def test_a_part_of_train_keeps_its_name_and_bad_rows_are_counted_once(tmp_path):
    write(tmp_path, [f"film {number}" for number in range(40)], "train_subset")
    with (tmp_path / "train_subset.jsonl").open("a") as file:
        file.write("no row\n")
    data, rest, held = parts(tmp_path, on_bad_row="quarantine")
    assert data.describe()["counts"] == {
        "train_subset_rest": {"read": len(rest) + 1, "used": len(rest), "quarantined": 1},
        "train_subset_held_out": {"read": len(held), "used": len(held), "quarantined": 0},
    }


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_nothing_held_out_or_left_is_refused(tmp_path, share):
    with pytest.raises(DataError, match=r"sst2, split 'train': expected rows enough to hold out .* got 2 rows"):
        parts(write(tmp_path, ["a", "b"]), share)


def test_finetune_scores_the_held_out_rows_alone(tiny_bert, tmp_path):
    write(tmp_path, [f"good film {number}" for number in range(40)])
    options = {"task": "sst2", "data": tmp_path, "output": tmp_path / "run", "epochs": 1, "max_length": 32}
    metrics = finetune(FinetuneConfig(model=str(tiny_bert), held_out=0.25, **options))
    _, rest, held = parts(tmp_path)
    assert metrics["rows"] == {"train_rest": len(rest), "train_held_out": len(held)}
    assert list(metrics["scores"]) == ["train_held_out"]
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [len(rows) for rows in predictions.values()] == [len(held)]
    with pytest.raises(ConfigError, match="held_out"):
        FinetuneConfig.parse({"model": "minilm", "held_out": 1, **options})
