"""Malformed files of every format: each fault is named by file, line and column, or set aside, and all rows add up."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inhibitor.data import files, labelled
from inhibitor.data.corpus import TextConfig, _read, check, packed
from inhibitor.data.files import QUARANTINE, ROW_SUFFIXES, RowError, Tally, read_rows, write_quarantine
from inhibitor.data.labelled import LabelledData, load_task
from inhibitor.data.tasks import get_task
from inhibitor.errors import ConfigError, DataError
from inhibitor.evaluate.finetune import FinetuneConfig, finetune

SST2, STSB = get_task("sst2"), get_task("stsb")
TEXTS = [
    "NA",
    "null",
    "None",
    "nan",
    "",
    " x ",
    "N/A",
    '"quoted"',
    "it's",
    "naïve 😀 \u2028 line \x85",
    "\ufeff",
    "1.0",
]
NAMES = ["sentence", "label"]
CSV, TSV, JSONL = b"sentence,label\nfine,1\n", b"sentence\tlabel\nfine\t1\n", b'{"sentence": "fine", "label": 1}\n'


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A file of any kind of rows, as others write it."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([list(columns), *(row.values() for row in rows)])
    else:
        lines = ["\t".join(map(str, values)) for values in [columns, *(row.values() for row in rows)]]
        path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def load(folder: Path, on_bad_row: files.OnBadRow = "stop") -> LabelledData:
    return load_task(SST2, folder, splits=["train"], on_bad_row=on_bad_row)


def sentences(data: LabelledData) -> list[str]:
    return list(data.splits["train"].rows["sentence"])


# suffix, what stands before the bad row, the bad row, where the fault is, what the message says
FAULTS = {
    "csv: too few fields": (".csv", CSV, b"alone\n", "line 3", "expected 2 fields, as in the header, got 1"),
    "csv: too many fields": (".csv", CSV, b"a,b,1\n", "line 3", "expected 2 fields, as in the header, got 3"),
    "csv: blank line": (".csv", CSV, b"\n", "line 3", "got 0"),
    "csv: text after a quote": (".csv", CSV, b'"a"b,1\n', "line 3", "RFC 4180, got a quote or a line end out of place"),
    "csv: quote in a bare field": (".csv", CSV, b'5" pipe,1\n', "line 3", "RFC 4180"),
    "csv: space before a quote": (".csv", CSV, b' "a",1\n', "line 3", "RFC 4180"),
    "csv: bare carriage return": (".csv", CSV, b"a\rb,1\n", "line 3", "RFC 4180"),
    "csv: two carriage returns": (".csv", CSV, b"a,1\r\r\n", "line 3", "RFC 4180"),
    "csv: not UTF-8": (".csv", CSV, b"caf\xe9,1\n", "line 3, column 'sentence'", "UTF-8 text, got the byte 0xe9"),
    "csv: surrogate in UTF-8": (".csv", CSV, b"a,\xed\xa0\xbd\n", "line 3, column 'label'", "got the byte 0xed"),
    "csv: NUL": (".csv", CSV, b"a,\x001\n", "line 3, column 'label'", "got the byte 0x00"),
    "csv: no label": (".csv", CSV, b"a,\n", "line 3, column 'label'", "0 (negative), 1 (positive), got ''"),
    "csv: quoted newlines before": (".csv", CSV + b'"a\n\nb",1\n', b"c,2\n", "line 6, column 'label'", "got '2'"),
    "csv: quoted newline within": (".csv", CSV, b'"a\nb",2\n', "line 3, column 'label'", "got '2'"),
    "csv: carriage returns": (".csv", CSV.replace(b"\n", b"\r\n"), b"a\r\n", "line 3", "got 1"),
    "csv: byte order mark": (".csv", b"\xef\xbb\xbf" + CSV, b"a,b\n", "line 3, column 'label'", "got 'b'"),
    "csv: fault after a fault": (".csv", CSV + b'fine,1\nfine,"1"\n', b'"a" ,1\n', "line 5", "RFC 4180"),
    "tsv: too few fields": (".tsv", TSV, b"alone\n", "line 3", "expected 2 fields, as in the header, got 1"),
    "tsv: tab within quotes": (".tsv", TSV, b'"a\tb"\t1\n', "line 3", "got 3"),
    "tsv: blank line": (".tsv", TSV, b"\n", "line 3", "got 1"),
    "tsv: not UTF-8": (".tsv", TSV, b"caf\xe9\t1\n", "line 3, column 'sentence'", "got the byte 0xe9"),
    "tsv: NUL": (".tsv", TSV, b"a\0\t1\n", "line 3, column 'sentence'", "got the byte 0x00"),
    "tsv: quoted label": (".tsv", TSV, b'a\t"1"\n', "line 3, column 'label'", "got '\"1\"'"),
    "jsonl: no JSON": (".jsonl", JSONL, b"a,1\n", "line 2", "expected one JSON object"),
    "jsonl: cut off": (".jsonl", JSONL, b'{"a": \n', "line 2", "got Expecting value at character 7. Correct"),
    "jsonl: blank line": (".jsonl", JSONL, b"\n", "line 2", "expected one JSON object, got a blank line"),
    "jsonl: no column": (".jsonl", JSONL, b"{}\n", "line 2, column 'sentence'", "a column 'sentence', got none"),
    "jsonl: not UTF-8": (".jsonl", JSONL, b'{"sentence": "caf\xe9"}\n', "line 2, byte 18", "got the byte 0xe9"),
    "jsonl: key twice": (".jsonl", JSONL, b'{"label": 1, "label": 0}\n', "line 2", "names a key twice"),
    "jsonl: no text": (".jsonl", JSONL, b'{"label": 1}\n', "line 2, column 'sentence'", "only label"),
    "jsonl: label as text": (
        ".jsonl",
        JSONL,
        b'{"sentence": "a", "label": "1"}\n',
        "line 2, column 'label'",
        "got '1'",
    ),
    "jsonl: deep list": (
        ".jsonl",
        JSONL,
        b'{"sentence": "a", "label": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        "line 2, column 'label'",
        "got list",
    ),
}


@pytest.mark.parametrize(("suffix", "before", "bad", "place", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_row_is_named_or_set_aside(tmp_path, capsys, suffix, before, bad, place, message):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(before + bad + before.splitlines(keepends=True)[1 if suffix != ".jsonl" else 0])
    with pytest.raises(DataError) as stopped:
        load(tmp_path)
    assert str(stopped.value).startswith(f"{path}, {place}: expected ")
    assert message in str(stopped.value)

    data = load(tmp_path, "quarantine")
    counts = data.describe()["counts"]["train"]
    assert counts["quarantined"] == 1
    assert counts["read"] == counts["used"] + 1 == len(sentences(data)) + 1
    assert sentences(data)[-1] == sentences(data)[0] == "fine"

    write_quarantine(tmp_path, [split.tally for split in data.splits.values()])
    (line,) = (tmp_path / QUARANTINE).read_bytes().splitlines()
    record = json.loads(line)
    assert (record["file"], record["line"]) == (str(path), int(place.split(",")[0].removeprefix("line ")))
    assert (record["reason"], bool(record["column"])) == (str(stopped.value), "column" in place)
    shown = bad.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "backslashreplace")
    assert record["content"] == shown[:1000]
    said = f"inhibitor: 1 of {counts['read']} rows are left out; {tmp_path / QUARANTINE} says why.\n"
    assert capsys.readouterr().err == said


def test_bad_rows_of_parquet_are_set_aside(tmp_path):
    write(tmp_path / "train.parquet", {"sentence": ["fine", None, "a\0", "dull"], "label": [1, 0, 0, -1]})
    data = load(tmp_path, "quarantine")
    assert sentences(data) == ["fine"]
    assert data.describe()["counts"] == {"train": {"read": 4, "used": 1, "quarantined": 3}}
    records = [bad.record for bad in data.splits["train"].tally.bad]
    assert [(record["row"], record["column"]) for record in records] == [(2, "sentence"), (3, "sentence"), (4, "label")]
    assert records[2]["content"] == "{'sentence': 'dull', 'label': -1}"


def test_bad_rows_of_the_hub_are_set_aside(monkeypatch):
    rows = datasets.Dataset.from_dict({"sentence": ["fine", None, "dull"], "label": [1, 0, 0], "idx": [0, 1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(RowError, match=r"nyu-mll/glue, split 'train', row 2, column 'sentence'"):
        load_task(SST2, splits=["train"])
    data = load_task(SST2, splits=["train"], on_bad_row="quarantine")
    assert data.describe() == {
        "rows": {"train": 2},
        "counts": {"train": {"read": 3, "used": 2, "quarantined": 1}},
        "files": {},
    }


# what ends the reading in either mode
ENDS = {
    "empty": (".csv", b"", "line 1: expected a header that names every column once, got none"),
    "only a header": (".csv", b"sentence,label\n", "expected at least one row"),
    "blank header": (".tsv", b"\nfine\t1\n", "line 1.*a header.*got none"),
    "column without a name": (".csv", b"sentence,label,\nfine,1,2\n", "line 1.*no name for column 3"),
    "column named twice": (".tsv", b"label\tsentence\tlabel\n1\tfine\t1\n", "line 1.*'label' twice"),
    "header not UTF-8": (
        ".csv",
        b"sentence,label,caf\xe9\nfine,1,2\n",
        "line 1: expected UTF-8 text, got the byte 0xe9. Convert",
    ),
    "UTF-16": (".csv", CSV.decode().encode("utf-16"), "line 1: expected UTF-8 text, got the byte 0xff. Convert"),
    "header with a bad quote": (".csv", b'"sentence"s,label\nfine,1\n', "line 1.*a quote"),
    "no such column": (".csv", b"text,label\nfine,1\n", "line 2, column 'sentence'.*only text, label"),
    "every row bad": (".jsonl", b'{"sentence": "fine"}\n\n', "line 1, column 'label'"),
    "quote never closed": (".csv", CSV + b'"a,1\nb,1\n', "line 3: expected quotes that are closed"),
    "not parquet": (".parquet", b"text", "a whole parquet file"),
}


@pytest.mark.parametrize("on_bad_row", ["stop", "quarantine"])
@pytest.mark.parametrize(("suffix", "content", "message"), ENDS.values(), ids=ENDS)
def test_what_leaves_no_row_to_read_stops(tmp_path, suffix, content, message, on_bad_row):
    (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"train\{suffix}.*{message}"):
        load(tmp_path, on_bad_row)


def test_after_a_misplaced_quote_reading_goes_on_at_the_next_line(tmp_path):
    (tmp_path / "train.csv").write_bytes(CSV + b'"a "great"\nfilm",1\n"a\nb"c,1\nlast,1\n')
    split = load(tmp_path, "quarantine").splits["train"]
    assert [bad.record["line"] for bad in split.tally.bad] == [3, 4, 5]
    assert list(split.rows["sentence"]) == ["fine", "last"]
    assert split.tally.read == 5


def test_a_field_beyond_the_bound_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_FIELD", 1000)
    (tmp_path / "train.csv").write_bytes(CSV + b'"' + b"a\n" * 501 + b'",1\n')
    with pytest.raises(DataError, match=r"line 3: expected quotes that are closed, around at most 1000 characters"):
        load(tmp_path, "quarantine")


@pytest.mark.parametrize("suffix", ROW_SUFFIXES)
def test_texts_come_back_bit_for_bit(tmp_path, suffix):
    path = write(tmp_path / f"train{suffix}", {"sentence": TEXTS, "label": [0] * len(TEXTS)})
    assert sentences(load(tmp_path)) == TEXTS
    assert list(_read(path, "sentence", Tally())) == [text for text in TEXTS if text.strip()]


@pytest.mark.parametrize("suffix", ROW_SUFFIXES)
def test_a_megabyte_is_a_text(tmp_path, suffix):
    text = 'a "long" text, ' * 70_000
    write(tmp_path / f"train{suffix}", {"sentence": [text], "label": [0]})
    assert sentences(load(tmp_path)) == [text]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b'sentence,label\r\nfine,1\r\n"two\r\nlines, ""quoted""",0\r\nlast,1'),
        (".tsv", b'sentence\tlabel\r\nfine\t1\r\n"two\t0\r\nlast\t1'),
        (".jsonl", b'{"sentence": "fine", "label": 1}\r\n{"sentence": "last", "label": 1}'),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_marks_of_windows(tmp_path, suffix, content, mark):
    (tmp_path / f"train{suffix}").write_bytes(mark + content)
    middle = {".csv": ['two\r\nlines, "quoted"'], ".tsv": ['"two'], ".jsonl": []}[suffix]
    assert sentences(load(tmp_path)) == ["fine", *middle, "last"]


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
no_tabs = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 4), st.sampled_from([".csv", ".tsv"]))
def test_any_table_comes_back(tmp_path_factory, data, width, suffix):
    text = any_text if suffix == ".csv" else no_tabs
    table = data.draw(st.lists(st.lists(text, min_size=width, max_size=width), max_size=5))
    columns = {f"column {i}": [row[i] for row in table] for i in range(width)}
    path = write(tmp_path_factory.getbasetemp() / f"table{suffix}", columns)
    tally = Tally()
    assert [list(row.values.values()) for row in read_rows(path, list(columns), tally)] == table
    assert tally.read == len(table)


