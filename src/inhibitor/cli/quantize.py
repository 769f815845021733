"""``inhibitor quantize``: a fine-tuned float student in, an int8 model and its report out."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "quantize"


def run(
    model: Annotated[str, typer.Argument(help="A folder that finetune or distill wrote: an inhibitor classifier.")],
    task: Annotated[str, typer.Option(help="A GLUE task, imdb or reviews: to find steps on, and to score.")],
    output: Annotated[Path, typer.Option(help="The run's folder; the model goes into model/ there.")],
    data: Annotated[Path | None, typer.Option(help="Folder in the hub's layout; the hub itself by default.")] = None,
    attention: Annotated[int, typer.Option(help="Bits of the attention: 8, or 6 or 4 for research.")] = 8,
    linear: Annotated[str, typer.Option(help="int8, or float: leave the linear layers as they are.")] = "int8",
    weights: Annotated[
        int, typer.Option(help="Bits of their weights: 8, or 7, faster on x86 processors without VNNI.")
    ] = 8,
    embeddings: Annotated[str, typer.Option(help="int8, or float: leave the tables as they are.")] = "int8",
    sequences: Annotated[int, typer.Option(help="Rows of train that steps are found on.")] = 256,
    seed: Annotated[int, typer.Option(help="Which rows.")] = 0,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row; the task's own by default.")] = None,
    parts: Annotated[bool, typer.Option(help="Measure each layer quantised alone, too.")] = True,
) -> None:
    """Turn a model into integers and say what that costs: score, size, latency, layer by layer."""
    from inhibitor.data.tasks import get_task

    get_task(task)

    from inhibitor.cli import quiet
    from inhibitor.quantization.run import QuantizeConfig
    from inhibitor.quantization.run import run as quantize

    config = QuantizeConfig.parse(
        {
            "model": model,
            "task": task,
            "output": output,
            "data": data,
            "int8": {"attention": attention, "linear": linear, "weights": weights, "embeddings": embeddings},
            "sequences": sequences,
            "seed": seed,
            "max_length": max_length,
            "parts": parts,
        },
        source="quantize",
    )
    quiet()
    quantize(config)
    _show(config.output)


def _show(run: Path) -> None:
    """Print a finished run's tables and write its page."""
    from rich.console import Console

    from inhibitor.report import to_rich, write_report
    from inhibitor.report.integers import tables
    from inhibitor.report.records import read_runs
    from inhibitor.runs import MODEL, REPORT

    console = Console()
    (folder,) = read_runs([run]).quantizations
    for table in tables(folder.metrics):
        console.print(to_rich(table))
    typer.echo(f"Model: {run / MODEL}\nReport: {write_report([run], run / REPORT)}")
