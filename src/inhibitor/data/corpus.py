"""Unlabelled text for distillation: documents from many files, mixed, tokenised and packed into full blocks."""

import glob
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
from datasets.iterable_dataset import ExamplesIterable  # from_generator would leave lock files in the user's cache
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from inhibitor.config import Config
from inhibitor.data.files import ROW_SUFFIXES, OnBadRow, RowError, Tally, check_text, read_lines, read_rows
from inhibitor.errors import ConfigError, DataError

SUFFIXES = (".txt", *ROW_SUFFIXES)
LONGEST_PARAGRAPH = 1 << 16
HELD_OUT = 64  # one document in so many is kept from training
RUN = 64  # rows: batches of 64, 32, … are then of one length


class TextConfig(Config):
    """Which text to distil on, and how long its blocks are.

    Args:
        files: Local files, or patterns such as ``wiki/*.parquet``. Each row of a ``.jsonl``, ``.parquet``, ``.csv`` or
            ``.tsv`` file is a document; in a ``.txt`` file each paragraph is one, and blank lines part them.
        dataset: Instead of files, a dataset on the Hugging Face hub, streamed.
        dataset_config: Its configuration.
        split: Its split.
        column: The column that holds the text, but in ``.txt`` files.
        on_bad_row: Whether a bad row of a local file stops the run or is left out; a bad line of a ``.txt`` file is
            left out of its paragraph.
        max_length: Tokens of a block, special tokens included.
        min_length: Where given, blocks of ``max_length`` tokens, of a half, a quarter and so on of it take turns, down
            to this length: a student that has seen one length only is good at that length only.
        shuffle_buffer: Documents held in memory to be drawn from at random.
        blocks: Train on just so many blocks, again and again in other orders, instead of on a stream without end.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    column: str = "text"
    on_bad_row: OnBadRow = "stop"
    max_length: int = Field(default=128, ge=8)
    min_length: int | None = Field(default=None, ge=8)
    shuffle_buffer: int = Field(default=10_000, gt=0)
    blocks: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.files) == bool(self.dataset):
            raise ConfigError(
                "text",
                expected="either files or a dataset",
                got="both" if self.files else "neither",
                remedy="Name local files, or one dataset on the hub.",
            )
        if self.min_length is not None and self.min_length > self.max_length:
            raise ConfigError(
                "text.min_length",
                expected=f"at most max_length, {self.max_length}",
                got=str(self.min_length),
                remedy="Name the shortest block that is wanted.",
            )
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of blocks, longest first."""
        lengths = [self.max_length]
        while self.min_length is not None and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= self.min_length:
            lengths.append(lengths[-1] // 2)
        return tuple(lengths)


@dataclass(frozen=True)
class Contents:
    """What a local file holds.

    Args:
        documents: Documents that are not blank.
        tally: Rows, or lines of a ``.txt`` file, that were read, and those of them that were set aside.
    """

    documents: int
    tally: Tally


def check(config: TextConfig) -> dict[Path, Contents]:
    """Read every local document once, before work is built on it.

    Returns:
        What each file holds; nothing for a dataset on the hub.

    Raises:
        DataError: A file is missing, of an unknown kind, damaged or without documents, or a row has no text; it
            names the file and the line or row.
    """
    found = {}
    for path in _paths(config):
        status = path.stat()
        found[path] = _contents(path, config.column, config.on_bad_row, status.st_size, status.st_mtime_ns)
    return found


def packed(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int, *, run: int = RUN, held_out: bool = False
) -> datasets.IterableDataset:
    """Stream the text for ever as full blocks, in an order that only ``seed`` decides; local files are checked first.

    Files are drawn from in proportion to their documents, so that all of them end together and begin anew in another
    order. Documents follow one another with the tokenizer's separator between them, and a block cuts them wherever it
    ends. To resume, skip the blocks already seen.

    Args:
        config: The text.
        tokenizer: Its own special tokens stand around every block, as around a single text.
        seed: Of the mixing and the order.
        run: Rows in which blocks have one length, before the next length's turn.
        held_out: Whether to stream the documents kept for measuring, one in 64, or the others.

    Returns:
        Rows of ``input_ids`` and ``attention_mask``, lists of exactly ``max_length`` integers: blocks of ``length``
        tokens, one after another.

    Raises:
        DataError: As ``check``, or the hub does not have the dataset.
    """
    documents = datasets.IterableDataset(ExamplesIterable(_forever, {"epoch": _epoch(config, seed, held_out)}))
    packer = _Packer(tokenizer, config.lengths, run)
    return documents.map(packer, batched=True, with_indices=True, remove_columns=["text"])


def collected(blocks: datasets.IterableDataset, count: int) -> datasets.Dataset:
    """The first blocks of a stream, in memory."""
    columns: dict[str, list[Any]] = {}
    for block in blocks.take(count):
        for name, values in block.items():
            columns.setdefault(name, []).append(values if isinstance(values, int) else np.asarray(values, np.int32))
    return datasets.Dataset.from_dict(columns)


def _paths(config: TextConfig) -> list[Path]:
    paths: list[Path] = []
    for pattern in config.files:
        pattern = os.path.expanduser(pattern)
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True)) or [Path(pattern)]
        paths.extend(path for path in found if path not in paths)
    for path in paths:
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise DataError(
                f"files: {path}",
                expected=f"a file that ends in {', '.join(SUFFIXES)}",
                got="no such file" if not path.is_file() else repr(path.suffix),
                remedy="Check the path, or convert the file.",
            )
    return paths


