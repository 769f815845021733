"""The frozen model that sets the targets, and its outputs kept on disk so that none is computed twice."""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from inhibitor.distill.observe import LOGITS, observe
from inhibitor.distill.rows import ROW, Rows
from inhibitor.errors import ConfigError, ModelError
from inhibitor.runs import write_text
from inhibitor.training import processes

FILL_BATCH = 32
FLUSHED = 64  # batches between two places to go on from
ROOM_LEFT = 1 << 28  # bytes that a cache leaves free


class Teacher:
    """A frozen teacher.

    Args:
        model: Put into evaluation mode; no gradient reaches it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.cache: Cache | None = None

    def targets(self, batch: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        """What ``observe`` gives for a batch, computed or read from the cache."""
        if self.cache is not None:
            return self.cache.read(batch[ROW], batch["attention_mask"], names)
        return self.compute(batch, names)

    @torch.no_grad()
    def compute(self, batch: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        """What ``observe`` gives for a batch."""
        return observe(self.model, batch, names)

    def check_repeats(self, batch: Mapping[str, Tensor], layers: Collection[int]) -> None:
        """Refuse a teacher that answers one batch in two ways.

        Raises:
            ModelError: It draws random numbers even in evaluation mode.
        """
        names = {f"hidden-{layer + 1}" for layer in layers}
        first, second = (self.compute(batch, names) for _ in range(2))
        if not all(torch.equal(first[name], second[name]) for name in names):
            raise ModelError(
                "the teacher",
                expected="the same answer to the same batch",
                got="two answers",
                remedy="Choose one that draws no random numbers in evaluation mode.",
            )

    def digest(self) -> str:
        """SHA-256 of its configuration and weights, wherever they were loaded from."""
        config = self.model.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


class Cache:
    """A teacher's outputs on a fixed set of rows, in bfloat16, memory-mapped.

    Its folder is named by the digest of the teacher and of all that it reads of the rows, token for token, so another
    teacher, text or tokenization has another folder. One file per output holds the real tokens of every row,
    one row after another (for a classifier's logits: one entry for each row), and beside it ``<name>.json`` its shape,
    written when it is complete.

    Args:
        root: The folder of all caches.
        teacher: Computes what is not there yet.
        rows: A fixed set.
    """

    def __init__(self, root: Path, teacher: Teacher, rows: Rows) -> None:
        self.teacher, self.rows = teacher, rows
        mask = rows.dataset["attention_mask"]
        ends = np.cumsum([0, *(sum(row) for row in mask)])
        self.starts, self.lengths, self.tokens = ends[:-1], np.diff(ends), int(ends[-1])
        self.folder = root / self._key()
        self.files: dict[str, np.memmap[Any, Any]] = {}
        self.by_row: set[str] = set()  # those with one entry for each row: a classifier's logits

    def complete(self, names: Collection[str], title: str) -> None:
        """Compute what is wanted and not there yet, each process its share; an interrupted filling goes on.

        Raises:
            ConfigError: The disk has too little room.
        """
        here = processes()
        with here.main_process_first():
            self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock") if here.is_main_process else nullcontext():
            here.wait_for_everyone()
            shapes = self._shapes(names)
            missing = {name: shape for name, shape in shapes.items() if not self._complete(name, shape)}
            if missing:
                self._fill(missing, title)
        for name in names:
            self.files[name] = np.memmap(self.folder / f"{name}.bin", np.int16, "r", shape=shapes[name])

    def read(self, rows: Tensor, attention_mask: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The outputs of some rows in float32, zero where ``attention_mask`` (blocks of these rows, length) is."""
        numbers = rows.cpu().numpy()
        return {name: self._read(name, numbers, attention_mask) for name in names}

    def _read(self, name: str, numbers: Any, attention_mask: Tensor) -> Tensor:
        file = self.files[name]
        if name in self.by_row:
            found = file[numbers]
        else:
            found = np.zeros((*attention_mask.shape, *file.shape[1:]), np.int16)
            ends = self.starts + self.lengths
            found[attention_mask.bool().cpu().numpy()] = np.concatenate(
                [file[self.starts[number] : ends[number]] for number in numbers]
            )
        return torch.from_numpy(found).view(torch.bfloat16).to(attention_mask.device).float()

    def _key(self) -> str:
        found = hashlib.sha256(self.teacher.digest().encode())
        for column in sorted(set(self.rows.dataset.column_names) - {ROW, "labels"}):
            found.update(column.encode())
            for row in self.rows.dataset[column]:
                found.update(np.asarray(row, np.int64).tobytes())
                found.update(b"/")
        return found.hexdigest()[:32]

    def _batch(self, start: int, stop: int) -> dict[str, Tensor]:
        batch = self.rows.collate([self.rows.dataset[row] for row in range(start, stop)])
        return {name: tensor.to(self.teacher.model.device) for name, tensor in batch.items()}

    def _shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """The shape of each output's file, from those of the first row."""
        found = self.teacher.compute(self._batch(0, 1), names)
        self.by_row |= {name for name, tensor in found.items() if name == LOGITS and tensor.dim() == 2}
        return {
            name: (len(self.lengths), *tensor.shape[1:]) if name in self.by_row else (self.tokens, *tensor.shape[2:])
            for name, tensor in found.items()
        }

    def _fill(self, missing: Mapping[str, tuple[int, ...]], title: str) -> None:
        here, names = processes(), sorted(missing)
        first, last = (len(self.lengths) * (here.process_index + end) // here.num_processes for end in (0, 1))
        progress, done = self.folder / f"filling-{here.process_index}.json", first
        asked = {"outputs": names, "rows": [first, last]}
        if progress.is_file():
            before = json.loads(progress.read_text(encoding="utf-8"))
            done = before.pop("done") if all(before.get(key) == value for key, value in asked.items()) else first
        if here.is_main_process:
            self._make_room(missing)
        here.wait_for_everyone()
        files = {name: np.memmap(self._file(name), np.int16, "r+", shape=shape) for name, shape in missing.items()}
        bar = tqdm(
            total=last - first,
            initial=done - first,
            desc=f"{title}, the teacher's outputs",
            unit="row",
            dynamic_ncols=True,
            disable=None if here.is_main_process else True,
        )
        with bar:
            for start in range(done, last, FILL_BATCH):
                stop = min(start + FILL_BATCH, last)
                self._write(files, start, stop)
                bar.update(stop - start)
                if stop == last or (start - done) // FILL_BATCH % FLUSHED == FLUSHED - 1:
                    for file in files.values():
                        file.flush()
                    write_text(progress, json.dumps({**asked, "done": stop}))
        here.wait_for_everyone()
        if here.is_main_process:
            for name, shape in missing.items():
                write_text(self.folder / f"{name}.json", json.dumps({"shape": shape, "dtype": "bfloat16"}) + "\n")
            for path in self.folder.glob("filling-*.json"):
                path.unlink()
        here.wait_for_everyone()

    def _write(self, files: Mapping[str, Any], start: int, stop: int) -> None:
        batch = self._batch(start, stop)
        real = batch["attention_mask"].bool()
        tokens = slice(self.starts[start], self.starts[stop - 1] + self.lengths[stop - 1])
        for name, tensor in self.teacher.compute(batch, list(files)).items():
            values, place = (tensor, slice(start, stop)) if name in self.by_row else (tensor[real], tokens)
            files[name][place] = values.to(torch.bfloat16).cpu().view(torch.int16).numpy()

    def _complete(self, name: str, shape: tuple[int, ...]) -> bool:
        told, file = self.folder / f"{name}.json", self._file(name)
        return told.is_file() and file.is_file() and file.stat().st_size == 2 * math.prod(shape)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _make_room(self, missing: Mapping[str, tuple[int, ...]]) -> None:
        """Give each file its size, if the disk can hold what will be in it."""
        sizes = {name: 2 * math.prod(shape) for name, shape in missing.items()}
        there = sum(self._file(name).stat().st_blocks * 512 for name in missing if self._file(name).is_file())
        free = shutil.disk_usage(self.folder).free + there
        if sum(sizes.values()) + ROOM_LEFT > free:
            raise ConfigError(
                f"cache: {self.folder.parent}",
                expected=f"room for {sum(sizes.values()) / 2**30:.2f} GiB of {', '.join(sorted(missing))}",
                got=f"{free / 2**30:.2f} GiB free",
                remedy="Use fewer blocks or another disk, or leave the cache out.",
            )
        for name, size in sizes.items():
            with self._file(name).open("ab") as file:
                file.truncate(size)
