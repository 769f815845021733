"""``inhibitor publish``: a distilled student as a small folder with a model card."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "publish"


def run(
    student: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run of inhibitor distill, on text.")],
    output: Annotated[Path, typer.Option(help="The folder to write; a new or empty one.")],
    scores: Annotated[
        Path | None, typer.Option(help="An accuracy.jsonl of inhibitor reproduce, for the model card.")
    ] = None,
) -> None:
    """Write a student as its difference from the teacher, in bfloat16, with a model card."""
    from inhibitor.cli import quiet
    from inhibitor.config import user_path
    from inhibitor.publish import publish

    quiet()
    done = publish(student, user_path(output), scores and user_path(scores))
    typer.echo(
        f"{done.folder}: {done.size / 1e6:.1f} MB; rounding changes the last hidden states by {done.rounding:.1e}."
    )
    typer.echo(f"Left to the teacher: {', '.join(done.equal) or 'nothing'}.")
