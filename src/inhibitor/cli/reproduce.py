"""``inhibitor reproduce``: the paper's experiments on tasks and seeds, and its tables."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "reproduce"


def run(
    config: Annotated[Path, typer.Argument(help="A YAML recipe, for example recipes/reproduce-minilm.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example tasks=\\[cola] seeds=\\[0] processes=2.")
    ] = None,
) -> None:
    """Run what is not finished of the grid, and write its tables. Exit status 1 where a run failed."""
    from inhibitor.reproduce.recipe import ReproduceConfig

    recipe = ReproduceConfig.load(config, overrides or [])

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from inhibitor.cli import quiet
    from inhibitor.report import to_rich
    from inhibitor.report.tables import duration
    from inhibitor.reproduce.curve import read_others
    from inhibitor.reproduce.grid import Standing, reproduce
    from inhibitor.reproduce.output import write_results
    from inhibitor.reproduce.tables import tables

    quiet()
    others = read_others(recipe.curve)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    told = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None, visible=False)

        def watch(standing: Standing) -> None:
            nonlocal told
            for failure in standing.failures[told:]:
                progress.console.print(escape(f"{failure.name}: {failure.reason}"))
            told = len(standing.failures)
            parts = [f"{len(standing.running)} running", *([f"{told} failed"] if told else [])]
            parts += [f"best of {standing.best}"] if standing.best else []
            parts += [] if standing.seconds_left is None else [f"about {duration(standing.seconds_left)} left"]
            parts += standing.running[:1]
            said = escape(" · ".join(parts))
            progress.update(bar, description=said, completed=standing.done, total=standing.total, visible=True)

        outcome = reproduce(recipe, str(config), watch)

    console = Console()
    for table in tables(outcome.records):
        console.print(to_rich(table))
    for path in write_results(outcome.records, recipe.output, others) if outcome.records else []:
        typer.echo(f"Results: {path}")
    for failure in outcome.failures:
        typer.echo(f"inhibitor: {failure.name}: {failure.reason}", err=True)
    if outcome.failures:
        raise typer.Exit(1)
