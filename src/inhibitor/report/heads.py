"""Where a student differs from its teacher: maps of layers and heads, and the error along the sequence."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from inhibitor.report.look import labelled, layer_bar, layer_colours, limits
from inhibitor.report.records import Distill, Matrix

TITLES = {
    "context_error": "context error",
    "output_error": "output error",
    "inhibited": "inhibited value entries",
    "teacher_keys": "teacher: effective keys",
    "keys": "student: effective keys",
}
COLUMNS = 3
SHOWN = 8  # ticks along an axis, at most


def heads_figure(metrics: Distill) -> Figure | None:
    """A map for each quantity, a row for each layer; None where no state was looked at head by head."""
    heads = metrics.states[-1].heads
    panels = {name: values for name in TITLES if heads and (values := getattr(heads, name))}
    if not panels:
        return None
    layers = metrics.student.layers
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(9, rows * (1.2 + 0.15 * min(max(map(len, panels.values())), 16))))
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    keys = [value for name in ("keys", "teacher_keys") for row in panels.get(name, []) for value in row]
    for axis, (name, values) in zip(axes, panels.items(), strict=False):
        top = max(keys) if name.endswith("keys") else 1 if name == "inhibited" else max(map(max, values))
        _map(figure, axis, values, Normalize(0, top), TITLES[name])
        if name == "inhibited":
            figure.axes[-1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_yticks(*_ticks(layers if len(layers) == len(values) else range(len(values))))
        axis.set_xticks(*_ticks(range(len(values[0]))))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def positions_figure(metrics: Distill) -> Figure | None:
    """The context error by position, a line for each layer; None where it was not measured."""
    positions = metrics.states[-1].positions
    if positions is None or not positions.context_error:
        return None
    figure = Figure(figsize=(9, 3.1))
    axis = figure.subplots()
    layers = metrics.student.layers
    shown = layers if len(layers) == len(positions.context_error) else list(range(len(positions.context_error)))
    for colour, errors in zip(layer_colours(shown).values(), positions.context_error, strict=True):
        axis.plot(range(len(errors)), errors, color=colour, marker="o", markersize=3.5)
    names = [
        str(first) if last <= first + 1 else f"{first}–{last - 1}"
        for first, last in zip(positions.first, positions.first[1:], strict=False)
    ]
    axis.set_xticks(range(len(positions.first)), [*names, f"{positions.first[-1]} and on"])
    axis.grid(visible=False, axis="x")
    labelled(axis, "context error by position of the query", "position in the sequence", "relative squared error")
    limits(axis, [error for errors in positions.context_error for error in errors])
    layer_bar(figure, [axis], shown)
    return figure


def _map(figure: Figure, axis: Axes, values: Matrix, norm: Normalize, title: str) -> None:
    image = axis.imshow(values, cmap="Blues", norm=norm, aspect="auto")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    labelled(axis, title, "head", "layer")
    bar = figure.colorbar(image, ax=axis, aspect=14, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.outline.set_visible(False)


def _ticks(labels: Sequence[int]) -> tuple[list[int], list[str]]:
    """Places and names of at most ``SHOWN`` labels."""
    places = list(range(0, len(labels), -(-len(labels) // SHOWN)))
    return places, [str(labels[place]) for place in places]
