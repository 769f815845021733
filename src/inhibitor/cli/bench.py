"""``inhibitor bench``: how fast the operator is."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "bench"
app = typer.Typer(
    help="Measure speed on this machine; every result is checked before it is timed.", no_args_is_help=True
)


@app.command("attention")
def attention(
    output: Annotated[Path, typer.Option(help="The JSON file to write; the picture goes beside it as .png.")] = Path(
        "runs/bench/attention.json"
    ),
    shapes: Annotated[
        str,
        typer.Option(
            help="Parted by commas: BATCHxHEADSxLENGTHxHEAD_DIM, 1x12x1:8192x64 for one query and 8192 keys, +masks "
            "behind a shape to time padding and causal as well. A set from 1x1x8x32 to 1x12x8192x64 by default."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Short shapes and few rounds: a look, not a result.")] = False,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads; its own choice by default.")] = None,
    time_limit: Annotated[float, typer.Option(help="Skip what would take more seconds in one call.")] = 20.0,
    memory_limit: Annotated[float, typer.Option(help="Skip what would hold more GiB of dense tensors.")] = 8.0,
    limit: Annotated[
        float | None,
        typer.Option(
            help="What this machine's arithmetic allows the AVX-512 kernel, in 10⁹ elements per second; adds its share "
            "of it. The forward pass takes 4 vector instructions per 16 elements, so with two ports for vectors of 16 "
            "floats this is threads × GHz × 8. Measure the clock under that load."
        ),
    ] = None,
) -> None:
    """Time inhibitor attention beside softmax attention: forward, backward, decoding, masks, short calls."""
    from inhibitor.bench.attention import AttentionBench
    from inhibitor.config import user_path

    output = user_path(output)
    config = AttentionBench.parse(
        {
            "output": output,
            "shapes": tuple(shapes.split(",")) if shapes else (),
            "quick": quick,
            "threads": threads,
            "time_limit": time_limit,
            "memory_limit": memory_limit,
            "limit": limit,
        },
        source="bench attention",
    )

    import json

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from inhibitor.bench.attention import run
    from inhibitor.report import to_rich
    from inhibitor.report.plots import speed_figure, to_png
    from inhibitor.report.speed import speed_tables
    from inhibitor.runs import write_bytes, write_text

    output.parent.mkdir(parents=True, exist_ok=True)  # now, not after the measurement
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=config.steps)
        results = run(config, lambda what, steps: progress.update(bar, description=what, advance=steps))

    write_text(output, json.dumps(results.to_json(), indent=2, ensure_ascii=False) + "\n")
    console = Console()
    for table in speed_tables(results):
        console.print(to_rich(table))
    typer.echo(f"Results: {output}")
    if figure := speed_figure(results.measurements):
        write_bytes(output.with_suffix(".png"), to_png(figure))
        typer.echo(f"Picture: {output.with_suffix('.png')}")
