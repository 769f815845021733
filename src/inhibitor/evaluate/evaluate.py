"""Score a model on a task's evaluation splits."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.config import Config, ModelName, UserPath
from inhibitor.data.files import OnBadRow
from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import Task, TaskDefault, TaskName, get_task
from inhibitor.errors import ModelError, RunError
from inhibitor.evaluate.metrics import compute
from inhibitor.models.families import longest_input
from inhibitor.models.loading import load_pretrained

BATCH_SIZE = 64

Logits = npt.NDArray[np.float32]


class EvaluateConfig(Config):
    """What ``inhibitor evaluate`` is asked.

    Args:
        model: A folder that ``finetune`` wrote, or any sequence classifier with the task's classes.
        task: A task's name.
        data: A folder with the data (see ``load_task``), or None for the hub.
        max_length: Tokens a row may have; the task's default where None.
        on_bad_row: ``"stop"`` at a bad row, or ``"quarantine"``: leave it out, and count it.
    """

    model: ModelName
    task: TaskName
    data: UserPath | None = None
    max_length: Annotated[int, TaskDefault] = Field(default=None, validate_default=True, ge=8)
    on_bad_row: OnBadRow = "stop"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a saved classifier on every evaluation split of a task.

    Returns:
        The same keys as ``finetune``, without those of the training.

    Raises:
        DataError: The data cannot be used.
        ModelError: The model cannot be loaded, or its classes are not the task's.
        RunError: The model predicts NaN or infinities.
    """
    task = get_task(config.task)
    labelled = load_task(task, config.data, splits=task.evaluation, on_bad_row=config.on_bad_row)
    model, tokenizer = open_classifier(config.model, task, config.max_length)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    started = time.perf_counter()
    encoded, truncated = encode(labelled, tokenizer, config.max_length)
    scores, _ = score(model, tokenizer, task, encoded)
    return {
        "kind": "evaluate",
        "task": task.name,
        "model": config.model,
        "attention": attention_of(model),
        "scores": scores,
        "headline": headline(task, scores),
        **labelled.describe(),
        "truncated": truncated,
        "seconds": time.perf_counter() - started,
    }


def open_classifier(name: str, task: Task, max_length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier of a task in float32, and its tokenizer.

    Args:
        name: A folder or a hub id.
        task: What it has been fine-tuned on.
        max_length: Tokens a row may have.

    Raises:
        ModelError: It cannot be loaded, its classes are not the task's, or it does not read rows that long.
    """
    tokenizer = load_pretrained(AutoTokenizer, name)
    model, loading = load_pretrained(
        AutoModelForSequenceClassification, name, dtype=torch.float32, output_loading_info=True
    )
    check_classes(name, model, task, loading["missing_keys"])
    check_pair(name, model, tokenizer, max_length)
    return model, tokenizer


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, splits: Mapping[str, Any]
) -> tuple[dict[str, dict[str, float]], dict[str, Logits]]:
    """Score a model, where it lies, on splits as ``encode`` gives them.

    Returns:
        By what the rows are: the task's metrics; and the logits, of shape ``(rows, classes)`` in the rows' order.
    """
    logits = {name: predict(model, tokenizer, rows) for name, rows in splits.items()}
    scores = {
        name: compute(
            task, logits[name][:, 0] if task.regression else logits[name].argmax(axis=1), np.asarray(rows["labels"])
        )
        for name, rows in splits.items()
    }
    return scores, logits


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any) -> Logits:
    """Run a classifier over encoded rows, longest first so that little is padded.

    Args:
        model: The classifier; it is put into evaluation mode.
        tokenizer: Pads.
        rows: What ``encode`` gives.

    Returns:
        Logits of shape ``(rows, classes)``, in the rows' order.

    Raises:
        RunError: A logit is NaN or infinite.
    """
    model.eval()
    pad = padding(tokenizer)
    order = np.argsort(rows["length"], kind="stable")[::-1]
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    for start in range(0, len(order), BATCH_SIZE):
        indices = order[start : start + BATCH_SIZE]
        batch = pad([rows[int(index)] for index in indices])
        del batch["labels"]
        with torch.inference_mode():
            output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        logits[indices] = output.float().cpu().numpy()
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise RunError(
            f"the prediction of row {row + 1}",
            expected="finite logits",
            got=str(logits[row].tolist()),
            remedy="The model's weights or its arithmetic are broken: try it in float32, or train it anew.",
        )
    return logits


def padding(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """A collator that pads encoded rows to the longest of a batch and leaves their ``length`` out."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = [{name: value for name, value in row.items() if name != "length"} for row in rows]
        return dict(tokenizer.pad(inputs, return_tensors="pt"))

    return collate


def headline(task: Task, scores: Mapping[str, Mapping[str, float]]) -> float:
    """The first metric on the first evaluation split."""
    return next(iter(scores.values()))[task.metrics[0]]


def attention_of(model: PreTrainedModel) -> str:
    """``"inhibitor"`` or ``"softmax"``."""
    return "inhibitor" if model.config.model_type.startswith("inhibitor") else "softmax"


def check_pair(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse a tokenizer that does not fit the model, and rows longer than the model reads.

    Raises:
        ModelError: With what does not fit.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    longest = min(tokenizer.model_max_length, longest_input(model) or max_length)
    if len(tokenizer) > vocabulary:
        expected, got = f"a tokenizer of at most {vocabulary} tokens", f"one of {len(tokenizer)}"
    elif tokenizer.pad_token is None:
        expected, got = "a tokenizer with a padding token", "none"
    elif max_length > longest:
        expected, got = f"a max_length of at most {longest}", str(max_length)
    else:
        return
    raise ModelError(name, expected=expected, got=got, remedy="Use the model's own tokenizer, or shorten max_length.")


def check_classes(name: str, model: PreTrainedModel, task: Task, missing: Sequence[str]) -> None:
    """Refuse a model whose classes are not the task's, or that lacks weights.

    Args:
        name: As the user wrote it.
        model: The classifier.
        task: What it is to be scored on, or to teach.
        missing: Weights that its folder did not have.

    Raises:
        ModelError: With both sides.
    """
    ids = sorted(model.config.id2label)
    classes = tuple(model.config.id2label[number] for number in ids)
    if missing:
        expected, got = "a classifier with all its weights", f"none for {', '.join(sorted(missing)[:3])}"
    elif len(classes) != 1 if task.regression else [name.lower() for name in classes] != list(task.labels):
        expected = f"the classes of {task.name}, {', '.join(task.labels) or 'one number'}"
        got = f"a model of {', '.join(classes)}"
    else:
        return
    raise ModelError(
        name,
        expected=expected,
        got=got,
        remedy=f"Fine-tune it on {task.name} first, or correct id2label in config.json.",
    )