PIECES = [
    b'"',
    b'""',
    b",",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"a",
    b"1",
    b"{",
    b"}",
    b'"a":',
    b"[]",
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_of_any_file_all_rows_are_used_or_set_aside(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    tally, used = Tally("quarantine"), 0
    try:
        for row in read_rows(path, [], tally):
            used += 1
            assert row.number >= tally.read
    except RowError:
        raise
    except DataError:  # of the header, or of a quote that is never closed
        return
    assert tally.counts() == {"read": used + len(tally.bad), "used": used, "quarantined": len(tally.bad)}
    if tally.bad:
        with pytest.raises(RowError):
            list(read_rows(path, [], Tally()))


@pytest.mark.parametrize("suffix", ROW_SUFFIXES)
def test_class_names_are_labels(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", {"sentence": ["a", "b"], "label": ["positive", "negative"]})
    assert list(load(tmp_path).splits["train"].rows["label"]) == [1, 0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    "label", ["", " 1", "1 ", "1.0", "+1", "-1", "-0", "01", "1_0", "２", "2", "1e0", "Positive", "NA"]
)
def test_digits_of_a_class_are_exact(tmp_path, suffix, label):
    write(tmp_path / f"train{suffix}", {"sentence": ["a", "b"], "label": ["1", label]})
    with pytest.raises(RowError, match=rf"train\{suffix}, line 3, column 'label': expected 0 .negative., 1 .positive"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_numbers_of_a_regression_are_plain_decimals(tmp_path, suffix):
    good = {"3": 3.0, "0": 0.0, "5.0": 5.0, "3.750": 3.75}
    bad = ["", " 3", "3 ", "+3", "3.", ".5", "3,5", "3e0", "nan", "inf", "0x3", "٣", "3_0", "-0.5", "5.001", "-1", "17"]
    labels = [*good, *bad]
    texts = ["a"] * len(labels)
    write(tmp_path / f"train{suffix}", {"sentence1": texts, "sentence2": texts, "label": labels})
    split = load_task(STSB, tmp_path, splits=["train"], on_bad_row="quarantine").splits["train"]
    assert list(split.rows["label"]) == list(good.values())
    assert [bad.got.strip("'").removesuffix(".0") for bad in split.tally.bad] == bad
    assert split.tally.counts() == {"read": len(labels), "used": 4, "quarantined": len(bad)}
    assert all("expected a number from 0 to 5" in str(bad) for bad in split.tally.bad)


def test_the_record_of_a_bad_row_is_short_and_safe_to_print(tmp_path):
    (tmp_path / "train.csv").write_bytes(CSV + "\x1b[31m\u202e\udcff".encode("utf-8", "surrogateescape") * 300 + b"\n")
    data = load(tmp_path, "quarantine")
    write_quarantine(tmp_path, [split.tally for split in data.splits.values()])
    line = (tmp_path / QUARANTINE).read_text()
    assert line.isascii()
    assert line.removesuffix("\n").isprintable()
    content = json.loads(line)["content"]
    assert content.startswith("\x1b[31m\u202e\\xff")
    assert len(content) == 1000


def test_no_bad_row_no_quarantine(tmp_path, capsys):
    write_quarantine(tmp_path, [Tally("quarantine", read=3)])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_ten_thousand_bad_rows_hold_no_other_row_alive(tmp_path):
    (tmp_path / "train.tsv").write_bytes(TSV + b"bad\n" * 10_000)
    tally = load(tmp_path, "quarantine").splits["train"].tally
    assert len(tally.bad) == 10_000
    assert all(bad.__traceback__ is None and bad.__context__ is None for bad in tally.bad)


def corpus(folder: Path) -> dict[str, bytes]:
    """Three documents in a file of each format, with bad rows between them."""
    (folder / "parquet").mkdir()
    write(folder / "parquet" / "a.parquet", {"text": ["a", None, "b", " ", "c"]})
    return {
        "a.csv": b'text\r\n"a"\r\n"a"a\r\nb\r\n ""\r\nc\r\n',
        "a.tsv": b"title\ttext\n1\ta\n2\n3\tb\n4\tc\xff\n5\tc\n",
        "a.jsonl": b'{"text": "a"}\n{}\n{"text": "b"}\n{"text": ""}\n\n{"text": "c"}\n',
        "a.txt": b"a\nbad\xff\n\nb\n\n\0\n\nc\n",
        "a.parquet": (folder / "parquet" / "a.parquet").read_bytes(),
    }


COUNTS = {"a.csv": (5, 2), "a.tsv": (5, 2), "a.jsonl": (6, 2), "a.txt": (8, 2), "a.parquet": (5, 1)}


@pytest.mark.parametrize("name", COUNTS)
def test_a_corpus_leaves_bad_rows_out_and_counts_them(tmp_path, tiny_bert, name):
    path = tmp_path / name
    path.write_bytes(corpus(tmp_path)[name])
    config = TextConfig(files=(str(path),), max_length=8, shuffle_buffer=1, on_bad_row="quarantine")
    with pytest.raises(RowError, match=r"a\.\w+, (line|row) \d"):
        check(config.model_copy(update={"on_bad_row": "stop"}))
    contents = check(config)[path]
    read, quarantined = COUNTS[name]
    assert contents.documents == 3
    assert contents.tally.counts() == {"read": read, "used": read - quarantined, "quarantined": quarantined}
    assert list(_read(path, "text", Tally("quarantine"))) == ["a", "b", "c"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    block = next(iter(packed(config, tokenizer, 0)))["input_ids"]
    assert set(tokenizer.decode(block, skip_special_tokens=True).split()) == {"b", "c"}  # "a" is held out


def test_a_corpus_of_bad_rows_stops(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"body\nx\ny\n")
    config = TextConfig(files=(str(tmp_path / "a.csv"),), on_bad_row="quarantine")
    with pytest.raises(DataError, match=r"a\.csv, line 2, column 'text'.*only body"):
        check(config)


def test_a_run_lists_what_it_left_out(tmp_path, tiny_bert, capsys):
    data = tmp_path / "sst2"
    data.mkdir()
    (data / "train.csv").write_bytes(CSV + b"dull,0\nugly,2\n" * 4)
    (data / "validation.tsv").write_bytes(TSV + b"dull\n")
    config = FinetuneConfig(
        model=str(tiny_bert), task="sst2", data=tmp_path, output=tmp_path / "run", max_steps=1, max_length=16
    )
    with pytest.raises(RowError, match=r"train\.csv, line 4, column 'label'"):
        finetune(config)
    assert not config.output.exists()

    metrics = finetune(config.model_copy(update={"on_bad_row": "quarantine"}))
    assert metrics["rows"] == {"train": 5, "validation": 1}
    assert metrics["counts"] == {
        "train": {"read": 9, "used": 5, "quarantined": 4},
        "validation": {"read": 2, "used": 1, "quarantined": 1},
    }
    records = [json.loads(line) for line in (config.output / QUARANTINE).read_text().splitlines()]
    assert [record["line"] for record in records] == [4, 6, 8, 10, 3]
    assert "5 of 11 rows are left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="on_bad_row"):
        FinetuneConfig.parse({**config.model_dump(), "on_bad_row": "skip"})


def test_two_formats_of_one_split_are_refused(tmp_path):
    for suffix in (".csv", ".tsv"):
        write(tmp_path / f"train{suffix}", {"sentence": ["a"], "label": ["1"]})
    with pytest.raises(
        DataError, match=r"one file, train\.parquet \(or \.jsonl, \.csv, \.tsv\), got train\.csv, train"
    ):
        load(tmp_path)
    assert labelled._candidates(tmp_path, "validation") == []


def test_a_part_may_be_a_table(tmp_path):
    write(tmp_path / "train_first.tsv", {"sentence": ["a"], "label": ["1"]})
    assert load(tmp_path).splits["train"].name == "train_first"
