"""Fine-tune a pretrained model on a task as the authors did, resumable, with the last epoch's score as the result."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from inhibitor.config import Config, ModelName, Seed, UserPath
from inhibitor.data.files import OnBadRow, write_quarantine
from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import Task, TaskDefault, TaskName, get_task
from inhibitor.errors import ModelError
from inhibitor.evaluate.agreement import PREDICTIONS, as_json
from inhibitor.evaluate.evaluate import attention_of, check_pair, headline, padding, score
from inhibitor.models.loading import load_pretrained
from inhibitor.runs import METRICS, Run
from inhibitor.training import FiniteTrainer, fit, on_this_machine, processes

CHECKPOINTS = "checkpoints"


class FinetuneConfig(Config):
    """What to fine-tune, on which task, and where the run lives.

    Args:
        model: A local folder, a hub id or ``"minilm"``, with softmax or inhibitor attention.
        task: A task's name.
        data: A folder with the data, or ``None`` for the Hugging Face hub.
        output: The run's folder.
        on_bad_row: ``"stop"`` at a bad row, or ``"quarantine"``: leave it out, and keep it in ``quarantine.jsonl``.
        seed: Of the new head, the order of the rows and the dropout.
        epochs: Passes over the training split; the task's default where ``None``, as in the next three.
        learning_rate: The peak of the schedule.
        batch_size: Rows per step.
        max_length: Tokens a row may have, special tokens included.
        warmup_ratio: The part of all steps in which the learning rate rises; it falls linearly to zero after that.
        weight_decay: Of AdamW.
        bf16: Train in mixed bfloat16 precision. The score is always measured in float32.
        max_steps: Train for so many steps instead of ``epochs``.
        held_out: To choose by: the share of the training split that is not trained on but scored, in the place of the
            evaluation splits, which are then not even read.
    """

    model: ModelName
    task: TaskName
    data: UserPath | None = None
    output: UserPath
    on_bad_row: OnBadRow = "stop"
    seed: Seed = 0
    epochs: Annotated[int, TaskDefault] = Field(default=None, validate_default=True, gt=0)
    learning_rate: Annotated[float, TaskDefault] = Field(default=None, validate_default=True, gt=0)
    batch_size: Annotated[int, TaskDefault] = Field(default=None, validate_default=True, gt=0)
    max_length: Annotated[int, TaskDefault] = Field(default=None, validate_default=True, ge=8)
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    bf16: bool = False
    max_steps: int | None = Field(default=None, gt=0)
    held_out: float | None = Field(default=None, gt=0, lt=1)


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune a model and score it; go on where an interrupted run of the same configuration stopped.

    No epoch is chosen by its score: the last one counts. The run's folder gets ``model/``, ``predictions.json`` and,
    last, ``metrics.json``.

    Returns:
        What ``metrics.json`` holds. ``scores``, ``rows``, ``counts``, ``files`` and ``truncated`` are keyed by what the
        rows are, ``headline`` is the task's first metric on its first split, and ``tokens_per_second`` counts the
        training's tokens without padding.

    Raises:
        DataError: The task or its data cannot be used.
        ModelError: The model cannot be loaded.
        RunError: The folder is another run's, or a loss or gradient became NaN or infinite.
    """
    run = Run(config.output)
    run.check(config)
    if run.finished:
        run = Run.start(config.output, config)
        shutil.rmtree(run.path / CHECKPOINTS, ignore_errors=True)  # where it was killed as it tidied up
        return run.metrics()
    task = get_task(config.task)
    labelled = load_task(task, config.data, on_bad_row=config.on_bad_row, held_out=config.held_out)
    tokenizer, model = _open(config, task)
    with processes().main_process_first():
        run = Run.start(config.output, config)
    if processes().is_main_process:
        run.hold_to(labelled.digests())
        write_quarantine(run.path, [split.tally for split in labelled.splits.values()])
    encoded, truncated = encode(labelled, tokenizer, config.max_length)
    train = encoded.pop(labelled.splits["train"].name)

    def build(micro_batch: int, accumulation: int) -> FiniteTrainer:
        return FiniteTrainer(
            title=f"fine-tuning on {task.name}",
            model=model,
            args=_arguments(config, run.path / CHECKPOINTS, micro_batch, accumulation),
            train_dataset=train,
            data_collator=padding(tokenizer),
            processing_class=tokenizer,
            callbacks=[_Epochs(model, tokenizer, task, encoded)],
        )

    trainer = fit(build, run.path / CHECKPOINTS, config.batch_size)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    scores, logits = score(model, tokenizer, task, encoded)
    state = trainer.state
    scored = [entry for entry in state.log_history if "scores" in entry]
    last = {"epoch": state.epoch, "scores": scores}
    metrics = {
        "kind": "finetune",
        "task": task.name,
        "model": config.model,
        "attention": attention_of(model),
        "seed": config.seed,
        "scores": scores,
        "headline": headline(task, scores),
        **labelled.describe(),
        "overlap": labelled.overlap(),
        "truncated": truncated,
        "history": [{"step": entry["step"], "loss": entry["loss"]} for entry in state.log_history if "loss" in entry],
        "evaluations": [{key: entry[key] for key in last} for entry in scored] + [last],
        "seconds": trainer.trained_seconds,
        "tokens_per_second": state.num_input_tokens_seen / trainer.trained_seconds,
    }
    if processes().is_main_process:
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        run.write_json(PREDICTIONS, as_json(labelled, logits))
        run.write_json(METRICS, metrics)
        shutil.rmtree(run.path / CHECKPOINTS)
    processes().wait_for_everyone()
    return metrics


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Score the model after each epoch but the last one, whose score is the run's own.

    The scores are kept in the trainer's log, which a checkpoint carries, so that a resumed run reports all its epochs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, splits: Mapping[str, Any]
    ) -> None:
        self.scored = (model, tokenizer, task, splits)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps:
            scores = score(*self.scored)[0]
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, "scores": scores})


def _open(config: FinetuneConfig, task: Task) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    tokenizer = load_pretrained(AutoTokenizer, config.model)
    if task.regression:
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        id2label = dict(enumerate(task.labels))
        label2id = {name: number for number, name in id2label.items()}
        head = {"id2label": id2label, "label2id": label2id, "problem_type": "single_label_classification"}
    set_seed(config.seed)  # the head's first weights are drawn while the model is loaded
    model, loading = load_pretrained(
        AutoModelForSequenceClassification,
        config.model,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # a head of another task gives way to a new one
        output_loading_info=True,
        **head,
    )
    foreign = sorted(key for key, *_ in loading["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if foreign:
        raise ModelError(
            config.model,
            expected="weights of the shapes that its configuration says",
            got=f"another shape of {foreign[0]}",
            remedy="Save the model anew with save_pretrained.",
        )
    check_pair(config.model, model, tokenizer, config.max_length)
    return tokenizer, model


def _arguments(config: FinetuneConfig, folder: Path, micro_batch: int, accumulation: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        seed=config.seed,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # the sampler reads "length", which the collator leaves out
        include_num_input_tokens_seen="non_padding",
        logging_steps=0.01,
        save_strategy="epoch",
        **on_this_machine(bf16=config.bf16),
    )
