"""One plain table, and how it is shown in a terminal, in Markdown and in HTML."""

import html
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod
from rich.text import Text

MISSING = "-"
_NUMBER = re.compile(r"-|[-+]?[0-9.]{1,20}(e[-+][0-9]{1,4})?( ± [0-9.]{1,20})?|[-+]?(nan|inf)")


@dataclass(frozen=True)
class Table:
    """A titled grid of text: the first ``labels`` columns are words, the others numbers.

    Whatever was put in, the cells hold no control characters (which a terminal would obey) and no text that a
    spreadsheet would take for a formula.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    labels: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", plain(self.title))
        object.__setattr__(self, "columns", tuple(_cell(text) for text in self.columns))
        object.__setattr__(self, "rows", tuple(tuple(_cell(text) for text in row) for row in self.rows))
        object.__setattr__(self, "notes", tuple(plain(note) for note in self.notes))


def plain(text: str) -> str:
    r"""One line that shows every control character instead of obeying it.

    Example:
        >>> plain("red \x1b[31m alert")
        'red \\x1b[31m alert'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cell(text: str) -> str:
    text = plain(text)
    return f"'{text}" if text[:1] in "=+-@" and text and not _NUMBER.fullmatch(text) else text


def number(values: float | Sequence[float], digits: int | None = None) -> str:
    """A number, or the mean ± sample standard deviation of several, to three figures or to ``digits`` decimals.

    Example:
        >>> number(0.15732), number([90.0, 91.0], digits=1), number([])
        ('0.157', '90.5 ± 0.7', '-')
    """
    values = [values] if isinstance(values, int | float) else values
    if not values:
        return MISSING
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return str(mean)
    form = f".{digits}f"
    if digits is None:
        tiny_or_huge = mean != 0 and not 1e-4 <= abs(mean) < 1e6
        form = ".2e" if tiny_or_huge else f".{max(0, 2 - math.floor(math.log10(abs(mean))))}f" if mean else ".0f"
    return f"{mean:{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> duration(50), duration(600), duration(9000)
        ('50 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def per_cent(value: float | None) -> str:
    """A retention as the tables print it."""
    return MISSING if value is None else number(value, 1)


def span(counts: Iterable[int]) -> str:
    """The least and the greatest, or the one where all are equal.

    Example:
        >>> span([3, 2, 5]), span([3, 3])
        ('2 to 5', '3')
    """
    ordered = sorted(counts)
    return " to ".join(dict.fromkeys(map(str, ordered[:1] + ordered[-1:])))


def to_rich(table: Table) -> Group:
    """The table for a terminal, ``rich.print(to_rich(table))``: title and notes may be wider than the table itself."""
    shown = rich.table.Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.columns):
        justify: JustifyMethod = "left" if index < table.labels else "right"
        shown.add_column(Text(name.replace(" ", "\n")), justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    notes = [*table.notes, ""] if table.notes else []
    return Group(Text(table.title, style="bold"), shown, *map(Text, notes))


def to_markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = [":--" if index < table.labels else "--:" for index in range(len(table.columns))]
    body = [line(list(map(_markdown, row))) for row in table.rows]
    head = [f"**{_markdown(table.title)}**", "", line(list(map(_markdown, table.columns))), line(rule), *body]
    return "\n".join([*head, *(part for note in table.notes for part in ("", _markdown(note)))]) + "\n"


def to_html(table: Table) -> str:
    """The table as an HTML fragment: ``<table>`` with a caption, then its notes."""

    def line(cells: Sequence[str], tags: Sequence[str]) -> str:
        shown = (f"<{tag}>{html.escape(cell)}</{tag[:2]}>" for tag, cell in zip(tags, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    count = len(table.columns)
    label = ['class="label"' if index < table.labels else "" for index in range(count)]
    head = line(table.columns, [f'th scope="col" {name}'.rstrip() for name in label])
    tags = ['th scope="row"', *(f"td {name}".rstrip() for name in label[1:])]
    rows = "\n".join(line(row, tags) for row in table.rows)
    notes = "".join(f'\n<p class="note">{html.escape(note)}</p>' for note in table.notes)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}\n<thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>{notes}'


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", text)
