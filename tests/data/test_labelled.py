import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import TASKS, get_task
from inhibitor.errors import DataError

SST2, STSB, MNLI = get_task("sst2"), get_task("stsb"), get_task("mnli")
GOOD = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("folder", ["sst2", "glue/sst2", ""])
@pytest.mark.parametrize("name", ["{}.parquet", "{}-00000-of-00001.parquet", "{}.jsonl"])
def test_layouts_of_the_hub_are_found(tmp_path, folder, name):
    for split in SST2.splits:
        path = tmp_path / folder / name.format(split)
        if path.suffix == ".jsonl":
            write_jsonl(path, GOOD)
        else:
            write_parquet(path, {"idx": [0, 1], "label": [1, 0], "sentence": ["good", "bad"]})
    data = load_task(SST2, tmp_path)
    train = data.splits["train"]
    assert (train.name, train.file) == ("train", path.name.replace("validation", "train"))
    assert train.sha256 == hashlib.sha256((path.parent / train.file).read_bytes()).hexdigest()
    assert train.rows.column_names == ["sentence", "label"]
    assert train.rows.to_list() == GOOD
    assert train.rows.features["label"].names == ["negative", "positive"]
    assert data.describe()["rows"] == {"train": 2, "validation": 2}
    assert data.overlap() == {"validation": 2}


@pytest.mark.parametrize("place", ["plain_text", "imdb/plain_text"])
def test_a_configurations_folder_is_found_as_the_hub_has_it(tmp_path, place):
    columns = {"text": ["good", "bad"], "label": [1, 0]}
    for split in ("train", "test"):
        write_parquet(tmp_path / place / f"{split}-00000-of-00001.parquet", columns)
    assert load_task(get_task("imdb"), tmp_path).describe()["rows"] == {"train": 2, "test": 2}
    whole = tmp_path / place / "test-00000-of-00001.parquet"
    whole.rename(whole.with_name("test-00000-of-00002.parquet"))
    with pytest.raises(DataError, match=r"got test-00000-of-00002\.parquet\. Join them into one"):
        load_task(get_task("imdb"), tmp_path)


def test_a_part_is_named_as_what_it_is(tmp_path):
    write_jsonl(tmp_path / "train_subset2k.jsonl", GOOD)
    write_jsonl(tmp_path / "validation.jsonl", GOOD[:1])
    data = load_task(SST2, tmp_path)
    assert data.describe()["rows"] == {"train_subset2k": 2, "validation": 1}
    write_jsonl(tmp_path / "train.jsonl", GOOD[:1])  # the whole split goes before its parts
    assert load_task(SST2, tmp_path).splits["train"].name == "train"


def test_texts_that_look_missing_stay_texts(tmp_path):
    texts = ["NA", "null", "None", "nan", "", " ", "naïve 😀 \u2028 line"]
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": text, "label": 0} for text in texts])
    write_parquet(tmp_path / "validation.parquet", {"sentence": texts, "label": [1] * len(texts)})
    data = load_task(SST2, tmp_path)
    assert [list(split.rows["sentence"]) for split in data.splits.values()] == [texts, texts]


JSONL_FAULTS = {
    "label above the classes": ('{"sentence": "a", "label": 2}', "line 2, column 'label'.*0 .negative., 1 .positive."),
    "label of the hub's test split": ('{"sentence": "a", "label": -1}', "line 2, column 'label'.*got -1"),
    "label as text": ('{"sentence": "a", "label": "1"}', "line 2.*got '1'"),
    "label with spaces": ('{"sentence": "a", "label": " positive "}', "line 2.*got ' positive '"),
    "label as fraction": ('{"sentence": "a", "label": 1.0}', "line 2.*got 1.0"),
    "label as list": ('{"sentence": "a", "label": [1]}', "line 2.*got list"),
    "label as boolean": ('{"sentence": "a", "label": true}', "line 2.*got True"),
    "label missing": ('{"sentence": "a", "label": null}', "line 2.*got nothing"),
    "no label": ('{"sentence": "a"}', "line 2, column 'label'.*only sentence"),
    "no text": ('{"label": 1}', "line 2, column 'sentence'.*only label"),
    "missing text": ('{"sentence": null, "label": 1}', "line 2, column 'sentence'.*expected text, got nothing"),
    "text of another type": ('{"sentence": 3, "label": 1}', "line 2.*got int"),
    "NUL": ('{"sentence": "a\\u0000", "label": 1}', "line 2.*got a NUL"),
    "half a surrogate pair": ('{"sentence": "\\ud83d", "label": 1}', "line 2.*surrogate"),
    "key twice": ('{"sentence": "a", "label": 1, "label": 0}', "line 2.*twice"),
    "trailing comma": ('{"sentence": "a", "label": 1,}', "line 2.*one JSON object"),
    "cut off": ('{"sentence": "a", "la', "line 2.*one JSON object"),
    "list": ('["a", 1]', "line 2.*got list"),
    "blank line": ("", "line 2.*one JSON object"),
    "deep nesting": ("[" * 100_000, "line 2.*one JSON object"),
    "not UTF-8": (b'{"sentence": "caf\xe9", "label": 1}', "line 2, byte 18.*UTF-8.*0xe9"),
}


