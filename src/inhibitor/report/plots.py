"""The pictures: loss curves, errors per layer, parameters, what a head attends to, and time against length."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from inhibitor.bench.results import Measurement
from inhibitor.report.records import Attention, Distill, Finetune
from inhibitor.report.results import STATES, TASKS
from inhibitor.report.tables import plain

INK, FAINT = "#22262e", "#d9dce2"
# Okabe and Ito's colour-blind-safe hues, in the order in which the recipe's states appear.
COLOURS = ("#8a8f98", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
MARKERS = "osD^vP"
STATE_COLOURS = dict(zip(("teacher", *STATES.values()), (INK, *COLOURS), strict=False))
LONGEST = 14  # characters of a token that are shown
PARAMETERS = {
    "gamma": "score scale γ",
    "eta": "output scale η",
    "delta": "shift δ",
    "length_exponent": "length exponent ρ",
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a token is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "svg.hashsalt": "inhibitor",
    "image.interpolation": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """The one look of every picture; a token that the font lacks is shown as a box, without a warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_png(figure: Figure) -> bytes:
    """The picture on white at 150 dots per inch."""
    return _saved(figure, format="png", dpi=150)


def to_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element without background, metadata or references to elsewhere."""
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _saved(figure, format="svg", transparent=True, metadata=nothing).decode()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    return re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"|<!--.*?-->\s*', "", text, flags=re.DOTALL)


def distill_figures(metrics: Distill) -> dict[str, Figure]:
    """The pictures of one distillation by file name; what was not measured has none."""
    with style():
        figures = {
            "curves.png": _distill_curves(metrics),
            "context_error.png": _errors(metrics),
            "parameters.png": _parameters(metrics),
            "attention.png": _attention(metrics.attention) if metrics.attention else None,
        }
    return {name: figure for name, figure in figures.items() if figure}


def finetune_figure(runs: Mapping[str, Sequence[Finetune]]) -> Figure | None:
    """Loss by step and score by epoch of one task: one colour per label, one line per run."""
    every = [metrics for group in runs.values() for metrics in group]
    there = {"loss": any(m.history for m in every), "score": any(m.headline_by_epoch() for m in every)}
    panels = [name for name in there if there[name]]
    if not panels:
        return None
    with style():
        figure = Figure(figsize=(9, 3))
        axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
        others = itertools.cycle(COLOURS[2:])
        for label, group in runs.items():
            colour = STATE_COLOURS.get(label) or next(others)
            marker = MARKERS[COLOURS.index(colour)] if colour in COLOURS else "*"
            for metrics in group:
                if loss := axes.get("loss"):
                    loss.plot([s.step for s in metrics.history], [s.loss for s in metrics.history], color=colour, lw=1)
                if score := axes.get("score"):
                    points = metrics.headline_by_epoch()
                    score.plot([e for e, _ in points], [100 * v for _, v in points], color=colour, marker=marker)
            next(iter(axes.values())).lines[-1].set_label(plain(label))
        if loss := axes.get("loss"):
            _labelled(loss, "fine-tuning loss", "step", "loss")
            _limits(loss, [step.loss for metrics in every for step in metrics.history])
        if score := axes.get("score"):
            task = plain(TASKS.get(every[0].task, every[0].task))
            _labelled(score, f"{task} score", "epoch", f"{plain(every[0].headline_metric())} × 100")
            score.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(runs), 4))
        return figure


def speed_figure(measurements: Sequence[Measurement]) -> Figure | None:
    """Time of the forward pass against length, for the batch, heads and head_dim with most lengths; None without."""
    series: dict[tuple[int, int, int], list[Measurement]] = {}
    for m in measurements:
        if m.direction == "forward" and m.mask == "none" and m.queries == m.keys and not m.delta:
            series.setdefault((m.batch, m.heads, m.head_dim), []).append(m)
    if not series:
        return None
    (batch, heads, head_dim), shown = max(series.items(), key=lambda item: len({m.queries for m in item[1]}))
    names = list(dict.fromkeys(m.implementation for m in sorted(shown, key=lambda m: m.family)))
    looks = {
        "inhibitor": itertools.cycle((colour, "-") for colour in COLOURS[1:]),
        "softmax": itertools.cycle(((INK, "--"), (INK, ":"), (COLOURS[0], "--"))),
    }
    with style():
        figure = Figure(figsize=(9, 4.2))
        axis = figure.subplots()
        for name, marker in zip(names, itertools.cycle("osD^vPX*"), strict=False):
            points = sorted({m.queries: m.median_ms for m in shown if m.implementation == name}.items())
            family = next(m.family for m in shown if m.implementation == name)
            colour, line = next(looks[family])
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=plain(name))
        lengths = sorted({m.queries for m in shown})
        title = f"forward pass: batch {batch}, {heads} heads, head_dim {head_dim}"
        _labelled(axis, title, "length (queries = keys)", "milliseconds")
        _limits(axis, [m.median_ms for m in shown])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside right upper")
        return figure


def _distill_curves(metrics: Distill) -> Figure | None:
    stages = [stage for stage in metrics.stages if stage.history]
    if not stages:
        return None
    figure = Figure(figsize=(9, 3))
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        layers = sorted({step.layer for step in stage.history if step.layer is not None})
        for layer in [*layers, None]:
            points = [(step.step, step.loss) for step in stage.history if step.layer == layer]
            if points:
                colour = _layer_colours(len(layers))[layers.index(layer)] if layer is not None else COLOURS[2]
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.2)
        _labelled(axis, STATES.get(stage.name, plain(stage.name)).removeprefix("after "), "step", "loss")
        _limits(axis, [step.loss for step in stage.history])
        if layers:
            _layer_bar(figure, axis, layers)
    return figure


def _layer_colours(count: int) -> list[Any]:
    colours = mpl.colormaps["viridis"]
    return [colours(0.1 + 0.8 * index / max(count - 1, 1)) for index in range(count)]


def _layer_bar(figure: Figure, axis: Axes, layers: Sequence[int]) -> None:
    """Which colour is which layer, beside the lines and never over them."""
    count = len(layers)
    norm = BoundaryNorm([index - 0.5 for index in range(count + 1)], count)
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(_layer_colours(count))), ax=axis, aspect=25, pad=0.02, ticks=range(count)
    )
    bar.ax.set_yticklabels([str(layer) for layer in layers], fontsize=7)
    bar.ax.tick_params(which="both", length=0)
    bar.ax.set_title("layer", fontsize=8, fontweight="normal", loc="left")
    bar.outline.set_visible(False)


def _errors(metrics: Distill) -> Figure:
    figure = Figure(figsize=(9, 3.2))
    for axis, (name, title) in zip(
        figure.subplots(1, 2),
        {"context_error": "context vectors", "hidden_error": "hidden states"}.items(),
        strict=True,
    ):
        everything = [value for state in metrics.states for value in getattr(state, name)]
        for index, state in enumerate(metrics.states):
            values = getattr(state, name)
            axis.plot(
                range(len(values)),
                values,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                label=plain(STATES.get(state.name, f"after {state.name}")),
            )
        _layer_axis(axis, metrics, len(getattr(metrics.states[0], name)))
        _labelled(axis, title, "layer", "relative squared error")
        _limits(axis, everything)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 5))
    return figure


def _parameters(metrics: Distill) -> Figure | None:
    if not metrics.parameters:
        return None
    first, last = next(iter(metrics.parameters)), list(metrics.parameters)[-1]
    shown = [name for name in PARAMETERS if metrics.parameters[last].get(name)]
    if not shown:
        return None
    figure = Figure(figsize=(9, 4.6 if len(shown) > 2 else 2.6))
    places = figure.subplots(math.ceil(len(shown) / 2), 2, squeeze=False).flat
    for axis, name in zip(places, shown, strict=False):
        for state, offset, colour, face in ((first, -0.17, COLOURS[0], "none"), (last, 0.17, COLOURS[2], COLOURS[2])):
            layers = metrics.parameters[state].get(name, [])
            points = [(layer + offset, value) for layer, heads in enumerate(layers) for value in heads]
            label = plain(STATES.get(state, f"after {state}"))
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.scatter(x, y, s=14, facecolors=face, edgecolors=colour, alpha=0.7, linewidths=0.9, label=label)
            means = [sum(heads) / len(heads) for heads in layers if heads]
            axis.scatter([layer + offset for layer in range(len(means))], means, s=70, marker="_", color=INK, zorder=3)
            if first == last:
                break
        _layer_axis(axis, metrics, len(metrics.parameters[last][name]))
        _labelled(axis, PARAMETERS[name], "layer", "")
        axis.margins(y=0.12)
    for axis in list(places):
        axis.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _attention(attention: Attention) -> Figure:
    size = len(attention.tokens)
    figure = Figure(figsize=(9, 5.1))
    font = min(8.0, 250 / size)
    labels = [token if len(token) <= LONGEST else f"{token[: LONGEST - 1]}…" for token in map(plain, attention.tokens)]
    panels = (
        (attention.softmax, "Blues", "teacher: attention weight", "weight (square-root scale)", PowerNorm(0.5, 0, 1)),
        (attention.inhibition, "Blues_r", "student: inhibition Z", "inhibition Z", None),
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (values, colours, title, label, norm) in zip(axes, panels, strict=True):
        image = axis.imshow(values, cmap=colours, norm=norm, **({} if norm else {"vmin": 0}))
        axis.set_xticks(range(size), labels, rotation=90, fontsize=font)
        axis.set_yticks(range(size), labels, fontsize=font)
        axis.tick_params(length=0, pad=2)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_title(title)
        axis.set_xlabel("key")
        bar = figure.colorbar(image, ax=axis, location="bottom", shrink=0.6, aspect=30, pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)
    axes[0].set_ylabel("query")
    return figure


def _layer_axis(axis: Axes, metrics: Distill, count: int) -> None:
    layers = metrics.student.layers if len(metrics.student.layers) == count else range(count)
    axis.set_xticks(range(count), [str(layer) for layer in layers])
    axis.grid(visible=False, axis="x")


def _labelled(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _limits(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values span much, from zero where they do not."""
    values = [value for value in values if math.isfinite(value)]
    if not values or min(values) <= 0 or max(values) < 4 * min(values):
        axis.set_ylim(bottom=min([0.0, *values]))
        return
    decades = math.log10(max(values) / min(values))
    axis.set_yscale("log")
    steps = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, **options)
        figure.set_layout_engine("none")  # laid out once, so that PNG and SVG agree
    return buffer.getvalue()
