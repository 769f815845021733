"""The picture of retention against tokens of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from inhibitor.report.look import COLOURS, INK, labelled, style
from inhibitor.report.tables import number

MARKERS = "os^vPXd<>*"


def curve_figure(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Retention against tokens: a line for each task, and a thick one for "together"."""
    with style():
        figure = Figure(figsize=(7, 3.5))
        axis = figure.subplots()
        for place, (name, points) in enumerate(lines.items()):
            look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            look |= {"color": INK, "marker": "o", "lw": 2.5} if name == "together" else {"lw": 1}
            axis.plot([tokens for tokens, _ in points], [kept for _, kept in points], label=name, **look)
        axis.axhline(100, color=INK, lw=0.8, ls=":")
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        if ticks[:1] == [0]:  # a student before any training
            axis.set_xscale("symlog", linthresh=next(filter(None, ticks), 1))
        else:
            axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{number(tokens / 1e6)} M"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        labelled(axis, "E1: retention against tokens of text", "tokens of text", "retention, per cent")
        axis.set_xticks(ticks)
        figure.legend(loc="outside right upper")
    return figure
