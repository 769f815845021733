"""The course of a distillation: its logged steps, all stages and units in order, on one axis of tokens."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from inhibitor.report.look import INK, PARAMETERS, labelled, layer_bar, layer_colours, limits
from inhibitor.report.records import Stage, Step
from inhibitor.report.results import STATES
from inhibitor.report.tables import plain

TRACES = {"context_error": "context error", "inhibited": "fully inhibited values", **PARAMETERS}
CHARACTER = 0.01  # of the width of one panel that fills the picture, what a letter of a stage's name takes

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Span:
    """Where a stage lies: its name as it is shown, its first and its last token."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Logged:
    """One logged step: the tokens seen since the run began, and the stage it belongs to."""

    tokens: float
    stage: int
    step: Step


@dataclass(frozen=True)
class Course:
    """A run's stages and logged steps, in order."""

    spans: list[Span]
    logged: list[Logged]

    @property
    def layers(self) -> list[int]:
        """Every layer that was trained alone or traced."""
        alone = {entry.step.layer for entry in self.logged if entry.step.layer is not None}
        return sorted(alone.union(*(entry.step.traces.layers for entry in self.logged if entry.step.traces)))

    def units(self, name: str) -> list[tuple[int | None, Points]]:
        """``loss`` or ``grad_norm`` unit by unit: the layer trained (None: all) and its points."""
        found = []
        for (_, layer), unit in itertools.groupby(self.logged, lambda entry: (entry.stage, entry.step.layer)):
            values = [(entry.tokens, getattr(entry.step, name)) for entry in unit]
            if points := [(tokens, value) for tokens, value in values if value is not None]:
                found.append((layer, points))
        return found

    def traces(self, name: str) -> dict[int, Points]:
        """A traced quantity by layer; NaN at a step that traced other layers only."""
        traced = [(entry.tokens, entry.step.traces) for entry in self.logged if entry.step.traces]
        by_step = [(x, dict(zip(traces.layers, getattr(traces, name), strict=False))) for x, traces in traced]
        found = {layer: [(x, values.get(layer, math.nan)) for x, values in by_step] for layer in self.layers}
        return {layer: points for layer, points in found.items() if any(math.isfinite(value) for _, value in points)}


def course(stages: Sequence[Stage]) -> Course:
    """Line up the stages' histories; within a stage, tokens pass evenly from step to step."""
    spans: list[Span] = []
    logged: list[Logged] = []
    start = 0.0
    for index, stage in enumerate(stages):
        steps = _running(stage.history)
        spans.append(Span(_shown(stage), start, start + stage.tokens))
        logged += [
            Logged(start + stage.tokens * at / (steps[-1] or 1.0), index, step)
            for at, step in zip(steps, stage.history, strict=True)
        ]
        start += stage.tokens
    return Course(spans, logged)


def curves_figure(run: Course) -> Figure | None:
    """Loss, and the gradient norm where it was logged; None without a logged step."""
    panels = {"loss": run.units("loss"), "grad_norm": run.units("grad_norm")}
    panels = {name: units for name, units in panels.items() if units}
    if not panels:
        return None
    figure = Figure(figsize=(9, 3.1))
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    colours = layer_colours(run.layers)
    for axis, (name, units) in zip(axes, panels.items(), strict=True):
        for layer, points in units:
            colour = INK if layer is None else colours[layer]
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, marker=_marker(points))
        labelled(axis, {"loss": "loss", "grad_norm": "gradient norm"}[name], "", "")
        limits(axis, [value for _, points in units for _, value in points])
        _token_axis(axis, run, len(panels))
    if any(layer is not None for layer, _ in panels["loss"]):
        layer_bar(figure, axes, run.layers)
    return figure


def traces_figure(run: Course) -> Figure | None:
    """A panel for each traced quantity, a line for each layer; None where nothing was traced."""
    panels = {name: lines for name in TRACES if (lines := run.traces(name))}
    if not panels:
        return None
    columns = 2 if len(panels) <= 6 else 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 0.8 + 1.9 * rows))
    axes = figure.subplots(rows, min(len(panels), columns), squeeze=False, sharex=True)
    colours = layer_colours(run.layers)
    places = list(axes.flat)
    for index, (name, lines) in enumerate(panels.items()):
        axis = places[index]
        for layer, points in lines.items():
            axis.plot(*_bridges(points), color=colours[layer], linewidth=0.8, linestyle=":", alpha=0.8)
            axis.plot(*zip(*points, strict=True), color=colours[layer], linewidth=1.2, marker=_marker(points))
        labelled(axis, TRACES[name], "", "")
        if name == "context_error":
            limits(axis, [value for points in lines.values() for _, value in points])
        if name == "inhibited":
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        _token_axis(axis, run, columns, first=index < columns, last=index + columns >= len(panels))
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    layer_bar(figure, places, run.layers, aspect=12 + 14 * rows)
    return figure


def _running(history: Sequence[Step]) -> list[float]:
    """Steps since the stage began, whether or not each unit counts from one again."""
    running, before, last = [], 0.0, 0.0
    for step in history:
        if step.step <= last:
            before += last
        last = step.step
        running.append(before + last)
    return running


def _shown(stage: Stage) -> str:
    return STATES.get(stage.name, plain(stage.name)).removeprefix("after ")


def _bridges(points: Points) -> tuple[list[float], list[float]]:
    """Lines from the last value before each gap to the first after it."""
    there = [(index, point) for index, point in enumerate(points) if math.isfinite(point[1])]
    x: list[float] = []
    y: list[float] = []
    for (at, (x0, y0)), (then, (x1, y1)) in itertools.pairwise(there):
        if then > at + 1:
            x += [x0, x1, math.nan]
            y += [y0, y1, math.nan]
    return x, y


def _marker(points: Points) -> str:
    """A single value is a dot, for it makes no line."""
    return "o" if sum(math.isfinite(value) for _, value in points) == 1 else ""


def _token_axis(axis: Axes, run: Course, columns: int, *, first: bool = True, last: bool = True) -> None:
    """Borders between stages; tokens along the bottom of a column's last panel, stages along the top of its first."""
    end = max(run.spans[-1].end, 1.0)
    size, name = next((pair for pair in ((1e6, "million"), (1e3, "thousand")) if end >= pair[0]), (1.0, ""))
    axis.set_xlim(0, end)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))
    axis.grid(visible=False, axis="x")
    if last:
        axis.set_xlabel(f"{name} tokens".strip())
        axis.tick_params(labelbottom=True)
    for span in run.spans:
        if span.start:
            axis.axvline(span.start, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    if not first or len(run.spans) < 2:
        return
    axis.set_title(axis.get_title(loc="left"), pad=17)
    taken = 0.0
    for span in run.spans:
        width = CHARACTER * columns * len(span.name)
        left = max(0.0, min((span.start + span.end) / 2 / end - width / 2, 1 - width))
        if taken <= left and width <= 1:  # a name that finds no room is in the caption only
            axis.text(left + width / 2, 1.02, span.name, transform=axis.transAxes, ha="center")
            taken = left + width
