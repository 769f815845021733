"""Floor 5, the user's room: one file per verb."""

import sys

import typer

from inhibitor.errors import InhibitorError

app = typer.Typer(
    name="inhibitor",
    help="Inhibitor attention for pretrained transformers: convert, distil, fine-tune, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run the command line; an error of ours is one sentence and exit status 2."""
    from inhibitor.cli import convert, distill, evaluate, finetune, info, report

    for verb in (convert, distill, finetune, evaluate, report, info):
        app.command(name=verb.NAME)(verb.run)
    try:
        app()
    except InhibitorError as error:
        print(f"inhibitor: {error}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """Leave the terminal to what the user asked for: no load reports, no bars but our own."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
