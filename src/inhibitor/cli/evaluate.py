"""``inhibitor evaluate``: score a fine-tuned model."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "evaluate"


def run(
    model: Annotated[str, typer.Option(help="A folder that finetune wrote, or a classifier with the task's labels.")],
    task: Annotated[str, typer.Option(help="A GLUE task, imdb or reviews.")],
    data: Annotated[Path | None, typer.Option(help="Folder in the hub's layout; the hub itself by default.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row; the task's own by default.")] = None,
    on_bad_row: Annotated[str, typer.Option(help="stop, or quarantine: leave bad rows out and count them.")] = "stop",
) -> None:
    """Score a model on a task's evaluation split and print the result as JSON."""
    from inhibitor.data.tasks import get_task

    get_task(task)

    import json

    from inhibitor.cli import quiet
    from inhibitor.evaluate.evaluate import EvaluateConfig, evaluate

    config = EvaluateConfig.parse(
        {"model": model, "task": task, "data": data, "max_length": max_length, "on_bad_row": on_bad_row},
        source="evaluate",
    )
    quiet()
    typer.echo(json.dumps(evaluate(config), indent=2, ensure_ascii=False))