@pytest.mark.parametrize(("line", "message"), JSONL_FAULTS.values(), ids=JSONL_FAULTS)
def test_faulty_lines_are_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "train.jsonl").write_bytes(json.dumps(GOOD[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="train.jsonl.*" + message):
        load_task(SST2, tmp_path, splits=["train"])


PARQUET_FAULTS = {
    "missing text": ({"sentence": ["a", None], "label": [0, 1]}, "row 2, column 'sentence'.*got nothing"),
    "bytes": ({"sentence": [b"a"], "label": [0]}, "row 1, column 'sentence'.*got bytes"),
    "no label": ({"sentence": ["a"]}, "row 1, column 'label'.*only sentence"),
    "other columns": ({"text": ["a"], "y": [0]}, "row 1, column 'sentence'.*got only text, y"),
    "label of the hub's test split": ({"sentence": ["a", "b"], "label": [0, -1]}, "row 2, column 'label'.*got -1"),
    "missing label": ({"sentence": ["a"], "label": pa.array([None], pa.int64())}, "row 1.*got nothing"),
    "no rows": ({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "an empty split"),
}


@pytest.mark.parametrize(("columns", "message"), PARQUET_FAULTS.values(), ids=PARQUET_FAULTS)
def test_faulty_parquet_rows_are_named(tmp_path, columns, message):
    write_parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(DataError, match="train.parquet.*" + message):
        load_task(SST2, tmp_path, splits=["train"])


def test_a_parquet_column_named_twice_is_refused(tmp_path):
    table = pa.table([["a"], ["b"], [1]], names=["sentence", "sentence", "label"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: expected columns of different names, got 'sentence' twice"):
        load_task(SST2, tmp_path, splits=["train"])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[:4] + b"\xff" * 60 + b[64:], lambda _: b"", lambda _: b"x"]
)
def test_damaged_parquet_is_named(tmp_path, damage):
    path = tmp_path / "train.parquet"
    write_parquet(path, {"sentence": ["good film"] * 50, "label": [1] * 50})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train\.parquet"):
        load_task(SST2, tmp_path, splits=["train"])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 1e39, 10**400, -1, -0.01, 17, True, "3.5", None])
def test_regression_label_must_be_in_range(tmp_path, score):
    write_jsonl(tmp_path / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": score}])
    with pytest.raises(DataError, match="line 1, column 'label': expected a number from 0 to 5"):
        load_task(STSB, tmp_path, splits=["train"])


def test_regression_labels_may_be_whole_numbers(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": score} for score in (3, 3.5)])
    assert list(load_task(STSB, tmp_path, splits=["train"]).splits["train"].rows["label"]) == [3.0, 3.5]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD[0]).encode())
    assert load_task(SST2, tmp_path, splits=["train"]).splits["train"].rows.to_list() == GOOD[:1]


def test_absent_data_is_named(tmp_path):
    with pytest.raises(DataError, match="got no folder"):
        load_task(SST2, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"sst2/, glue/sst2/.*got none of them"):
        load_task(SST2, tmp_path)
    write_jsonl(tmp_path / "sst2" / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"split 'validation': expected one file.*got none"):
        load_task(SST2, tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    write_jsonl(tmp_path / "train_a.jsonl", GOOD)
    write_jsonl(tmp_path / "train_b.jsonl", GOOD)
    with pytest.raises(DataError, match=r"got train_a\.jsonl, train_b\.jsonl"):
        load_task(SST2, tmp_path, splits=["train"])


def test_the_folder_of_another_task_is_refused(tmp_path):
    write_jsonl(tmp_path / "rte" / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 0}])
    with pytest.raises(DataError, match="got none of them"):
        load_task(get_task("mrpc"), tmp_path / "rte", splits=["train"])


def test_encode_counts_what_it_cuts_and_keeps_the_order(tmp_path, tiny_bert):
    rows = [{"premise": "a good film", "hypothesis": "bad " * n, "label": n % 3} for n in (1, 40, 5)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = load_task(MNLI, tmp_path, splits=["train"])
    splits, truncated = encode(data, AutoTokenizer.from_pretrained(tiny_bert), 16)
    encoded = splits["train"]
    assert truncated == {"train": 1}
    assert list(encoded["length"]) == [len(ids) for ids in encoded["input_ids"]] == [7, 16, 11]
    assert list(encoded["labels"]) == [1, 1, 2]
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "length"}


def test_shipped_reviews_are_balanced_and_need_no_folder():
    data = load_task(get_task("reviews"))
    for split in data.splits.values():
        labels = list(split.rows["label"])
        assert labels.count(0) == labels.count(1) > 50
    assert data.overlap() == {"validation": 0}


def test_hub_out_of_reach_is_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no way out")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"nyu-mll/glue.*no way out.*name a folder"):
        load_task(SST2)


def test_real_data_load_as_what_they_are(shared_data, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a local file needs no network"))
    rows = {}
    for task in TASKS.values():
        if task.name not in ("qqp", "reviews", "imdb", "sst2"):
            rows[task.name] = load_task(task, shared_data).describe()["rows"]
    assert rows == {
        "cola": {"train": 8551, "validation": 1043},
        "mnli": {
            "train_subset13k": 12796,
            "validation_matched": 9815,
            "validation_mismatched_subset1k_tokenised": 1000,
        },
        "mrpc": {"train": 3668, "validation": 408},
        "qnli": {"train_subset2k": 2000, "validation": 5463},
        "rte": {"train": 2490, "validation": 277},
        "stsb": {"train": 5749, "validation": 1500},
        "wnli": {"train": 635, "validation": 71},
    }
