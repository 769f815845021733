"""The tables as files: JSON, Markdown, LaTeX and one HTML page, all made of ``accuracy.jsonl``.

The page also shows what students get wrong and their teachers right, from the predictions of those runs that are there.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inhibitor.report.curve import curve_figure
from inhibitor.report.disagreement import Pair, disagreements
from inhibitor.report.page import PAGE, Svg, section
from inhibitor.report.tables import Table, plain, to_html, to_markdown
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.curve import Point, curve_lines, curve_table, points
from inhibitor.reproduce.plan import final
from inhibitor.reproduce.tables import LABELS, as_json, tables
from inhibitor.runs import CONFIG, VERSIONS, versions, write_text

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
    found = [*tables(records), *([curve_table(curve)] if curve else [])]
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


def _page(records: Sequence[Record], found: Sequence[Table], folder: Path, curve: Sequence[Point]) -> str:
    svg = Svg()
    caption = "E1's students, each distilled on another amount of text; the teacher is 100."
    picture = svg.figure(curve_figure(curve_lines(curve)), caption) if curve else ""
    texts = "".join(
        f"<h3>{name}</h3><pre>{html.escape(_lines(folder / name))}</pre>"
        for name in (CONFIG, VERSIONS)
        if (folder / name).is_file()
    )
    return PAGE.substitute(
        title=TITLE,
        colours=svg.colours() if curve else "",
        summary="",
        tables="\n".join(map(to_html, found)),
        sections=f"{picture}\n{section(disagreements(_pairs(records, folder)))}",
        details=f"<details><summary>The grid</summary>{texts}</details>",
        version=html.escape(versions()["inhibitor"]),
    )


def _lines(path: Path) -> str:
    return "\n".join(map(plain, path.read_text(encoding="utf-8").strip().splitlines()))
