import json
import re
import socket
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from inhibitor.data.corpus import TextConfig, _read, check, packed
from inhibitor.data.files import Tally
from inhibitor.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def corpus(tmp_path):
    """120 documents of two words in a parquet file, 30 in a jsonl file and 15 in a txt file, told apart by a letter."""
    pq.write_table(pa.table({"text": [f"p {i}" for i in range(120)], "title": ["x"] * 120}), tmp_path / "p.parquet")
    (tmp_path / "j.jsonl").write_text("".join(json.dumps({"text": f"j {i}"}) + "\n" for i in range(30)))
    (tmp_path / "t.txt").write_text("\n\n".join(f"t\n{i}" for i in range(15)) + "\n")
    return tmp_path


def configure(folder: Path, **options: Any) -> TextConfig:
    return TextConfig(**{"files": (f"{folder}/*",), "max_length": 16, "shuffle_buffer": 8, **options})


def rows(config: TextConfig, tokenizer: Any, seed: int, count: int) -> list[dict[str, Any]]:
    return list(islice(packed(config, tokenizer, seed), count))


def test_documents_of_every_kind_are_counted(corpus):
    documents = {path.name: contents.documents for path, contents in check(configure(corpus)).items()}
    assert documents == {"j.jsonl": 30, "p.parquet": 120, "t.txt": 15}


def test_blocks_are_full_and_framed(corpus, tokenizer):
    for row in rows(configure(corpus), tokenizer, 0, 50):
        ids = row["input_ids"]
        assert len(ids) == len(row["attention_mask"]) == 16
        assert set(row["attention_mask"]) == {1}
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.cls_token_id not in ids[1:]


def test_blocks_of_several_lengths_take_turns(corpus, tokenizer):
    config = configure(corpus, max_length=32, min_length=8)
    found = list(islice(packed(config, tokenizer, 0, run=3), 27))
    turns = [row["length"] for row in found]
    assert turns == [length for length in turns[::3] for _ in range(3)]
    assert turns[:9] == [32] * 3 + [16] * 3 + [8] * 3
    assert set(turns[9:18]) == {32, 16, 8}
    for row in found:
        ids, length = row["input_ids"], row["length"]
        assert len(ids) == sum(row["attention_mask"]) == 32
        assert [i for i, token in enumerate(ids) if token == tokenizer.cls_token_id] == list(range(0, 32, length))
        assert all(ids[end] == tokenizer.sep_token_id for end in range(length - 1, 32, length))
    assert found == list(islice(packed(config, tokenizer, 0, run=3), 27))


def test_little_text_has_blocks_of_every_length_too(tmp_path, tokenizer):
    (tmp_path / "few.txt").write_text("\n\n".join(["good film"] * 30))
    config = configure(tmp_path, max_length=32, min_length=16)
    assert {row["length"] for row in rows(config, tokenizer, 0, 80)} == {32, 16}


@pytest.mark.parametrize(
    ("longest", "shortest", "lengths"),
    [
        (128, None, (128,)),
        (128, 128, (128,)),
        (128, 9, (128, 64, 32, 16)),
        (40, 8, (40, 20, 10)),
        (100, 8, (100, 50, 25)),
    ],
)
def test_lengths_are_whole_halves(longest, shortest, lengths):
    assert TextConfig(files=("a.txt",), max_length=longest, min_length=shortest).lengths == lengths


def test_a_shortest_block_longer_than_the_longest_is_refused():
    with pytest.raises(ConfigError, match=r"text.min_length: expected at most max_length, 16, got 32"):
        TextConfig.parse({"files": ["a.txt"], "max_length": 16, "min_length": 32})


def documents(corpus: Path, tokenizer: Any, count: int, **options: Any) -> list[str]:
    """The documents of the stream's first 200 blocks, without their spaces."""
    blocks = islice(packed(configure(corpus), tokenizer, 0, **options), 200)
    tokens = [token for row in blocks for token in tokenizer.convert_ids_to_tokens(row["input_ids"][1:-1])]
    return "".join(token.removeprefix("##") for token in tokens).split("[SEP]")[:count]


def test_each_epoch_holds_each_document_once_in_another_order(corpus, tokenizer):
    everything = {f"{kind}{i}" for kind, count in (("p", 120), ("j", 30), ("t", 15)) for i in range(count)}
    held_out = {"j0", "p34", "p98"}  # every 64th, file after file
    found = documents(corpus, tokenizer, 324)
    first, second = found[:162], found[162:]
    assert sorted(first) == sorted(second) == sorted(everything - held_out)
    assert first != second
    assert set(documents(corpus, tokenizer, 400, held_out=True)) == held_out


def test_many_small_files_are_parted_as_a_large_one_is(tmp_path, tokenizer):
    for number in range(100, 230):
        (tmp_path / f"{number}.txt").write_text(f"f {number}\n")
    found = documents(tmp_path, tokenizer, 127)
    assert set(documents(tmp_path, tokenizer, 9, held_out=True)) == {"f100", "f164", "f228"}
    assert set(found) == {f"f{number}" for number in range(100, 230)} - {"f100", "f164", "f228"}


