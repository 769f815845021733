"""The pictures: the course of training, errors per layer, parameters, what a head attends to, time against length."""

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from inhibitor.bench.results import Measurement
from inhibitor.report.course import course, curves_figure, traces_figure
from inhibitor.report.heads import heads_figure, positions_figure
from inhibitor.report.look import COLOURS, INK, PARAMETERS, labelled, limits, style, to_png, to_svg
from inhibitor.report.records import Attention, Distill, Finetune
from inhibitor.report.results import STATES, TASKS
from inhibitor.report.tables import plain

__all__ = ["distill_figures", "finetune_figure", "speed_figure", "to_png", "to_svg"]

MARKERS = "osD^vP"
STATE_COLOURS = dict(zip(("teacher", *STATES.values()), (INK, *COLOURS), strict=False))
LONGEST = 14  # characters of a token that are shown


def distill_figures(metrics: Distill) -> dict[str, Figure]:
    """The pictures of one distillation by file name; what was not measured has none."""
    run = course(metrics.stages)
    with style():
        figures = {
            "curves.png": curves_figure(run),
            "traces.png": traces_figure(run),
            "context_error.png": _errors(metrics),
            "heads.png": heads_figure(metrics),
            "positions.png": positions_figure(metrics),
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
            labelled(loss, "fine-tuning loss", "step", "loss")
            limits(loss, [step.loss for metrics in every for step in metrics.history])
        if score := axes.get("score"):
            task = plain(TASKS.get(every[0].task, every[0].task))
            labelled(score, f"{task} score", "epoch", f"{plain(every[0].metric)} × 100")
        for axis in axes.values():
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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
        labelled(axis, title, "length (queries = keys)", "milliseconds")
        limits(axis, [m.median_ms for m in shown])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside right upper")
        return figure


def _errors(metrics: Distill) -> Figure | None:
    titles = {"context_error": "context vectors", "hidden_error": "hidden states"}
    panels = {name: title for name, title in titles.items() if getattr(metrics.states[0], name)}
    if not panels:
        return None
    figure = Figure(figsize=(9, 3.2))
    for axis, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
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
        labelled(axis, title, "layer", "relative squared error")
        limits(axis, everything)
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
    columns = 2 if len(shown) <= 4 else 3
    figure = Figure(figsize=(9, 4.6 if len(shown) > columns else 2.6))
    places = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat
    for name, axis in zip(shown, places, strict=False):  # in this order: no place beyond is taken
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
        labelled(axis, PARAMETERS[name], "layer", "")
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
