"""Predictions on GLUE's test splits, in the files that its server takes (gluebenchmark.com)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from inhibitor.data.labelled import encode, load_task
from inhibitor.data.tasks import Task, get_task
from inhibitor.errors import InhibitorError
from inhibitor.evaluate.evaluate import Logits, open_classifier, predict
from inhibitor.reproduce.plan import final
from inhibitor.reproduce.recipe import EXPERIMENTS, ReproduceConfig
from inhibitor.runs import Run, write_text

SUBMISSION = "submission"
FILES = {
    "cola": {"test": "CoLA.tsv"},
    "mnli": {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    "mrpc": {"test": "MRPC.tsv"},
    "qnli": {"test": "QNLI.tsv"},
    "qqp": {"test": "QQP.tsv"},
    "rte": {"test": "RTE.tsv"},
    "sst2": {"test": "SST-2.tsv"},
    "stsb": {"test": "STS-B.tsv"},
    "wnli": {"test": "WNLI.tsv"},
}
NAMED = ("mnli", "qnli", "rte")  # tasks whose classes go by their names


def submit(config: ReproduceConfig) -> dict[str, InhibitorError]:
    """Write the files of every experiment's first seed into ``submission/<experiment>/``.

    Returns:
        By run, why its file could not be written.
    """
    refused: dict[str, InhibitorError] = {}
    for experiment in EXPERIMENTS:
        for task in config.tasks:
            run = Run(config.output / final(experiment, task, config.seeds[0]))
            if task in FILES and run.finished:
                folder = config.output / SUBMISSION / experiment
                try:
                    write_submission(str(run.model), task, config.data, folder, config.task(task).max_length)
                except InhibitorError as error:
                    refused[f"{SUBMISSION}/{experiment}/{task}"] = error
    return refused


def write_submission(
    model: str, task: str, data: Path | None, folder: Path, max_length: int | None = None
) -> list[Path]:
    """Predict a GLUE task's test split and write ``<Task>.tsv``: ``index`` and ``prediction``.

    Args:
        model: A classifier fine-tuned on the task.
        task: One of GLUE's nine.
        data: A folder with the test split, whose labels may be −1, or None for the hub.
        folder: Gets the files; it is made where there is none.
        max_length: Tokens a row may have; the task's own where None.

    Returns:
        The files: two for MNLI.

    Raises:
        DataError: The split cannot be read.
        ModelError: The model cannot be loaded, or is not one of this task.
    """
    specification = get_task(task)
    labelled = load_task(specification, data, splits=tuple(FILES[task]))
    max_length = max_length or specification.max_length
    classifier, tokenizer = open_classifier(model, specification, max_length)
    classifier.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    encoded, _ = encode(labelled, tokenizer, max_length)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, name in FILES[task].items():
        values = _values(specification, predict(classifier, tokenizer, encoded[labelled.splits[key].name]))
        rows = (f"{index}\t{value}\n" for index, value in enumerate(values))
        write_text(folder / name, "index\tprediction\n" + "".join(rows))
        written.append(folder / name)
    return written


def _values(task: Task, logits: Logits) -> Sequence[str]:
    if task.range is not None:
        low, high = task.range
        return [f"{min(max(value, low), high):.3f}" for value in logits[:, 0].tolist()]
    classes = logits.argmax(axis=1).tolist()
    return [task.labels[number] if task.name in NAMED else str(number) for number in classes]
