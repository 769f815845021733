"""Strict readers of local files: each row with its place, bad ones refused or set aside, and all of them counted."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from inhibitor.errors import DataError, notice
from inhibitor.runs import write_text

ROW_SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv")
QUARANTINE = "quarantine.jsonl"
LONGEST_FIELD = 1 << 24  # characters of a CSV field; what is longer is a quote that nobody closed
SHOWN = 1000  # characters of a bad row that the quarantine keeps
MISPLACED = "a quote or a line end out of place"

OnBadRow: TypeAlias = Literal["stop", "quarantine"]

_NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, or a byte that surrogateescape could not decode
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_CSV_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^",\r\n]*+)'
_CSV_RECORD = re.compile(rf"{_CSV_FIELD}(?:,{_CSV_FIELD})*+\r?\n?")


@dataclass(frozen=True)
class Row:
    """One row, and where it stands.

    Args:
        source: The file, or the dataset on the hub.
        number: Its number from 1; in a text file, that of the line on which it begins.
        values: By column.
        text: The row as it stands in a text file.
        typed: Whether values have types of their own; in CSV and TSV all are texts.
        columns: Those of the whole file, where ``values`` has but some.
    """

    source: str
    number: int
    values: Mapping[str, Any]
    text: str | None = None
    typed: bool = True
    columns: Sequence[str] = ()

    @property
    def unit(self) -> str:
        """What ``number`` counts."""
        return "row" if self.text is None else "line"

    def value(self, column: str, remedy: str) -> Any:
        """The value of a column; raises ``RowError`` where there is no such column."""
        if column not in self.values:
            there = ", ".join(self.columns or self.values)
            got = f"only {there}" if there else "none"
            raise RowError(self, column, expected=f"a column {column!r}", got=got, remedy=remedy)
        return self.values[column]


class RowError(DataError):
    """A row that cannot be used, in a file whose other rows can.

    Args:
        row: The row.
        place: The column at fault, or the byte.
        expected: As for every error, like the next two.
        got: What came instead.
        remedy: What to do about it.
    """

    def __init__(
        self,
        row: Row,
        place: str | int | None = None,
        *,
        expected: str,
        got: str,
        remedy: str = "Correct or remove that row.",
    ) -> None:
        column = place if isinstance(place, str) else None
        where = f", column {place!r}" if column is not None else f", byte {place}" if place else ""
        super().__init__(f"{row.source}, {row.unit} {row.number}{where}", expected=expected, got=got, remedy=remedy)
        content = repr(dict(row.values)) if row.text is None else _without_end(row.text)
        shown = content[:SHOWN].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")[:SHOWN]
        self.record = {
            "file": row.source,
            row.unit: row.number,
            "column": column,
            "reason": str(self),
            "content": shown,
        }


@dataclass
class Tally:
    """The rows of one file, counted while they are read.

    Args:
        on_bad_row: Whether a bad row stops the reading or is set aside.
        read: Rows met; in a ``.txt`` file, lines.
        bad: Those set aside.
    """

    on_bad_row: OnBadRow = "stop"
    read: int = 0
    bad: list[RowError] = field(default_factory=list)

    def refuse(self, row: RowError) -> None:
        """Stop at a bad row, or set it aside."""
        if self.on_bad_row == "stop":
            raise row
        self.bad.append(row.with_traceback(None))  # which would keep the file's other rows alive

    def counts(self) -> dict[str, int]:
        """Rows ``read``, ``used`` and ``quarantined``; the first is the sum of the others."""
        return {"read": self.read, "used": self.read - len(self.bad), "quarantined": len(self.bad)}


def read_lines(path: Path, tally: Tally) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 file, without its end, with its number from 1; a byte order mark is dropped.

    Raises:
        RowError: A byte that is not UTF-8, or a NUL, by line and byte; unless such lines are set aside.
    """
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            tally.read += 1
            fault = _NOT_TEXT.search(line)
            if fault is None:
                yield number, _without_end(line)
                continue
            byte = len(line[: fault.start()].encode()) + 1
            tally.refuse(RowError(Row(str(path), number, {}, line), byte, **_not_utf8(fault)))


