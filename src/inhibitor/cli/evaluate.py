"""``inhibitor evaluate``: score a fine-tuned model."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "evaluate"


def run(
    model: Annotated[str, typer.Option(help="A folder that finetune wrote, or a classifier with the task's labels.")],
    task: Annotated[str, typer.Option(help="A GLUE task, imdb or reviews.")],
    data: Annotated[Path | None, typer.Option(help="Folder in the hub's layout; the hub itself by default.")] = None,
) -> None:
    """Score a model on a task's evaluation split and print the result as JSON."""
    from inhibitor.data.tasks import get_task

    get_task(task)

    import json

    from inhibitor.cli import quiet
    from inhibitor.evaluate.evaluate import evaluate

    quiet()
    typer.echo(json.dumps(evaluate(model, task, data), indent=2, ensure_ascii=False))
