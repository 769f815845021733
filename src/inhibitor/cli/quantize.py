"""``inhibitor quantize``: a fine-tuned float student in, an int8 model and its report out."""

from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "quantize"


def run(
    model: Annotated[str, typer.Argument(help="A folder that finetune or distill wrote: an inhibitor classifier.")],
    task: Annotated[str, typer.Option(help="A GLUE task, imdb or reviews: to find steps on, and to score.")],
    output: Annotated[Path, typer.Option(help="The run's folder; the model goes into model/ there.")],
    data: Annotated[Path | None, typer.Option(help="Folder in the hub's layout; the hub itself by default.")] = None,
    attention: Annotated[int, typer.Option(help="Bits of the attention: 8, or 6 or 4 for research.")] = 8,
    linear: Annotated[str, typer.Option(help="int8, or float: leave the linear layers as they are.")] = "int8",
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
            "int8": {"attention": attention, "linear": linear, "embeddings": embeddings},
            "sequences": sequences,
            "seed": seed,
            "max_length": max_length,
            "parts": parts,
        },
        source="quantize",
    )
    quiet()
    _show(quantize(config), output)


def _show(metrics: dict[str, Any], output: Path) -> None:
    from rich.console import Console

    from inhibitor.report.tables import MISSING, Table, number, to_rich
    from inhibitor.runs import METRICS, MODEL

    console = Console()
    before, after = metrics["scores_before"], metrics["scores"]
    rows = []
    for split, measured in after.items():
        for metric, value in measured.items():
            given = before[split][metric]
            kept = number(100 * value / given, 2) if given else MISSING
            rows.append([f"{metric}, {split}, ×100", number(100 * given, 2), number(100 * value, 2), kept])
    size = metrics["bytes"]
    share = number(100 * size["after"] / size["before"])
    rows.append(["weights, MB", *(number(size[side] / 1e6) for side in ("before", "after")), share])
    for entry in metrics["latency"]:
        medians = [number(1e3 * entry[side]["median"]) for side in ("before", "after")]
        rows.append([f"{entry['batch']}×{entry['length']} tokens, ms", *medians, number(100 * entry["ratio"])])
    notes = [
        f"Change of the logits: {metrics['sqnr']:.1f} dB below them.",
        f"Times on {metrics['machine']['threads']} threads of {metrics['machine']['cpu']}; last column: the "
        "median of the rounds' ratios.",
    ]
    title = f"{metrics['model']} on {metrics['task']}"
    console.print(to_rich(Table(title, ["", "before", "after", "after ÷ before, %"], rows, notes)))
    if metrics["parts"]:
        alone = [[part["part"], number(100 * part["score"], 2), number(part["sqnr"], 1)] for part in metrics["parts"]]
        console.print(to_rich(Table("Each part alone in integers", ["", "score ×100", "logits, dB"], alone)))
    console.print(f"Model: {output / MODEL}\nReport: {output / METRICS}", soft_wrap=True)
