"""From a fine-tuned float student to an int8 model, with what it gains, what it costs, and where."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.bench.machine import machine
from inhibitor.bench.timing import Contestant, calls_for, in_turn, median_and_spread, pairs
from inhibitor.config import Config, ModelName, Seed, UserPath
from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import Task, TaskDefault, TaskName, get_task
from inhibitor.evaluate.evaluate import Logits, headline, open_classifier, padding, score
from inhibitor.models.config import Int8Config
from inhibitor.models.families import layer_modules
from inhibitor.models.int8 import parts
from inhibitor.quantization.quantize import check, quantize
from inhibitor.quantization.seen import clipped_shares
from inhibitor.runs import METRICS, Run

BATCHES = (1, 8)  # whose latency is measured, at the task's full length
ROUNDS = 15
_ROWS = 16  # of a calibration batch
_ORDER = ("embeddings", "attention", "linear")  # in which parts are measured alone


class QuantizeConfig(Config):
    """What ``inhibitor quantize`` is asked.

    Args:
        model: A folder that ``finetune`` or ``distill`` wrote: an inhibitor classifier with the task's classes.
        task: A task's name.
        data: A folder with the data, or None for the Hugging Face hub.
        output: The run's folder.
        int8: What becomes integers.
        sequences: Rows of the training split that steps are found on.
        seed: Which rows.
        max_length: Tokens a row may have; the task's default where None.
        parts: Whether each part is also measured alone, which scores the model once for each.
    """

    model: ModelName
    task: TaskName
    data: UserPath | None = None
    output: UserPath
    int8: Int8Config = Int8Config()
    sequences: int = Field(default=256, gt=0)
    seed: Seed = 0
    max_length: Annotated[int, TaskDefault] = Field(default=None, validate_default=True, ge=8)
    parts: bool = True


def run(config: QuantizeConfig) -> dict[str, Any]:
    """Quantise a model, score it before and after, and keep both model and report in the run's folder.

    Returns:
        What ``metrics.json`` holds: ``scores`` and ``headline`` after, the same ``_before``; ``bytes`` of the weights;
        ``latency`` by batch, in seconds; ``parts``, each quantised alone: its ``score`` and its ``sqnr``, the power
        of the logits over that of their change, in decibels; ``sqnr`` of the whole; ``clipped``, the shares of
        attention's codes, layer by layer, that lie beyond their grid on the rows that steps were found on.

    Raises:
        DataError: The task or its data cannot be used.
        ModelError: The model cannot be loaded or quantised, or its classes are not the task's.
        RunError: The folder is another run's.
    """
    Run(config.output).check(config)
    if Run(config.output).finished:
        return Run.start(config.output, config).metrics()
    task = get_task(config.task)
    before, tokenizer = open_classifier(config.model, task, config.max_length)
    check(before.eval(), config.int8)
    labelled = load_task(task, config.data)
    folder = Run.start(config.output, config)
    encoded, truncated = encode(labelled, tokenizer, config.max_length)
    train = encoded.pop(labelled.splits["train"].name)
    sample = list(_sample(train, tokenizer, config))
    after = quantize(copy.deepcopy(before), config.int8, sample)
    bench = _Bench(tokenizer, task, encoded, *score(before, tokenizer, task, encoded))
    scores, logits = score(after, tokenizer, task, encoded)
    metrics = {
        "kind": "quantize",
        "task": task.name,
        "model": config.model,
        "seed": config.seed,
        "int8": config.int8.model_dump(mode="json"),
        "scores": scores,
        "headline": headline(task, scores),
        "scores_before": bench.scores,
        "headline_before": headline(task, bench.scores),
        "sqnr": bench.sqnr(logits),
        "bytes": {"before": _bytes(before), "after": _bytes(after)},
        "latency": [_latency(before, after, batch, config.max_length) for batch in BATCHES],
        "parts": bench.alone(before, after, config.int8) if config.parts else [],
        "clipped": [{"layer": layer, **shares} for layer, shares in clipped_shares(after, sample).items()],
        "machine": machine(),
        **labelled.describe(),
        "truncated": truncated,
    }
    after.save_pretrained(folder.model)
    tokenizer.save_pretrained(folder.model)
    folder.write_json(METRICS, metrics)
    return metrics


def _sample(
    train: Any, tokenizer: PreTrainedTokenizerBase, config: QuantizeConfig
) -> Iterator[dict[str, torch.Tensor]]:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))[
        : config.sequences
    ].tolist()
    rows = sorted((train[row] for row in order), key=lambda row: int(row["length"]))
    pad = padding(tokenizer)
    for start in range(0, len(rows), _ROWS):
        batch = pad(rows[start : start + _ROWS])
        yield {name: tensor for name, tensor in batch.items() if name != "labels"}


@dataclass
class _Bench:
    """What the float model says, and how far another is from it."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Mapping[str, Any]
    scores: dict[str, dict[str, float]]
    logits: dict[str, Logits]

    def sqnr(self, logits: Mapping[str, Logits]) -> float:
        """The power of the float model's logits on the first split over that of what changed, in decibels."""
        name = next(iter(self.logits))
        error = np.square(self.logits[name] - logits[name], dtype=np.float64).sum()
        power = np.square(self.logits[name], dtype=np.float64).sum()
        return float(10 * np.log10(power / max(error, np.finfo(np.float64).tiny)))

    def alone(self, before: PreTrainedModel, after: PreTrainedModel, config: Int8Config) -> list[dict[str, Any]]:
        """Each part in integers, with all others in float."""
        first = dict([next(iter(self.splits.items()))])
        found = []
        for name, paths in _groups(before, config).items():
            with _swapped(before, after, paths):
                scores, logits = score(before, self.tokenizer, self.task, first)
            found.append({"part": name, "score": headline(self.task, scores), "sqnr": self.sqnr(logits)})
        return found


