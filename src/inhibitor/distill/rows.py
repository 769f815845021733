"""What a distillation reads: blocks of text, masked or not, or a task's rows; in an order that the seed decides."""

import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.data import corpus
from inhibitor.data.labelled import LabelledData, encode
from inhibitor.distill.observe import readable
from inhibitor.distill.recipe import AnyStage, CalibrationConfig, DistillConfig, LogitsStage, TaskStage
from inhibitor.evaluate.evaluate import padding
from inhibitor.training import processes

MEASURE_BATCH = 16
ROW = "row"  # the column with a row's number, by which the teacher's cache knows it

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Rows:
    """Rows to train on.

    Args:
        dataset: Of ``input_ids``, ``attention_mask`` and whatever else the teacher reads; a stream, or, where its
            rows have numbers, a fixed set.
        collate: Makes a batch of rows.
        tokens: Of a row, on the average.
    """

    dataset: Any
    collate: Collate
    tokens: float

    @property
    def numbered(self) -> bool:
        """Whether every row has a number."""
        return hasattr(self.dataset, "__len__")

    def steps(self, stage: AnyStage) -> int:
        """How often the weights change in one training of a stage."""
        rows: int = stage.batch_size * stage.gradient_accumulation * processes().num_processes
        if isinstance(stage, TaskStage):
            return math.ceil(len(self.dataset) / rows) * stage.epochs
        return max(1, int(stage.tokens // (rows * self.tokens)))


class Material:
    """Everything that a recipe reads, in the teacher's tokens.

    Args:
        config: The recipe.
        tokenizer: The teacher's: it makes the inputs of both models, ``token_type_ids`` included.
        labelled: The task's splits, where the recipe has a task stage.

    Attributes:
        evaluation: The task's evaluation splits, encoded, by what the rows are.
        validation: Batches to measure every state on: held-out text, or the first rows of the evaluation split.
    """

    def __init__(
        self, config: DistillConfig, tokenizer: PreTrainedTokenizerBase, labelled: LabelledData | None
    ) -> None:
        self.config, self.text, self.tokenizer = config, config.text, tokenizer
        self.evaluation: dict[str, Any] = {}
        if labelled is not None and config.task is not None:
            length = config.task.max_length or labelled.task.max_length
            self.evaluation, self.truncated = encode(labelled, tokenizer, length)
            self.training = self.evaluation.pop(labelled.splits["train"].name)
        count = config.validation_sequences
        if self.text is not None:
            texts = [self.text, *filter(None, map(config.text_of, config.stages))]
            every = max(texts, key=lambda text: len(text.lengths))  # all lengths that some stage trains on
            together = max(1, min(MEASURE_BATCH, count // len(every.lengths)))  # so that each length has its turn
            held_out = list(corpus.packed(every, tokenizer, config.seed, run=together, held_out=True).take(count))
        else:
            together, split = MEASURE_BATCH, next(iter(self.evaluation.values()))
            held_out = [split[row] for row in range(min(count, len(split)))]
        self.validation = self._batches(held_out, together)
        self._fixed: dict[tuple[corpus.TextConfig | None, float], Rows] = {}

    def rows(self, index: int, stage: AnyStage) -> Rows:
        """What a stage trains on; a fixed set is the same object whenever it is asked for."""
        masked = stage.mask_probability if isinstance(stage, LogitsStage) else 0.0
        text = self.config.text_of(stage)
        kind = (text, masked)
        if kind not in self._fixed:
            rows = self._make(index, stage, text)
            if not rows.numbered:
                return rows
            self._fixed[kind] = rows
        return self._fixed[kind]

    def for_student(self, student: PreTrainedModel) -> dict[str, Any]:
        """The evaluation splits, without what the student does not read."""
        return {
            name: rows.select_columns([*readable(student, rows.features), "labels", "length"])
            for name, rows in self.evaluation.items()
        }

    def calibration(self, config: CalibrationConfig) -> list[dict[str, Tensor]]:
        """Batches without padding, at several lengths: blocks of text cut short, or single rows of the task."""
        if self.text is None:
            rows = [self.training[row] for row in range(min(config.sequences, len(self.training)))]
            return self._batches(rows, 1)
        blocks = corpus.packed(self.text, self.tokenizer, self.config.seed).take(config.sequences)
        whole = self.text.max_length
        lengths = [*(length for length in config.lengths if length < whole), whole]
        return [
            {name: tensor[:, :length] for name, tensor in batch.items()}
            for batch in self._batches(list(blocks), MEASURE_BATCH)
            for length in lengths
        ]

    def _make(self, index: int, stage: AnyStage, text: corpus.TextConfig | None) -> Rows:
        if text is None:
            rows = _numbered(self.training)
            return Rows(rows, padding(self.tokenizer), statistics.fmean(rows["length"]))
        fixed = text.blocks
        seed = self.config.seed + 1 + (index if fixed is None else 0)
        blocks = corpus.packed(text, self.tokenizer, seed)
        if fixed is not None:
            blocks = _numbered(corpus.collected(blocks, fixed))
        if isinstance(stage, LogitsStage):
            in_memory = {} if fixed is None else {"keep_in_memory": True, "load_from_cache_file": False}
            blocks = blocks.map(_Masking(self.tokenizer, stage.mask_probability, seed), batched=True, **in_memory)
        return Rows(blocks, cutting(self.tokenizer), text.max_length)

    def _batches(self, rows: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, Tensor]]:
        wanted = {*self.tokenizer.model_input_names, "length"}
        chosen = [{name: value for name, value in row.items() if name in wanted} for row in rows]
        collate = padding(self.tokenizer) if self.text is None else cutting(self.tokenizer)
        device = processes().device
        return [
            {name: tensor.to(device) for name, tensor in collate(chosen[start : start + size]).items()}
            for start in range(0, len(chosen), size)
        ]


def _numbered(dataset: Any) -> Any:
    return dataset.add_column(ROW, list(range(len(dataset))))


def cutting(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """A collator that parts rows of text into their blocks; where their lengths differ, it pads."""
    pad = padding(tokenizer)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in tokenizer.model_input_names if name in rows[0]]
        shapes = {(len(row["input_ids"]), row["length"]) for row in rows}
        if len(shapes) == 1:
            batch = {name: torch.tensor([row[name] for row in rows]).view(-1, rows[0]["length"]) for name in names}
        else:
            batch = pad(
                [
                    {name: row[name][start : start + row["length"]] for name in names}
                    for row in rows
                    for start in range(0, len(row["input_ids"]), row["length"])
                ]
            )
        return batch | ({ROW: torch.tensor([row[ROW] for row in rows])} if ROW in rows[0] else {})

    return collate


class _Masking:
    """Mask tokens by BERT's rule (arXiv 1810.04805, 3.1): which ones, only a block's own tokens and the seed decide.

    So a resumed run, another batch size or a second epoch masks a block just as the first time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self.seed = seed

    def __call__(self, batch: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._mask(ids) for ids in batch["input_ids"]]}

    def _mask(self, ids: list[int]) -> list[int]:
        block = torch.tensor([ids])
        self.collator.generator = torch.Generator().manual_seed(zlib.crc32(block.numpy().tobytes(), self.seed))
        masked: list[int] = self.collator.torch_mask_tokens(block)[0][0].tolist()
        return masked
