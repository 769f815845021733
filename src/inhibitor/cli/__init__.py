"""Floor 5, the user's room: one file per verb."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from inhibitor.errors import InhibitorError, Interrupted

app = typer.Typer(
    name="inhibitor",
    help="Inhibitor attention for pretrained transformers: convert, distil, fine-tune, measure.",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from inhibitor import __version__

        typer.echo(f"inhibitor {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line.

    Exit status 2 is an error of ours or of a file's, in one sentence: something that cannot be used, or training that
    cannot go on (no memory, no disk space, a NaN). 143 and 130 are SIGTERM and Ctrl-C; during training the sentence
    then names the checkpoint that the same command goes on from.
    """
    try:
        from inhibitor.cli import (
            bench,
            convert,
            count,
            distill,
            evaluate,
            finetune,
            info,
            publish,
            quantize,
            report,
            reproduce,
        )

        for verb in (convert, distill, finetune, evaluate, quantize, reproduce, publish, report, count, info):
            app.command(name=verb.NAME)(verb.run)
        app.add_typer(bench.app, name=bench.NAME)
        app()
    except InhibitorError as error:
        print(f"inhibitor: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        said = error if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"inhibitor: {said}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"inhibitor: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:  # before typer, which does the same, has begun
        sys.exit(130)


def show(run: Path) -> None:
    """Print a finished run's table and write its page; with several processes, once."""
    from rich.console import Console

    from inhibitor.report import summarise, to_rich, write_report
    from inhibitor.runs import REPORT
    from inhibitor.training import processes

    if processes().is_main_process:
        console = Console()
        for table in summarise([run]):
            console.print(to_rich(table))
        typer.echo(f"Report: {write_report([run], run / REPORT)}")


def quiet() -> None:
    """Leave the terminal to what the user asked for: no load reports, no bars but our own."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