@cache
def _contents(path: Path, column: str, on_bad_row: OnBadRow, size: int, changed: int) -> Contents:
    """What a file holds; it is read again when its size or time has changed, and else once."""
    tally = Tally(on_bad_row)
    documents = sum(1 for _ in _read(path, column, tally))
    if documents:
        return Contents(documents, tally)
    if tally.bad:
        raise tally.bad[0]
    raise DataError(str(path), expected="at least one document", got="only blank text", remedy="Leave that file out.")


def _read(path: Path, column: str, tally: Tally) -> Iterator[str]:
    """Each document of a file that is not blank."""
    if path.suffix == ".txt":
        yield from _paragraphs(path, tally)
        return
    for row in read_rows(path, [column], tally):
        try:
            text = check_text(row, column, "Say which column holds the text.")
        except RowError as bad:
            tally.refuse(bad)
            continue
        if text.strip():
            yield text


def _paragraphs(path: Path, tally: Tally) -> Iterator[str]:
    """Lines joined until a blank one, or until a file without blank lines would fill the memory."""
    lines: list[str] = []
    length = 0
    for _, line in read_lines(path, tally):
        text = line.strip()
        if text:
            lines.append(text)
            length += len(text)
        if lines and (not text or length > LONGEST_PARAGRAPH):
            yield " ".join(lines)
            lines, length = [], 0
    if lines:
        yield " ".join(lines)


def _read_part(
    path: Path, first: int, column: str, on_bad_row: OnBadRow, held_out: bool
) -> Iterator[tuple[int, dict[str, str]]]:
    """The documents kept for measuring, or the others; told apart before any mixing, so that no epoch swaps them.

    Every 64th of all files' is kept, so that many small ones are parted as one is; ``first`` lie before this file.
    """
    for number, text in enumerate(_read(path, column, Tally(on_bad_row)), first):
        if (number % HELD_OUT == 0) == held_out:
            yield number, {"text": text}


