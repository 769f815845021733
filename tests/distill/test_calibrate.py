"""Calibration: finds parameters that made the data, and never ends worse than it began."""

from typing import Any

import pytest
import torch

from inhibitor.distill.calibrate import calibrate
from inhibitor.models.attention import InhibitorAttention, Tapped
from inhibitor.models.config import InhibitorConfig
from inhibitor.ops import inhibitor_attention

HEADS = 3
PAPER: dict[str, Any] = {"reach": None, "query_gain": False}


def samples(target, lengths=(6, 12, 24), seed=0):
    """Random queries, keys and values at several lengths, with the context that ``target`` makes of them."""
    torch.manual_seed(seed)
    for length in lengths:
        query, key, value = (torch.randn(2, HEADS, length, 8) for _ in range(3))
        context = target(query, key, value).transpose(1, 2)
        yield Tapped(query, key, value, None, False, 8**-0.5, context)


def error(attention, tapped):
    total = torch.zeros(())
    for sample in tapped:
        found = attention(sample.query, sample.key, sample.value, None, False, sample.scale).transpose(1, 2)
        total += (found - sample.context).square().sum()
    return total.item()


@pytest.mark.parametrize("per", ["head", "layer"])
def test_recovers_what_made_the_data(per):
    true: dict[str, Any] = {"gamma": 1.0, "eta": 1.7, "delta": 0.5, "length_exponent": 0.8}
    tapped = list(samples(lambda q, k, v: inhibitor_attention(q, k, v, **true)))
    attention = InhibitorAttention(InhibitorConfig(per=per, **PAPER), HEADS, 8)
    calibrate(attention, tapped)
    for name, value in true.items():
        assert getattr(attention, name).tolist() == pytest.approx([value] * (HEADS if per == "head" else 1), rel=1e-3)
    assert error(attention, tapped) < 1e-6


def test_recovers_a_reach():
    sizes = torch.stack([sample.value.abs().mean((0, 2, 3)) for sample in samples(lambda q, k, v: v)]).mean(0)
    true: dict[str, Any] = {"gamma": 1.0, "eta": 1.7, "delta": 0.5, "length_exponent": 0.8, "reach": 2 * sizes}
    tapped = list(samples(lambda q, k, v: inhibitor_attention(q, k, v, **true)))
    attention = InhibitorAttention(InhibitorConfig(), HEADS, 8)
    calibrate(attention, tapped)
    for name, value in true.items():
        expected = torch.as_tensor(value).expand(HEADS)
        torch.testing.assert_close(getattr(attention, name).detach(), expected, rtol=1e-3, atol=0)
    assert error(attention, tapped) < 1e-6


@pytest.mark.parametrize("per", ["head", "layer"])
def test_without_centring_the_scores_mean_is_part_of_delta(per):
    distances = [torch.cdist(sample.query, sample.key, p=1.0) * sample.scale for sample in samples(lambda q, k, v: v)]
    mean = torch.stack([distance.mean((0, 2, 3)) for distance in distances]).mean(0)
    mean = mean if per == "head" else mean.mean().expand(HEADS)
    true: dict[str, Any] = {"gamma": torch.full((HEADS,), 2.0), "delta": 0.5 - 2.0 * mean, "center": False}
    tapped = list(samples(lambda q, k, v: inhibitor_attention(q, k, v, **true)))
    attention = InhibitorAttention(InhibitorConfig(per=per, center=False, **PAPER), HEADS, 8)
    calibrate(attention, tapped)
    for name in ("gamma", "delta"):
        found = getattr(attention, name).detach()
        torch.testing.assert_close(found, true[name][: len(found)], rtol=1e-3, atol=0)
    assert error(attention, tapped) < 1e-6


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("options", [{"eta": 2.0}, PAPER], ids=["reach", "paper"])
def test_brings_softmax_nearer(per, options):
    softmax = torch.nn.functional.scaled_dot_product_attention
    tapped = list(samples(softmax))
    attention = InhibitorAttention(InhibitorConfig(per=per, **options), HEADS, 8)
    with torch.no_grad():
        before = error(attention, tapped)
        calibrate(attention, tapped)
        after = error(attention, tapped)
        nothing = sum(sample.context.square().sum().item() for sample in tapped)
    assert after < 0.9 * before
    assert after < nothing


def test_heads_get_values_of_their_own():
    gamma = torch.tensor([0.5, 1.0, 2.0])
    tapped = list(samples(lambda q, k, v: inhibitor_attention(q, k, v, gamma=gamma, delta=0.5)))
    attention = InhibitorAttention(InhibitorConfig(**PAPER), HEADS, 8)
    calibrate(attention, tapped)
    torch.testing.assert_close(attention.gamma.detach(), gamma, rtol=1e-3, atol=0)
