"""Defects that the readers could have, and a compact suite that finds each one; built as the operator's mutants are."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inhibitor.data import corpus, files, labelled
from inhibitor.data.tasks import get_task
from inhibitor.errors import DataError
from tests.mutants import mutated

LINES = "for number, line in enumerate(file, start=1):\n            tally.read"
DIGITS = "if not row.typed and value in map(str, range(len(task.labels))):\n            return int(value)"
TSV_LINES = "for number, line in enumerate(file, start=1):\n        yield"

# module, defect, text, what stands there instead
CATALOGUE = [
    (files, "NA is missing", "if not isinstance(value, str):", "if value == 'NA':"),
    (files, "an empty text is missing", "if not isinstance(value, str):", "if not value:"),
    (files, "texts lose their spaces", '.removesuffix("\\r")', '.removesuffix("\\r").strip(" ")'),
    (
        files,
        "quotes of TSV eaten",
        "number, _without_end(line).split(",
        "number, _without_end(line.replace('\"', '')).split(",
    ),
    (files, "lines of TSV from zero", TSV_LINES, TSV_LINES.replace("1", "0")),
    (files, "lines of JSON from zero", LINES, LINES.replace("1", "0")),
    (files, "lines of CSV from zero", "number = reader.line_num + 1", "number = reader.line_num"),
    (files, "any quote of CSV accepted", "fields if _CSV_RECORD.fullmatch(text) else None", "fields"),
    (files, "a quote never closed is one bad row", 'if lines[-1] == "" or ', "if "),
    (files, "ragged rows filled up", "if len(fields) != len(header):", "if len(fields) > len(header):"),
    (files, "other bytes accepted", 're.compile("[\\0\\udc80-\\udcff]")', 're.compile("[\\0]")'),
    (files, "the byte order mark kept", "utf-8-sig", "utf-8"),
    (files, "a column named twice", "elif len(set(names)) < len(names):", "elif False:"),
    (files, "bad rows not counted as read", '"read": self.read,', '"read": self.read - len(self.bad),'),
    (files, "bad rows lost", "self.bad.append(row.with_traceback(None))", "pass"),
    (files, "bad rows never stop", 'if self.on_bad_row == "stop":', 'if self.on_bad_row == "":'),
    (files, "the last value of a key wins", "if len(row) < len(pairs):", "if not row and pairs:"),
    (files, "columns of CSV typed", "typed=False", "typed=True"),
    (labelled, "digits accepted everywhere", "if not row.typed and value in map", "if value in map"),
    (labelled, "a fraction is a class", "and (task.regression or isinstance(value, int)):", ":"),
    (labelled, "label 1.0 accepted", DIGITS, "if value in ('0', '1', '1.0'):\n            return int(value[0])"),
    (labelled, "label -1 accepted", "and 0 <= value <", "and -1 <= value <"),
    (labelled, "class names ignore spaces", "if value in task.labels:", "if (value := value.strip()) in task.labels:"),
    (labelled, "the split that was read loses its bad rows", "rows, tally, path.name", "rows, Tally(), path.name"),
    (labelled, "the row before a bad one is kept twice", "            continue\n", ""),
    (corpus, "streaming stops at what the check left out", "column, Tally(on_bad_row)", "column, Tally()"),
    (corpus, "the check forgets bad rows", "return Contents(documents, tally)", "return Contents(documents, Tally())"),
]


@dataclass(frozen=True)
class Mutant:
    """The readers with one text replaced in one module, and a folder to read from."""

    labelled: ModuleType
    corpus: ModuleType
    folder: Path

    def read(self, name: str, content: str, on_bad_row: str = "stop", task: str = "sst2") -> Any:
        """The training split of a file of that name and content."""
        for path in self.folder.glob("*"):
            path.unlink()
        (self.folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        return self.labelled.load_task(get_task(task), self.folder, splits=["train"], on_bad_row=on_bad_row)

    def refuses(self, name: str, content: str, place: str, on_bad_row: str = "stop") -> None:
        with pytest.raises(DataError) as error:
            self.read(name, content, on_bad_row)
        assert place in str(error.value)


def build(folder: Path, changed: ModuleType | None = None, old: str = "", new: str = "") -> Mutant:
    def fresh(module: ModuleType) -> ModuleType:
        source = mutated(module, old, new) if module is changed else inspect.getsource(module)
        copy = ModuleType(f"mutant.{module.__name__}")
        copy.__file__ = module.__file__
        exec(compile(source, copy.__name__, "exec"), copy.__dict__)  # noqa: S102
        return copy

    readers = fresh(files)
    task, text = fresh(labelled), fresh(corpus)
    for part in (task, text):
        names = [name for name, value in vars(part).items() if value is vars(files).get(name, part)]
        vars(part).update({name: vars(readers)[name] for name in names})
    return Mutant(task, text, folder)


TEXTS = ["NA", "", " x ", '"quoted"', "null"]


def texts(mutant: Mutant) -> None:
    contents = {
        "train.tsv": "label\tsentence\n" + "".join(f"1\t{text}\n" for text in TEXTS),
        "train.csv": "\ufeffsentence,label\n" + "".join('"' + t.replace('"', '""') + '",1\n' for t in TEXTS),
        "train.jsonl": "\ufeff" + "".join(json.dumps({"sentence": text, "label": 1}) + "\n" for text in TEXTS),
    }
    for name, content in contents.items():
        assert list(mutant.read(name, content).splits["train"].rows["sentence"]) == TEXTS


def places(mutant: Mutant) -> None:
    mutant.refuses("train.tsv", "sentence\tlabel\na\t1\nb\t2\n", "train.tsv, line 3, column 'label'")
    mutant.refuses("train.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', "train.jsonl, line 2, column")
    mutant.refuses("train.csv", 'sentence,label\n"a\nb",1\n"b\n",2\n', "train.csv, line 4, column 'label'")


def faults(mutant: Mutant) -> None:
    mutant.refuses("train.csv", 'sentence,label\n5" pipe,1\n', "line 2: expected fields as in RFC 4180")
    mutant.refuses("train.csv", "label,sentence\n1,a\n1\n", "line 3: expected 2 fields")
    mutant.refuses("train.csv", "sentence,label\ncaf\udce9,1\n", "line 2, column 'sentence': expected UTF-8")
    mutant.refuses("train.csv", "label,label,sentence\n0,1,a\n", "line 1: expected a header")
    mutant.refuses("train.jsonl", '{"sentence": "a", "label": 0, "label": 1}\n', "line 1: expected one JSON object")
    mutant.refuses("train.csv", 'sentence,label\na,1\n"b,1\n', "line 3: expected quotes that are closed", "quarantine")


def labels(mutant: Mutant) -> None:
    for label in ("1.0", "-1", " positive "):
        mutant.refuses("train.csv", f"sentence,label\na,1\na,{label}\n", "line 3, column 'label'")
    for value in ("1.0", "-1", '"1"', '" positive "'):
        mutant.refuses("train.jsonl", f'{{"sentence": "a", "label": {value}}}\n', "line 1, column 'label'")
    assert list(mutant.read("train.csv", "sentence,label\na,1\na,negative\n").splits["train"].rows["label"]) == [1, 0]


def counts(mutant: Mutant) -> None:
    data = mutant.read("train.csv", "sentence,label\na,1\nb\nc,2\nd,0\n", "quarantine")
    assert data.describe()["counts"] == {"train": {"read": 4, "used": 2, "quarantined": 2}}
    assert data.splits["train"].rows.to_list() == [{"sentence": "a", "label": 1}, {"sentence": "d", "label": 0}]


def documents(mutant: Mutant) -> None:
    path = mutant.folder / "a.txt"
    path.write_bytes(b"a\n\nbad\xff\n\nb\n")
    (contents,) = mutant.corpus.check(mutant.corpus.TextConfig(files=(str(path),), on_bad_row="quarantine")).values()
    assert contents.tally.counts() == {"read": 5, "used": 4, "quarantined": 1}
    assert [row["text"] for _, row in mutant.corpus._read_part(path, 0, "text", "quarantine", False)] == ["b"]


CHECKS: list[Callable[[Mutant], None]] = [texts, places, faults, labels, counts, documents]


def killer(mutant: Mutant) -> str | None:
    """The first check that the mutant fails, by a wrong result or by an error; None if it survives."""
    for check in CHECKS:
        try:
            check(mutant)
        except (Exception, pytest.fail.Exception):
            return check.__name__
    return None


def test_the_readers_themselves_survive(tmp_path):
    mutant = build(tmp_path)
    for check in CHECKS:
        check(mutant)


@pytest.mark.parametrize(("module", "defect", "old", "new"), CATALOGUE, ids=[row[1] for row in CATALOGUE])
def test_the_defect_is_found(tmp_path, module, defect, old, new, record_property):
    found_by = killer(build(tmp_path, module, old, new))
    assert found_by is not None, f"{defect}: survives"
    record_property("found by", found_by)


def test_a_text_that_left_the_source_is_an_error(tmp_path):
    with pytest.raises(LookupError, match=r"stands 0 times in inhibitor\.data\.files"):
        build(tmp_path, files, "no such text", "")


def test_every_check_is_needed(tmp_path):
    """Each check alone finds a defect that no check before it finds."""
    assert {killer(build(tmp_path, module, old, new)) for module, _, old, new in CATALOGUE} == {
        check.__name__ for check in CHECKS
    }
