"""The tables as files: JSON, Markdown, LaTeX and one HTML page, all made of ``accuracy.jsonl``.

Of those runs that are there, they tell how many rows were cut or are in train too, and the page shows what students
get wrong and their teachers right.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inhibitor import __version__
from inhibitor.errors import RunError
from inhibitor.report.curve import curve_figure
from inhibitor.report.disagreement import Pair, disagreements
from inhibitor.report.page import PAGE, Svg, details, section
from inhibitor.report.records import Scored, read_runs
from inhibitor.report.results import cautions
from inhibitor.report.tables import Table, to_html, to_markdown
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.curve import Point, curve_lines, curve_table, points
from inhibitor.reproduce.plan import final
from inhibitor.reproduce.tables import LABELS, as_json, columns, tables
from inhibitor.runs import CONFIG, VERSIONS, Run, write_text

RESULTS = "results"
TITLE = "The paper's experiments, reproduced"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"±": r"$\pm$", "×": r"$\times$", "÷": r"$\div$"} | {character: f"\\{character}" for character in "&%$#_{}"}


def write_results(records: Sequence[Record], folder: Path, others: Sequence[Sequence[Record]] = ()) -> list[Path]:
    """Write ``results.json``, ``.md``, ``.tex`` and ``.html`` into the grid's folder; the paths in this order.

    Args:
        records: The grid's.
        folder: The grid's.
        others: Those of grids with other students, for the curve of retention against tokens.
    """
    curve = points([records, *others]) if others else []
    found = [*tables(records, _cautions(records, folder)), *([curve_table(curve)] if curve else [])]
    texts = {
        "json": json.dumps(as_json(records) | _as_json(curve), indent=2, ensure_ascii=False) + "\n",
        "md": "\n".join([f"# {TITLE}\n", *map(to_markdown, found)]),
        "tex": "% \\usepackage{booktabs}\n" + "\n".join(map(to_latex, found)),
        "html": _page(records, found, folder, curve),
    }
    for suffix, text in texts.items():
        write_text(folder / f"{RESULTS}.{suffix}", text)
    return [folder / f"{RESULTS}.{suffix}" for suffix in texts]


def to_latex(table: Table) -> str:
    """The table for LaTeX with the package ``booktabs``."""

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(map(_latex, cells)) + r" \\"

    alignment = "l" * table.labels + "r" * (len(table.columns) - table.labels)
    notes = " ".join(map(_latex, table.notes))
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{_latex(table.title)}. {notes}}}",
            f"  \\begin{{tabular}}{{{alignment}}}",
            r"    \toprule",
            line(table.columns),
            r"    \midrule",
            *map(line, table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex(text: str) -> str:
    return re.sub(r"[\\~^±×÷&%$#_{}]", lambda found: _LATEX[found[0]], text)


def _as_json(curve: Sequence[Point]) -> dict[str, Any]:
    return {"curve": [{"tokens": point.tokens, "scores": dict(point.scores)} for point in curve]} if curve else {}


def _pairs(records: Sequence[Record], folder: Path) -> list[Pair]:
    """The runs of each experiment with that of the teacher, of the same task and seed."""
    return [
        Pair(
            record.task,
            LABELS[record.experiment],
            record.seed,
            folder / final("e0", record.task, record.seed),
            folder / final(record.experiment, record.task, record.seed),
        )
        for record in sorted(records, key=lambda record: record.key)
        if record.experiment != "e0"
    ]


def _cautions(records: Sequence[Record], folder: Path) -> list[str]:
    """What to know of each task's rows, from its first run that is there."""
    found = []
    for column in columns(records):
        every = [record for runs in column.records.values() for record in runs]
        paths = [folder / final(record.experiment, record.task, record.seed) for record in every]
        for there in [path for path in paths if Run(path).finished][:1]:
            try:
                runs = read_runs([there])
            except RunError:  # damaged since: its record stands
                continue
            measured: list[Scored] = [run.metrics for run in runs.finetunings]
            measured += [one for run in runs.distillations for one in run.metrics.scored(run.metrics.states[-1].scores)]
            found += [f"{column.name}: {caution}" for scored in measured for caution in cautions(scored)]
    return found


def _page(records: Sequence[Record], found: Sequence[Table], folder: Path, curve: Sequence[Point]) -> str:
    svg = Svg()
    caption = "E1's students, each distilled on another amount of text; the teacher is 100."
    picture = svg.figure(curve_figure(curve_lines(curve)), caption) if curve else ""
    files = [folder / name for name in (CONFIG, VERSIONS) if (folder / name).is_file()]
    return PAGE.substitute(
        title=TITLE,
        colours=svg.colours() if curve else "",
        summary="",
        tables="\n".join(map(to_html, found)),
        sections=f"{picture}\n{section(disagreements(_pairs(records, folder)))}",
        details=details("The grid", {path.name: path.read_text(encoding="utf-8") for path in files}),
        version=html.escape(__version__),
    )
