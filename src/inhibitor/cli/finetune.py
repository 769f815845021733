"""``inhibitor finetune``: train a model, softmax or inhibitor, on a labelled task."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "finetune"


def run(
    model: Annotated[str, typer.Option(help="A model folder, a hub id or minilm.")],
    task: Annotated[str, typer.Option(help="A GLUE task, imdb, or reviews (a small set that comes with the package).")],
    output: Annotated[Path, typer.Option(help="The run's folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder in the hub's layout; the hub itself by default.")] = None,
    on_bad_row: Annotated[str, typer.Option(help="stop, or quarantine: leave bad rows out and list them.")] = "stop",
    seed: Annotated[int, typer.Option(help="Of the head, the order and the dropout.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="The task's own by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The task's own by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="The task's own by default.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row; the task's own by default.")] = None,
    bf16: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = False,
    held_out: Annotated[
        float | None, typer.Option(help="Share of train to score instead of the evaluation split, to choose by.")
    ] = None,
) -> None:
    """Fine-tune on a task and score the last epoch. An interrupted run goes on when it is started again."""
    from inhibitor.data.tasks import get_task

    get_task(task)

    from inhibitor.cli import quiet, show
    from inhibitor.evaluate.finetune import FinetuneConfig, finetune

    config = FinetuneConfig.parse(
        {
            "model": model,
            "task": task,
            "output": output,
            "data": data,
            "on_bad_row": on_bad_row,
            "seed": seed,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "max_length": max_length,
            "bf16": bf16,
            "held_out": held_out,
        },
        source="finetune",
    )
    quiet()
    finetune(config)
    show(config.output)