def test_too_few_documents_to_hold_any_out_are_named(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("good film\n")
    with pytest.raises(DataError, match="documents to train on and others to measure on"):
        rows(configure(tmp_path), tokenizer, 0, 1)


def test_files_are_mixed_in_proportion(corpus, tokenizer):
    text = "".join(tokenizer.decode(row["input_ids"]) for row in rows(configure(corpus), tokenizer, 0, 20))
    half = text[: len(text) // 2]
    for letter, documents in (("p", 120), ("j", 30), ("t", 15)):
        assert half.count(letter) == pytest.approx(text.count(letter) / 2, rel=0.5), letter
        assert text.count(letter) == pytest.approx(documents / 165 * sum(map(text.count, "pjt")), rel=0.5), letter


def test_the_order_is_the_seeds_and_can_be_gone_on_from(corpus, tokenizer):
    config = configure(corpus)
    first = rows(config, tokenizer, 1, 40)
    assert rows(config, tokenizer, 1, 40) == first
    assert rows(config, tokenizer, 2, 40) != first
    assert list(islice(packed(config, tokenizer, 1).skip(25), 15)) == first[25:]


def test_a_small_text_is_repeated_for_ever(tmp_path, tokenizer):
    (tmp_path / "few.txt").write_text("bad\n\ngood film\n")
    (row,) = rows(configure(tmp_path), tokenizer, 0, 5)[4:]
    assert tokenizer.decode(row["input_ids"][1:7]).startswith(
        ("good film [SEP] good", "film [SEP] good film", "[SEP] good film")
    )


def test_paragraphs_join_their_lines(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf\r\n\r\nOne line\r\n  and its end.\r\n \r\n\r\nAnother.\r\n")
    assert list(_read(tmp_path / "book.txt", "text", Tally())) == ["One line and its end.", "Another."]


def test_a_text_without_blank_lines_does_not_fill_the_memory(tmp_path):
    (tmp_path / "lines.txt").write_text("a line of text\n" * 20_000)
    assert [contents.documents for contents in check(configure(tmp_path)).values()] == [5]


def test_blank_documents_are_left_out(tmp_path):
    pq.write_table(pa.table({"text": ["", "  \n", "NA"]}), tmp_path / "a.parquet")
    assert [contents.documents for contents in check(configure(tmp_path)).values()] == [1]


FAULTS = {
    "nothing there": ("*.txt", None, r"files: .*\*\.txt: expected a file.*no such file"),
    "unknown kind": (
        "a.docx",
        b"text",
        r"a\.docx: expected a file that ends in \.txt, \.jsonl, \.parquet, \.csv, \.tsv",
    ),
    "not UTF-8": ("a.txt", b"fine\ncaf\xe9\n", r"a\.txt, line 2, byte 4: expected UTF-8 text, got the byte 0xe9"),
    "UTF-16": ("a.txt", "fine".encode("utf-16-le"), r"a\.txt, line 1, byte 2.*0x00"),
    "only blank": ("a.txt", b"\n \n", "only blank text"),
    "no such column": ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1, column 'text'.*only body.*Say which column"),
    "missing text": ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"a\.jsonl, line 2.*expected text, got nothing"),
    "number for text": ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, line 2.*expected text, got int"),
    "not JSON": ("a.jsonl", b'{"text": "x"}\ntext\n', r"a\.jsonl, line 2: expected one JSON object"),
    "not parquet": ("a.parquet", b"text", r"a\.parquet: expected a whole parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_before_work(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = TextConfig(files=(str(tmp_path / name),))
    with pytest.raises(DataError, match=message):
        check(config)


def test_text_that_fills_no_block_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("bad\n\nfilm\n")
    with pytest.raises(DataError, match="expected 1000 documents that fill a block of 5000 tokens, got 2000 tokens"):
        rows(configure(tmp_path, max_length=5000), tokenizer, 0, 1)


@pytest.mark.parametrize("source", [{}, {"files": ["a.txt"], "dataset": "wikitext"}])
def test_exactly_one_source(source):
    with pytest.raises(ConfigError, match="either files or a dataset"):
        TextConfig.parse(source)


def test_hub_datasets_are_streamed(monkeypatch, tokenizer):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict(
            {"body": [f"good film {i}" for i in range(99)], "id": range(99)}
        ).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TextConfig(dataset="a/b", dataset_config="en", column="body", max_length=16)
    assert len(rows(config, tokenizer, 0, 3)) == 3
    assert asked == [(("a/b", "en"), {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match=re.escape("with the column 'text'")):
        packed(config.model_copy(update={"column": "text"}), tokenizer, 0)


def test_local_files_need_no_network_and_leave_no_trace(corpus, tokenizer, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a local file needs no network"))
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows(configure(corpus), tokenizer, 0, 5)
    assert list(cache.iterdir()) == []


def test_real_text_mixes_two_sources(shared_data, tokenizer):
    config = TextConfig(files=(f"{shared_data}/wikipedia/train.parquet", f"{shared_data}/imdb/unsupervised.parquet"))
    assert [contents.documents for contents in check(config).values()] == [27_397, 50_000]
    assert all(len(row["input_ids"]) == 128 for row in rows(config, tokenizer, 0, 3))