def read_rows(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    """Yield each row of a ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv`` file.

    CSV is read as RFC 4180 has it, in fields of at most ``LONGEST_FIELD`` characters, and where a quote is out of
    place and set aside, from the next line on. TSV is read as GLUE ships it: without quoting. Both begin with a header,
    and no text in them stands for a missing value.

    Args:
        path: The file; its suffix says what it holds.
        columns: The columns that are wanted. Others may come too, and a missing one is the caller's to find.
        tally: Counts the rows, and decides about bad ones.

    Raises:
        RowError: A row that cannot be read; unless such rows are set aside.
        DataError: A fault that leaves no other row to read: a damaged parquet file, a header that does not name
            every column once, a quote that is not closed.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, columns, tally)
    return _read_jsonl(path, tally) if path.suffix == ".jsonl" else _read_table(path, tally)


def check_text(row: Row, column: str, remedy: str) -> str:
    """Return a row's text if a tokenizer can read it, the empty text included.

    Args:
        row: The row.
        column: The column that should hold the text.
        remedy: What to do where there is no such column.

    Raises:
        RowError: It is missing, not text, or holds a NUL or half of a surrogate pair.
    """
    value = row.value(column, remedy)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
    elif "\0" in value:
        got = "a NUL character"
    elif _HALF_PAIR.search(value):
        got = "half of a surrogate pair"
    else:
        return value
    raise RowError(row, column, expected="text", got=got)


def write_quarantine(folder: Path, tallies: Iterable[Tally]) -> None:
    """Write the rows that were set aside to ``quarantine.jsonl``, each with its reason, and say so on stderr.

    Args:
        folder: Where to write it; nothing is written where no row was set aside.
        tallies: Of all files.
    """
    tallies = list(tallies)
    lines = [json.dumps(bad.record) + "\n" for tally in tallies for bad in tally.bad]
    if lines:
        write_text(folder / QUARANTINE, "".join(lines))
        read = sum(tally.read for tally in tallies)
        notice(f"{len(lines)} of {read} rows are left out; {folder / QUARANTINE} says why.")


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _not_utf8(fault: re.Match[str]) -> dict[str, str]:
    return {
        "expected": "UTF-8 text",
        "got": f"the byte 0x{ord(fault[0]) & 0xFF:02x}",
        "remedy": "Convert the file to UTF-8, for example with iconv.",
    }


def _read_parquet(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    with _damage_named(str(path)):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=1000, columns=list(columns))
    if len(set(names)) < len(names):
        raise DataError(
            str(path),
            expected="columns of different names",
            got=f"{_repeated(names)!r} twice",
            remedy="Rename one of them.",
        )
    while True:
        with _damage_named(f"{path}, after row {tally.read}"):
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        for values in rows:
            tally.read += 1
            yield Row(str(path), tally.read, values, columns=names)


def _repeated(names: Sequence[str]) -> str:
    """The first name that stands there twice."""
    return next(name for name in names if names.count(name) > 1)


@contextmanager
def _damage_named(subject: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(
            subject, expected="a whole parquet file", got=got, remedy="Write or fetch the file again."
        ) from error


def _read_jsonl(path: Path, tally: Tally) -> Iterator[Row]:
    for number, line in read_lines(path, tally):
        try:
            values = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            got = f"{error.msg} at character {error.pos + 1}" if line.strip() else "a blank line"
        except (ValueError, RecursionError) as error:
            got = str(error)[:200]
        else:
            if isinstance(values, dict):
                yield Row(str(path), number, values, line)
                continue
            got = type(values).__name__
        row = Row(str(path), number, {}, line)
        tally.refuse(RowError(row, expected="one JSON object", got=got, remedy="Correct that line."))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object that names a key twice")
    return row


def _read_table(path: Path, tally: Tally) -> Iterator[Row]:
    with _open(path) as file:
        records = _csv_records(path, file) if path.suffix == ".csv" else _tsv_records(file)
        header = _header(path, next(records, (1, [], "")))
        for number, fields, text in records:
            tally.read += 1
            row = Row(str(path), number, dict(zip(header, fields or (), strict=False)), text, typed=False)
            fault = _fault(row, header, fields)
            if fault is None:
                yield row
            else:
                tally.refuse(fault)


def _fault(row: Row, header: list[str], fields: list[str] | None) -> RowError | None:
    if fields is None:
        return RowError(row, expected="fields as in RFC 4180", got=MISPLACED)
    if len(fields) != len(header):
        return RowError(row, expected=f"{len(header)} fields, as in the header", got=str(len(fields)))
    for column, value in row.values.items():
        fault = _NOT_TEXT.search(value)
        if fault is not None:
            return RowError(row, column, **_not_utf8(fault))
    return None


def _header(path: Path, record: tuple[int, list[str] | None, str]) -> list[str]:
    number, names, text = record
    if fault := _NOT_TEXT.search(text):
        raise DataError(f"{path}, line {number}", **_not_utf8(fault))
    if names is None:
        got = MISPLACED
    elif not text.strip("\r\n"):
        got = "none"
    elif "" in names:
        got = f"no name for column {names.index('') + 1}"
    elif len(set(names)) < len(names):
        got = f"{_repeated(names)!r} twice"
    else:
        return names
    raise DataError(
        f"{path}, line {number}",
        expected="a header that names every column once",
        got=got,
        remedy="Write one as the first line.",
    )


def _csv_records(path: Path, file: TextIO) -> Iterator[tuple[int, list[str] | None, str]]:
    """Each record's first line, its fields or ``None`` where they are not as RFC 4180 has them, and its text."""
    csv.field_size_limit(LONGEST_FIELD)
    lines: list[str] = []
    reader = csv.reader(_noted(file, lines), strict=True)
    while True:
        lines.clear()
        number = reader.line_num + 1
        fields: list[str] | None = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines[-1] == "" or sum(map(len, lines)) > LONGEST_FIELD:
                raise DataError(
                    f"{path}, line {number}",
                    expected=f"quotes that are closed, around at most {LONGEST_FIELD} characters",
                    got=str(error),
                    remedy="Close the quote; inside a quoted field, double it.",
                ) from None
        text = "".join(lines)
        # the csv module takes a quote inside a field that has none around it
        yield number, fields if _CSV_RECORD.fullmatch(text) else None, text


def _noted(file: TextIO, lines: list[str]) -> Iterator[str]:
    """The lines of a file, each also appended to ``lines``, and ``""`` there at the end of the file."""
    for line in file:
        lines.append(line)
        yield line
    lines.append("")


def _tsv_records(file: TextIO) -> Iterator[tuple[int, list[str], str]]:
    for number, line in enumerate(file, start=1):
        yield number, _without_end(line).split("\t"), line
