"""What goes into the pictures of a run's course: data, not pixels."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inhibitor.report.course import course, curves_figure, traces_figure
from inhibitor.report.look import PARAMETERS, style
from inhibitor.report.records import Distill, Stage

from . import samples


@pytest.fixture(autouse=True)
def the_house_style() -> Iterator[None]:
    with style():
        yield


def stage(name: str, tokens: int, history: list[dict[str, Any]]) -> Stage:
    costs = {"seconds": 1.0, "tokens_per_second": 1.0}
    return Stage.model_validate({"name": name, "tokens": tokens, **costs, "history": history})


def entry(step: float, layer: int | None, traces: dict[str, Any] | None = None, **values: float) -> dict[str, Any]:
    return {"step": step, "layer": layer, "loss": 1.0, "traces": traces, **values}


def points(line: Line2D) -> Any:
    return np.asarray(line.get_xydata()).tolist()


def panels(figure: Figure | None) -> dict[str, Axes]:
    assert figure is not None
    shown = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}
    return {title: axis for title, axis in shown.items() if title != "layer"}


@pytest.mark.parametrize("steps", [[1, 2, 1, 2], [1, 2, 3, 4], [10, 20, 30, 40]])
def test_units_follow_each_other_whether_or_not_each_counts_from_one(steps: list[int]) -> None:
    first = stage("layerwise", 400, [entry(step, layer) for step, layer in zip(steps, (0, 0, 1, 1), strict=True)])
    run = course([first, stage("rest", 50, []), stage("full", 100, [entry(7, None), entry(14, None)])])
    assert [logged.tokens for logged in run.logged] == [100, 200, 300, 400, 500, 550]
    assert [(span.name, span.start, span.end) for span in run.spans] == [
        ("layer-wise", 0, 400),
        ("rest", 400, 450),
        ("full-layer", 450, 550),
    ]


def test_a_unit_of_a_single_step_has_its_place() -> None:
    run = course([stage("layerwise", 30, [entry(1, layer) for layer in (0, 1, 2)])])
    assert [logged.tokens for logged in run.logged] == [10, 20, 30]
    assert [axis.lines[0].get_marker() for axis in panels(curves_figure(run)).values()] == ["o"]


def test_a_line_for_each_unit_of_the_loss() -> None:
    history = [entry(1, 0, loss=0.5), entry(2, 0, loss=0.4), entry(1, 3, loss=0.6)]
    run = course([stage("layerwise", 300, history), stage("full", 100, [entry(1, None, loss=0.2)])])
    assert run.units("loss") == [(0, [(100, 0.5), (200, 0.4)]), (3, [(300, 0.6)]), (None, [(400, 0.2)])]
    assert run.layers == [0, 3]
    assert run.units("grad_norm") == []
    axes = panels(curves_figure(run))
    assert list(axes) == ["loss"]
    lines = list(map(points, axes["loss"].lines))
    assert lines == [[[100, 0.5], [200, 0.4]], [[300, 0.6]], [[400, 0.2]], [[300, 0], [300, 1]]]
    assert [text.get_text() for text in axes["loss"].texts] == ["layer-wise", "full-layer"]


def test_gradient_norms_are_drawn_where_they_were_logged() -> None:
    run = course([stage("full", 20, [entry(1, None), entry(2, None, grad_norm=3.0)])])
    assert run.units("grad_norm") == [(None, [(20, 3.0)])]
    assert list(panels(curves_figure(run))) == ["loss", "gradient norm"]


def test_a_line_for_each_layer_broken_where_it_was_not_traced() -> None:
    history = [
        entry(1, 0, {"layers": [0], "gamma": [0.1]}),
        entry(1, 1, {"layers": [1], "gamma": [0.2]}),
        entry(2, 1),
        entry(3, 1, {"layers": [1, 0], "gamma": [0.4, 0.3]}),
    ]
    run = course([stage("layerwise", 40, history)])
    first, second = run.traces("gamma").values()
    assert first == [(10, 0.1), pytest.approx((20, math.nan), nan_ok=True), (40, 0.3)]
    assert second[1:] == [(20, 0.2), (40, 0.4)]
    assert run.traces("eta") == {}
    (axis,) = panels(traces_figure(run)).values()
    bridges = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert points(bridges[0])[:2] == [[10, 0.1], [40, 0.3]]
    assert points(bridges[1]) == []


def test_a_panel_for_each_traced_quantity_and_borders_in_all() -> None:
    run = course(Distill.model_validate(samples.traced(layers=3)).stages)
    axes = panels(traces_figure(run))
    assert list(axes) == ["context error", "fully inhibited values", *PARAMETERS.values()]
    for axis in axes.values():
        assert axis.get_xlim() == (0, 12e6)
        assert points(axis.lines[-1]) == [[6e6, 0], [6e6, 1]]
        assert len(axis.lines) == 3 * 2 + 1
    assert axes["fully inhibited values"].get_ylim()[0] == 0
    assert axes["length exponent ρ"].get_xlabel() == "million tokens"
    assert {line.get_color() for line in axes["shift δ"].lines[:-1:2]} == {
        line.get_color() for line in panels(curves_figure(run))["loss"].lines[:3]
    }


def test_an_older_run_has_a_loss_and_nothing_else() -> None:
    run = course(Distill.model_validate(samples.distill()).stages)
    assert list(panels(curves_figure(run))) == ["loss"]
    assert traces_figure(run) is None
    assert curves_figure(course([])) is None
    assert curves_figure(course([stage("full", 0, [])])) is None


def test_what_is_not_a_number_is_left_out() -> None:
    history = [entry(1, None, {"layers": [0], "eta": [math.nan]}, loss=math.nan, grad_norm=math.inf), entry(2, None)]
    run = course([stage("full", 0, history)])
    assert list(panels(curves_figure(run))) == ["loss", "gradient norm"]
    assert traces_figure(run) is None


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ((100, 100), ["layer-wise", "full-layer"]),
        ((900, 100), ["layer-wise", "full-layer"]),
        ((1000, 10, 10), ["layer-wise", "a"]),
    ],
)
def test_names_of_stages_never_overlap(tokens: tuple[int, ...], shown: list[str]) -> None:
    names = ("layerwise", "full") if len(tokens) == 2 else ("layerwise", "a", "b" * 40)
    run = course([stage(name, count, [entry(1, None)]) for name, count in zip(names, tokens, strict=True)])
    (axis,) = panels(curves_figure(run)).values()
    assert [text.get_text() for text in axis.texts] == shown


@pytest.mark.parametrize(("share", "shown"), [(0.6, "20 %"), (0.01, "0.2 %")])
def test_shares_are_shown_in_per_cent(share: float, shown: str) -> None:
    history = [entry(step, None, {"layers": [0], "inhibited": [share / step]}) for step in (1, 2)]
    (axis,) = panels(traces_figure(course([stage("full", 10, history)]))).values()
    assert shown in [text.get_text() for text in axis.get_yticklabels()]
