"""``inhibitor count``: operations, bit widths and modelled energy of attention, as softmax, inhibitor and integers."""

from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "count"


def run(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id or minilm; softmax or inhibitor.")],
    length: Annotated[int, typer.Option(help="Tokens of the input.")] = 128,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write as well.")] = None,
) -> None:
    """Count a model's operations per token, and what their arithmetic would cost in energy: a model, no measurement."""
    import json

    from inhibitor.cli import quiet
    from inhibitor.config import user_path
    from inhibitor.quantization.count import count
    from inhibitor.runs import write_text

    quiet()
    if output is not None:
        output = user_path(output)
        output.parent.mkdir(parents=True, exist_ok=True)  # now, not after the counting
    counted = count(model, length)
    _show(counted)
    if output is not None:
        write_text(output, json.dumps(counted, indent=2, ensure_ascii=False) + "\n")


def _show(counted: dict[str, Any]) -> None:
    from rich.console import Console

    from inhibitor.report.tables import MISSING, Table, number, to_rich

    console = Console()
    forms = list(counted["attention"])
    kinds = list(counted["attention"][forms[0]])
    rows = [[kind, *(f"{counted['attention'][form][kind]:,}" for form in forms)] for kind in kinds]
    title = f"{counted['model']}: attention of all layers, operations per token at {counted['length']} tokens"
    linear = " and ".join(f"{number:,} {kind}" for kind, number in counted["linear"].items() if number)
    console.print(
        to_rich(Table(title, ["", *forms], rows, [f"The linear layers take {linear} per token, in each form."]))
    )

    rows = [
        [f"{what}, {process}", *(number(energies[form]) for form in forms)]
        for process, parts in counted["energy"].items()
        for what, energies in parts.items()
    ]
    notes = [
        "A model, no measurement: published energies of single operations times the counts above, memory left out.",
        *(f"{process}: {source}." for process, source in counted["sources"].items()),
        f"Measured, in time: {number(counted['milliseconds'])} ms for such an input, by the model as it is saved.",
    ]
    title = f"Modelled energy of an input of {counted['length']} tokens, in µJ"
    console.print(to_rich(Table(title, ["", *forms], rows, notes)))

    seen = counted["bits_seen"]
    rows = [[name, str(bits), str(seen.get(name, MISSING))] for name, bits in counted["bits"].items()]
    note = "Seen on shipped reviews." if seen else "Nothing was seen: the model has softmax attention."
    console.print(to_rich(Table("Bits of the integer form", ["", "at worst", "seen"], rows, [note])))
