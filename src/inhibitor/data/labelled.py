"""Labelled data of a task, from a folder in the hub's layout or from the hub, checked row by row."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from inhibitor.data.files import ROW_SUFFIXES, OnBadRow, Row, RowError, Tally, check_text, read_rows
from inhibitor.data.tasks import TASKS, Task
from inhibitor.errors import DataError
from inhibitor.runs import sha256

SHIPPED = Path(__file__).parent
REMEDY = "Rename the columns as the Hugging Face hub does."

_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    Args:
        name: What the rows are. A part of a split has the name of its file, such as ``train_subset2k``, so that no
            result on it passes for one on the whole split.
        rows: The task's text columns and ``label``: a class id, or a number for a regression.
        tally: How many rows were read, and those of them that were set aside.
        file: The local file's name, or ``None`` from the hub.
        sha256: The local file's digest, or ``None`` from the hub.
    """

    name: str
    rows: datasets.Dataset
    tally: Tally
    file: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class LabelledData:
    """A task's splits, by the name under which they were asked for."""

    task: Task
    splits: Mapping[str, Split]

    def describe(self) -> dict[str, dict[str, Any]]:
        """``rows``, ``counts`` and ``files`` of every split, by what the rows are, to be kept with a result."""
        splits = self.splits.values()
        return {
            "rows": {split.name: len(split.rows) for split in splits},
            "counts": {split.name: split.tally.counts() for split in splits},
            "files": {split.name: {"file": split.file, "sha256": split.sha256} for split in splits if split.file},
        }

    def digests(self) -> dict[str, str | int]:
        """What tells the splits from others: the SHA-256 of a file; of a split from the hub its number of rows."""
        return {split.name: split.sha256 or len(split.rows) for split in self.splits.values()}

    def overlap(self) -> dict[str, int]:
        """Rows of each evaluation split whose texts the training split has too, by what the rows are."""
        seen = set(self._texts(self.splits["train"]))
        return {
            split.name: sum(texts in seen for texts in self._texts(split))
            for name, split in self.splits.items()
            if name != "train"
        }

    def _texts(self, split: Split) -> Iterator[tuple[str, ...]]:
        return zip(*(split.rows[column] for column in self.task.texts), strict=True)


def load_task(
    task: Task,
    data_dir: Path | None = None,
    *,
    splits: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "stop",
    held_out: float | None = None,
) -> LabelledData:
    """Read and check a task's splits.

    Args:
        task: The task.
        data_dir: A folder with ``<task>/``, ``glue/<task>/`` or the split files themselves: ``<split>.parquet``,
            ``.jsonl``, ``.csv`` or ``.tsv``, or the hub's ``<split>-00000-of-00001.parquet``; where none of them is
            there, a part named ``<split>_<something>``. ``None`` asks the hub, or takes the files shipped with the
            package.
        splits: The splits to read; all that a fine-tuning run needs, unless said otherwise.
        on_bad_row: Whether a bad row stops the reading, or is set aside in its split's ``tally``.
        held_out: To choose hyper-parameters by: the share of the training split that is scored in the place of the
            evaluation splits, which are then not read. What is left of ``train`` is named ``train_rest``, and the
            share ``train_held_out``. The text of a row decides, so the same rows are held out whenever and wherever
            they are read, and copies of a row stay together.

    Raises:
        DataError: A split is missing, empty or damaged, or a row has no text or a label outside the task's; or
            nothing would be held out, or left to train on.
    """
    splits = ("train",) if held_out is not None else task.splits if splits is None else splits
    if data_dir is None and task.repository:
        found = {name: _from_hub(task, name, on_bad_row) for name in splits}
    else:
        folder = find_task(task, SHIPPED if data_dir is None else data_dir, splits)
        files = {name: _split_file(folder, name) for name in splits}
        found = {name: _from_file(task, path, name, on_bad_row) for name, path in files.items()}
    return LabelledData(task, found if held_out is None else _parted(task, found["train"], held_out))


def encode(
    data: LabelledData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, datasets.Dataset], dict[str, int]]:
    """Tokenise every split for a classifier.

    Args:
        data: The splits.
        tokenizer: Adds its own special tokens and truncates the longer text of a pair first.
        max_length: Tokens a row may have, special tokens included.

    Returns:
        By what the rows are: the model's inputs, unpadded, with ``labels`` and ``length`` (tokens of the row); and
        how many rows were cut.
    """

    def tokenise(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in data.task.texts]
        encoded = tokenizer(*texts, verbose=False)
        cut = [len(ids) > max_length for ids in encoded["input_ids"]]
        if any(cut):
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"], "length": [len(ids) for ids in encoded["input_ids"]], "cut": cut}

    encoded = {
        split.name: split.rows.map(
            tokenise, batched=True, remove_columns=split.rows.column_names, keep_in_memory=True, desc=split.name
        )
        for split in data.splits.values()
    }
    truncated = {name: sum(rows["cut"]) for name, rows in encoded.items()}
    return {name: rows.remove_columns("cut") for name, rows in encoded.items()}, truncated


def _parted(task: Task, train: Split, share: float) -> dict[str, Split]:
    """The training split in two, by a hash of each row's texts."""
    texts = zip(*(train.rows[column] for column in task.texts), strict=True)
    held = [_fraction(row) < share for row in texts]
    if all(held) or not any(held):
        raise DataError(
            f"{task.name}, split {train.name!r}",
            expected=f"rows enough to hold out {share:g} of them",
            got=f"{len(held)} rows",
            remedy="Hold out another share, or leave held_out away.",
        )
    parts = {}
    for key, suffix, side in (("train", "rest", False), ("held_out", "held_out", True)):
        rows = train.rows.select([number for number, is_held in enumerate(held) if is_held == side])
        bad = [] if side else train.tally.bad  # which belong to the split as a whole, and are listed once
        tally = Tally(train.tally.on_bad_row, len(rows) + len(bad), bad)
        parts[key] = Split(f"{train.name}_{suffix}", rows, tally, train.file, train.sha256)
    return parts


