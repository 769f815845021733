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
    """Errors by position and by length of the sequence, a line for each layer; None where neither was measured."""
    state, panels = metrics.states[-1], []
    if state.positions and (errors := state.positions.context_error):
        layers = metrics.student.layers if len(metrics.student.layers) == len(errors) else range(len(errors))
        panels.append(("context error by position", "position of the query", state.positions.first, layers, errors))
    if state.lengths and (errors := state.lengths.hidden_error):
        title, axis_label = "hidden states' error by length", "tokens of the sequence"
        panels.append((title, axis_label, state.lengths.first, range(len(errors)), errors))
    if not panels:
        return None
    figure = Figure(figsize=(9, 3.1))
    axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    shown = sorted({layer for *_, layers, _ in panels for layer in layers})
    colours = layer_colours(shown)
    for axis, (title, what, first, layers, errors) in zip(axes, panels, strict=True):
        for layer, values in zip(layers, errors, strict=True):
            axis.plot(range(len(values)), values, color=colours[layer], marker="o", markersize=3.5)
        axis.set_xticks(range(len(first)), _intervals(first), rotation=30, ha="right", rotation_mode="anchor")
        axis.grid(visible=False, axis="x")
        labelled(axis, title, what, "relative squared error")
        limits(axis, [error for values in errors for error in values])
    layer_bar(figure, axes, shown)
    return figure


def _intervals(first: Sequence[int]) -> list[str]:
    """Names of intervals, each of which ends where the next one of twice its length begins."""
    ends = [max(1, 2 * start) - 1 for start in first[:-1]]
    names = [str(start) if end <= start else f"{start}–{end}" for start, end in zip(first, ends, strict=False)]
    return [*names, f"{first[-1]} and on"]


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
