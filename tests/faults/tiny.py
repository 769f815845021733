"""A training so small that it can be stopped at every step: eight steps of a net of 62 weights."""

import gc
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from inhibitor.training import FiniteTrainer, on_this_machine

STEPS = 8


@pytest.fixture(autouse=True, scope="module")
def swift():
    """Each training collects garbage; what was there before these tests is not gone through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class Rows(Dataset[dict[str, Any]]):
    """15 rows of different lengths: an epoch of four steps of four rows, the last one of three."""

    def __init__(self, count: int = 15) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = [
            {
                "x": torch.randn(6, generator=generator),
                "y": torch.randn(2, generator=generator),
                "input_ids": [0] * (i * i % 7),
            }
            for i in range(count)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset[dict[str, Any]]):
    """The same rows, over and over."""

    def __iter__(self):
        while True:
            yield from Rows().rows


class Net(nn.Module):
    """Two layers that share a matrix, as a language model its embeddings, and drop a part of what they compute."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(6, 2)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.dropout = dropout

    def forward(self, x, y, **unused):
        self.seen += len(x)
        hidden = nn.functional.dropout(self.tied(self.first(x).relu()), self.dropout, self.training)
        return {"loss": (self.last(hidden) - y).square().mean()}


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in ("x", "y")}


def build(folder, *, micro_batch=2, accumulation=2, dropout=0.3, rows=None, callbacks=(), kind=None, **options):
    """A trainer of eight steps whose rows, dropout and weights are drawn at random."""
    defaults = {
        "output_dir": str(folder),
        "seed": 3,
        "max_steps": STEPS,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "logging_steps": 3,
        "save_steps": 100,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    set_seed(0)
    return (kind or FiniteTrainer)(
        title="test",
        model=Net(dropout),
        args=TrainingArguments(**(on_this_machine(bf16=False) | defaults | options)),
        train_dataset=Rows() if rows is None else rows,
        data_collator=collate,
        callbacks=list(callbacks),
    )


class At(TrainerCallback):  # type: ignore[misc]
    """Do something in a step of the run."""

    def __init__(self, step, action, when="on_step_begin"):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action()

        setattr(self, when, act)


def kill_with(number):
    return lambda: os.kill(os.getpid(), number)


def steps(trainer):
    """What was logged, without the summary at the end and without times."""
    return [
        {k: v for k, v in entry.items() if "second" not in k} for entry in trainer.state.log_history if "loss" in entry
    ]


def ending(folder):
    """Weights and optimizer at the end, as they lie in the last checkpoint."""
    last = folder / f"checkpoint-{STEPS}"
    return [(last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
