"""``inhibitor distill``: run a recipe."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "distill"


def run(
    config: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example stages.0.tokens=100000.")
    ] = None,
) -> None:
    """Distil a teacher into an inhibitor student. An interrupted run goes on when it is started again."""
    from inhibitor.distill.recipe import DistillConfig

    recipe = DistillConfig.load(config, overrides or [])

    from rich.console import Console

    from inhibitor.cli import quiet
    from inhibitor.distill.run import distill
    from inhibitor.report import summarise, to_rich, write_report
    from inhibitor.runs import REPORT

    quiet()
    distill(recipe)
    console = Console()
    console.print(to_rich(summarise([recipe.output])))
    console.print(f"Report: {write_report([recipe.output], recipe.output / REPORT)}", soft_wrap=True)