def _epoch(config: TextConfig, seed: int, held_out: bool) -> datasets.IterableDataset:
    """One pass over one part of the documents, mixed; ``set_epoch`` gives another order."""
    if config.dataset:
        rows = _from_hub(config, config.dataset)
        # by content, for an epoch reorders the hub's files below this filter
        mixed = rows.filter(lambda row: (zlib.crc32(row["text"].encode()) % HELD_OUT == 0) == held_out)
    else:
        files = check(config)
        *before, total = itertools.accumulate((contents.documents for contents in files.values()), initial=0)
        text = datasets.DatasetInfo(features=datasets.Features({"text": datasets.Value("string")}))
        options = {"column": config.column, "on_bad_row": config.on_bad_row, "held_out": held_out}
        mixed = datasets.interleave_datasets(
            [
                datasets.IterableDataset(
                    ExamplesIterable(_read_part, options | {"path": path, "first": first}), info=text
                )
                for path, first in zip(files, before, strict=True)
            ],
            probabilities=[contents.documents / total for contents in files.values()],
            seed=seed,
            stopping_strategy="all_exhausted_without_replacement",
        )
    return mixed.shuffle(seed=seed, buffer_size=config.shuffle_buffer)


def _from_hub(config: TextConfig, name: str) -> datasets.IterableDataset:
    try:
        rows = datasets.load_dataset(name, config.dataset_config, split=config.split, streaming=True)
        return rows.select_columns([config.column]).rename_columns({config.column: "text"})
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {name!r}, split {config.split!r}",
            expected=f"a dataset on the Hugging Face hub with the column {config.column!r}",
            got=" ".join(str(error).split())[:200],
            remedy="Check the name and the connection, or name local files.",
        ) from error


def _forever(epoch: datasets.IterableDataset) -> Iterator[tuple[int, dict[str, str]]]:
    for number in itertools.count():
        epoch.set_epoch(number)
        seen = 0
        for seen, document in enumerate(epoch, start=1):
            yield seen, document
        if not seen:
            raise DataError(
                "text",
                expected="documents to train on and others to measure on",
                got="too few for both",
                remedy="Add text, or part it into documents.",
            )


class _Packer:
    """Turn a batch of documents into rows of the blocks they fill; what is left over at its end is dropped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, ...], run: int) -> None:
        sample = tokenizer("a", return_special_tokens_mask=True)
        ids, special = np.asarray(sample["input_ids"]), np.asarray(sample["special_tokens_mask"], dtype=bool)
        text = np.flatnonzero(~special)
        self.prefix, self.suffix = ids[: text[0]], ids[text[-1] + 1 :]
        self.separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        self.tokenizer, self.lengths, self.run = tokenizer, lengths, run

    def __call__(self, batch: Mapping[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = self.tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids = np.asarray([token for document in encoded["input_ids"] for token in (*document, self.separator)])
        whole = len(ids) // self._taken(self.lengths[0])
        if not whole:
            raise DataError(
                "text",
                expected=f"{len(batch['text'])} documents that fill a block of {self.lengths[0]} tokens",
                got=f"{len(ids)} tokens",
                remedy="Shorten max_length, or join the documents.",
            )
        run = whole if len(self.lengths) == 1 else min(self.run, whole // len(self.lengths)) or whole
        found, lengths = [], list[int]()
        turns = itertools.cycle(self.lengths)
        length = next(itertools.islice(turns, indices[0] // len(indices) % len(self.lengths), None))
        while len(rows := self._rows(ids, length)[:run]) == run:
            found.append(rows)
            lengths += [length] * run
            ids, length = ids[run * self._taken(length) :], next(turns)
        return self._columns(np.concatenate(found), lengths)

    def _rows(self, ids: Any, length: int) -> Any:
        """The rows that ids fill with blocks of a length, each framed."""
        taken = self._taken(length)
        blocks = ids[: len(ids) // taken * taken].reshape(-1, length - len(self.prefix) - len(self.suffix))
        around = [np.broadcast_to(tokens, (len(blocks), len(tokens))) for tokens in (self.prefix, self.suffix)]
        return np.hstack([around[0], blocks, around[1]]).reshape(-1, self.lengths[0])

    def _taken(self, length: int) -> int:
        """Ids that go into a row of blocks of a length."""
        return self.lengths[0] // length * (length - len(self.prefix) - len(self.suffix))

    def _columns(self, rows: Any, lengths: Sequence[int]) -> dict[str, list[Any]]:
        return {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist(), "length": list(lengths)}
