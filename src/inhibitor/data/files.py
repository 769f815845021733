"""Strict readers of local files: UTF-8 lines, JSON lines and parquet rows, each with its place in the file."""

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inhibitor.errors import DataError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 file, without its end, with its number from 1; a byte order mark is dropped.

    Raises:
        DataError: A byte that is not UTF-8, or a NUL, by line and byte.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = error.start
            else:
                place = text.find("\0")
                if place < 0:
                    yield number, text.rstrip("\r\n")
                    continue
            raise DataError(
                f"{path}, line {number}, byte {place + 1}",
                expected="UTF-8 text",
                got=f"the byte 0x{line[place]:02x}",
                remedy="Convert the file to UTF-8, for example with iconv.",
            )


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a ``.jsonl`` or ``.parquet`` file with its number from 1 (of a ``.jsonl``: its line).

    Args:
        path: The file; its suffix says what it holds.
        columns: The columns that are wanted. Others may come too, and a missing one is the caller's to find.

    Raises:
        DataError: A line that is no JSON object, or a damaged parquet file.
    """
    return _read_parquet(path, columns) if path.suffix == ".parquet" else _read_jsonl(path)


def check_text(value: object, subject: str) -> str:
    """Return ``value`` if it is text that a tokenizer can read, the empty text included.

    Raises:
        DataError: It is missing, not text, or holds a NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
    elif "\0" in value:
        got = "a NUL character"
    elif not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        got = "half of a surrogate pair"
    else:
        return value
    raise DataError(subject, expected="text", got=got, remedy="Correct or remove that row.")


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _damage_named(str(path)):
        batches = pq.ParquetFile(path).iter_batches(batch_size=1000, columns=list(columns))
    while True:
        with _damage_named(f"{path}, after row {number}"):
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        for row in rows:
            number += 1
            yield number, row


@contextmanager
def _damage_named(subject: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(
            subject, expected="a whole parquet file", got=got, remedy="Write or fetch the file again."
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            got = str(error)
        else:
            if isinstance(row, dict):
                yield number, row
                continue
            got = type(row).__name__
        raise DataError(
            f"{path}, line {number}", expected="one JSON object", got=got[:200], remedy="Correct that line."
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object that names a key twice")
    return row