def _groups(model: PreTrainedModel, config: Int8Config) -> dict[str, list[str]]:
    """The paths of the parts to quantise: the embeddings, and each layer's attention and linear layers."""
    names = {module: name for name, module in model.named_modules()}
    layers = {f"{names[layer]}.": index for index, layer in enumerate(layer_modules(model))}
    groups: dict[str, list[str]] = {}
    kinds = {"activation": "linear"}  # of which it becomes a part
    found = [(kinds.get(part.kind, part.kind), part.path) for part in parts(model, config)]
    for kind, path in sorted(found, key=lambda part: _ORDER.index(part[0])):
        layer = next((index for prefix, index in layers.items() if path.startswith(prefix)), None)
        groups.setdefault(kind if layer is None else f"layer {layer}, {kind}", []).append(path)
    return groups


@contextmanager
def _swapped(model: nn.Module, other: nn.Module, paths: list[str]) -> Iterator[None]:
    kept = {path: model.get_submodule(path) for path in paths}
    for path in paths:
        model.set_submodule(path, other.get_submodule(path))
    try:
        yield
    finally:
        for path, module in kept.items():
            model.set_submodule(path, module)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.inference_mode()
def _latency(before: PreTrainedModel, after: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    """Seconds of one call of each, timed in turn: medians, spreads, and the median of the rounds' ratios."""
    vocabulary = before.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    contestants = [
        Contestant(name, partial(model, input_ids=ids), nullcontext, ROUNDS, calls_for(1e-2), warm_up=True)
        for name, model in (("before", before), ("after", after))
    ]
    times = in_turn(contestants, lambda rounds: None)
    ratios = [after / before for before, after in pairs(times["before"], times["after"])]
    named = {name: median_and_spread(list(seconds.values())) for name, seconds in times.items()}
    return {
        "batch": batch,
        "length": length,
        **{name: {"median": median, "spread": spread} for name, (median, spread) in named.items()},
        "ratio": median_and_spread(ratios)[0],
    }