def _fraction(texts: Sequence[str]) -> float:
    """A number from 0 to 1 that only the texts decide."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()  # no text holds a NUL
    return int.from_bytes(digest[:8], "big") / 2**64


def find_task(task: Task, data_dir: Path, splits: Sequence[str]) -> Path:
    """The folder that holds a task's splits: ``data_dir`` itself, or one in it that has the task's name on the hub.

    Raises:
        DataError: None of them holds a file of these splits.
    """
    own = (data_dir / task.name, data_dir / "glue" / task.name)
    configured = [place / task.configuration for place in (own[0], data_dir) if task.configuration is not None]
    folder: Path
    for folder in (*own, *configured, data_dir):
        other_task = folder.name in TASKS and folder.name != task.name
        if not other_task and any(_candidates(folder, split) for split in splits):
            return folder
    raise DataError(
        str(data_dir),
        expected=f"a folder with {task.name}/, glue/{task.name}/ or the files {_names(splits)}",
        got="none of them" if data_dir.is_dir() else "no folder",
        remedy="Name the folder that holds the data, or leave it out to use the Hugging Face hub.",
    )


def _candidates(folder: Path, split: str) -> list[Path]:
    """The files that hold a split whole or, where there is none, those that hold a part of it."""
    names = (*(f"{split}{suffix}" for suffix in ROW_SUFFIXES), f"{split}-00000-of-00001.parquet")
    parts = (path for suffix in ROW_SUFFIXES for path in folder.glob(f"{split}_*{suffix}"))
    return [path for path in (folder / name for name in names) if path.is_file()] or sorted(parts)


def _split_file(folder: Path, split: str) -> Path:
    found = _candidates(folder, split)
    if len(found) == 1:
        return found[0]
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    raise DataError(
        f"{folder}, split {split!r}",
        expected=f"one file, {_names([split])}",
        got=", ".join(path.name for path in found or shards) or "none",
        remedy="Keep one of them in that folder." if found else "Join them into one." if shards else "Add the file.",
    )


def _names(splits: Sequence[str]) -> str:
    return ", ".join(f"{split}.parquet (or .jsonl, .csv, .tsv)" for split in splits)


def _from_file(task: Task, path: Path, split: str, on_bad_row: OnBadRow) -> Split:
    tally = Tally(on_bad_row)
    rows = _checked(task, str(path), read_rows(path, (*task.texts, "label"), tally), tally, _blind(task, split))
    part = path.stem.startswith(f"{split}_")
    return Split(path.stem if part else split, rows, tally, path.name, sha256(path))


def _from_hub(task: Task, split: str, on_bad_row: OnBadRow) -> Split:
    try:
        rows = datasets.load_dataset(task.repository, task.configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{task.repository}, split {split!r}",
            expected="a dataset on the Hugging Face hub",
            got=" ".join(str(error).split())[:200],
            remedy="Check the connection, or name a folder that holds the data.",
        ) from error
    source, tally = f"{task.repository}, split {split!r}", Tally(on_bad_row)
    return Split(split, _checked(task, source, _hub_rows(rows, source, tally), tally, _blind(task, split)), tally)


def _hub_rows(rows: datasets.Dataset, source: str, tally: Tally) -> Iterator[Row]:
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for values in batch.to_pylist():
            tally.read += 1
            yield Row(source, tally.read, values)


def _blind(task: Task, split: str) -> bool:
    """Whether the labels of a split are a benchmark's secret, so that each is −1."""
    return split.startswith("test") and split not in task.evaluation


def _checked(task: Task, source: str, rows: Iterable[Row], tally: Tally, blind: bool) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {column: [] for column in (*task.texts, "label")}
    for row in rows:
        try:
            values = [*(check_text(row, column, REMEDY) for column in task.texts), _check_label(task, row, blind)]
        except RowError as bad:
            tally.refuse(bad)
            continue
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    if not columns["label"]:
        if tally.bad:
            raise tally.bad[0]
        raise DataError(source, expected="at least one row", got="an empty split", remedy="Fetch the data again.")
    label = datasets.Value("float32") if task.regression else datasets.ClassLabel(names=list(task.labels))
    features = {column: datasets.Value("string") for column in task.texts}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**features, "label": label}))


def _check_label(task: Task, row: Row, blind: bool) -> float:
    """A class id or its class's name, or a number in range; in digits where every value is a text; −1 where secret."""
    value = row.value("label", REMEDY)
    if isinstance(value, str):
        if value in task.labels:
            return task.labels.index(value)
        if not row.typed and value in map(str, range(len(task.labels))):
            return int(value)
        if not row.typed and task.regression and _DECIMAL.fullmatch(value):
            value = float(value)
        elif not row.typed and blind and value == "-1":
            value = -1
    if isinstance(value, int | float) and not isinstance(value, bool) and (task.regression or isinstance(value, int)):
        if blind and value == -1:
            return -1
        if task.range is not None and task.range[0] <= value <= task.range[1]:
            return value
        if task.range is None and 0 <= value < len(task.labels):
            return value
    classes = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
    raise RowError(
        row,
        "label",
        expected=classes if task.range is None else f"a number from {task.range[0]:g} to {task.range[1]:g}",
        got=type(value).__name__
        if isinstance(value, list | dict)
        else "nothing"
        if value is None
        else repr(value)[:80],
        remedy="Correct or remove that row; a split without labels cannot be scored.",
    )
