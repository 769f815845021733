"""``inhibitor report``: tables on the terminal and one HTML page about any finished runs."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "report"


def run(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Compare finished runs: teacher and student, float and integers side by side."""
    from rich.console import Console

    from inhibitor.report import summarise, to_rich, write_report

    console = Console()
    for table in summarise(runs):
        console.print(to_rich(table))
    typer.echo(f"Report: {write_report(runs, output)}")
