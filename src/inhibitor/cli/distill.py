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

    from inhibitor.cli import quiet, show
    from inhibitor.distill.run import distill

    quiet()
    distill(recipe)
    show(recipe.output)
