"""Steps found on data."""

import pytest
import torch

from inhibitor.quantization.calibrate import best_step


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-7, 7)])
def test_the_best_step_is_no_worse_than_any_other(low, high):
    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [30.0]])
    x[1, 0] = 40  # an outlier

    def error(step):
        return ((x / step.unsqueeze(1)).round().clamp(low, high) * step.unsqueeze(1) - x).square().sum(1)

    found = error(best_step(x, low, high))
    for factor in torch.linspace(0.05, 1.2, 60):
        assert (found <= 1.05 * error(factor * x.abs().amax(1) / high)).all()


def test_constant_zero_and_lonely_channels_are_finite():
    x = torch.zeros(3, 50)
    x[1] = 5.0
    x[2, 0] = 1e4
    step = best_step(x, -128, 127)
    assert (step > 0).all()
    assert torch.isfinite(step).all()
    assert (5.0 - (5.0 / step[1]).round().clamp(-128, 127) * step[1]).abs() < step[1]
