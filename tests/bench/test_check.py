"""The check finds what is wrong: a row, a head, a gradient, a NaN, a key that a mask hides."""

from dataclasses import replace

import pytest
import torch

from inhibitor import InhibitorError
from inhibitor.bench import check
from inhibitor.bench.check import Inputs, Sample
from inhibitor.bench.implementations import BASELINE, Sight, implementations
from inhibitor.bench.results import DIRECTIONS
from inhibitor.bench.shapes import Shape
from inhibitor.errors import BenchmarkError

SHAPE = Shape.parse("2x2x24x8+masks")
FORWARD, BOTH = DIRECTIONS
EVERYTHING = {implementation.name: implementation for implementation in implementations()}


@pytest.fixture(params=["whole", "sampled"])
def sample(request, monkeypatch):
    """All queries of the chosen heads, or a few."""
    if request.param == "sampled":
        monkeypatch.setattr(check, "WORK", 1)
    found = Sample(SHAPE)
    assert found.whole == (request.param == "whole")
    assert found.rows[[0, -1]].tolist() == [0, 23]
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name, found in EVERYTHING.items() for mask in SHAPE.masks if mask == "none" or found.takes_masks],
)
def test_what_is_right_passes(name, mask, direction, sample):
    implementation = EVERYTHING[name]
    inputs = Inputs.random(SHAPE).to(implementation.dtype)
    _, error = sample.check(implementation, inputs, Sight.of(mask, SHAPE), direction)
    assert error < (1e-2 if implementation.dtype == torch.bfloat16 else 2e-6)


class _WrongGradient(torch.autograd.Function):
    """Passes a tensor on and spoils its gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.05 * grad


def wrong(what):
    """The baseline with one fault."""
    right = EVERYTHING[BASELINE].attend

    def attend(query, key, value, sight):
        if what in ("query", "key", "value"):
            tensors = {"query": query, "key": key, "value": value}
            tensors[what] = _WrongGradient.apply(tensors[what])
            return right(tensors["query"], tensors["key"], tensors["value"], sight)
        if what == "mask":
            return right(query, key, value, Sight("none"))
        result = right(query, key, value, sight)
        row = torch.zeros_like(result)
        row[-1, -1, -1, 0] = {"row": 0.01, "NaN": float("nan")}[what]
        return result + row

    return replace(EVERYTHING[BASELINE], attend=attend)


@pytest.mark.parametrize(
    ("what", "direction", "mask"),
    [
        ("row", FORWARD, "none"),
        ("NaN", FORWARD, "none"),
        ("mask", FORWARD, "padding"),
        ("mask", FORWARD, "causal"),
        ("row", BOTH, "none"),
        ("query", BOTH, "none"),
        ("key", BOTH, "causal"),
        ("value", BOTH, "padding"),
    ],
)
def test_what_is_wrong_stops_the_benchmark(what, direction, mask, sample):
    part = what if what in ("query", "key", "value") else "result"
    with pytest.raises(BenchmarkError, match=f"{BASELINE} at 2x2x24x8.*{part} within") as caught:
        sample.check(wrong(what), Inputs.random(SHAPE), Sight.of(mask, SHAPE), direction)
    assert isinstance(caught.value, InhibitorError)


def test_a_few_rows_of_a_gradient_may_be_off_but_not_most_of_them():
    true = torch.ones(100, 4)
    few, most = true.clone(), true.clone()
    few[7] *= 1.1
    most[:60] *= 1.01
    whole, middle = check.errors(few, true)
    assert 0 < whole < check.FLIPS
    assert middle == 0
    assert check.errors(most, true)[1] == pytest.approx(0.01, rel=1e-3)
    hidden = torch.zeros(3, 4)
    assert check.errors(hidden, hidden) == (0, 0)
    assert check.errors(hidden + 1, hidden)[0] > 1


def test_the_share_of_positive_inhibition(sample):
    inputs, sight = Inputs.random(SHAPE), Sight.of("none", SHAPE)
    shares = [sample.positive_share(inputs, sight, delta) for delta in (-100.0, 0.0, 0.5, 100.0)]
    assert (shares[0], shares[-1]) == (0, 1)
    assert 0.3 < shares[1] < shares[2] < 0.95
    assert sample.positive_share(inputs, Sight.of("padding", SHAPE), 100.0) == 1
