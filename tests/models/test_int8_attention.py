"""Attention in integers: the same numbers in training and after it, gradients of the smooth function behind them."""

import copy
from typing import Any

import pytest
import torch

from inhibitor import InhibitorConfig, inhibitor_attention
from inhibitor.models.int8_attention import IntegerInhibitorAttention
from inhibitor.ops.integer import inhibitor_attention_int8, integer_attention
from inhibitor.ops.integer_grid import quantize_query_key, quantize_value
from inhibitor.quantization.calibrate import calibrate_attention

SCALE = 0.25
PLAIN: dict[str, Any] = {"reach": None, "query_gain": False}
CONFIGS = [PLAIN, {}]


def made(bits=8, heads=3, tokens=40, head_dim=16, seed=0, kept=1.0, **config):
    """An attention with calibrated steps and what it was calibrated on, (1, heads, tokens, features) each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.3, 1.0, 4.0]).view(-1, 1, 1)
    query, key, value = (torch.randn(heads, tokens, head_dim, generator=generator) * sizes for _ in range(3))
    inhibitor = InhibitorConfig(length_exponent=0.7, eta=1.3, **config)
    attention = IntegerInhibitorAttention(inhibitor, heads, head_dim, bits)
    with torch.no_grad():
        attention.gamma.copy_(torch.tensor([0.7, 1.0, 1.4]))
        if attention.reach is not None:
            attention.reach.copy_(4 * sizes.flatten())  # some 150 steps of the value at 8 bits
        if attention.query_gain is not None:
            attention.query_gain.normal_(0, 0.03, generator=generator)
    calibrate_attention(attention, query, key, kept * value.abs().amax((1, 2)))
    return attention, tuple(x.unsqueeze(0) for x in (query, key, value))


def parameters_of(attention, query):
    """What the float operator takes of an attention, detached."""
    found = {name: getattr(attention, name) for name in ("gamma", "delta", "length_exponent", "reach")}
    found |= {"eta": attention.gain(query)}
    return {name: None if parameter is None else parameter.detach() for name, parameter in found.items()}


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_and_integers_agree_to_the_last_bit(config, is_causal, bits):
    attention, (query, key, value) = made(bits, **config)
    mask = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(2)) < 0.8
    trained = attention(query.requires_grad_(), key, value, mask, is_causal, SCALE)
    assert trained.requires_grad
    grid = attention.grid(SCALE)
    query_codes, key_codes = (quantize_query_key(x, grid.query_key_step, bits) for x in (query, key))
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal}
    levels = quantize_value(value, grid.value_step, bits)
    assert int(levels.abs().max()) <= 2 ** (bits - 1) - 1
    parameters = {"eta": attention.gain(query).detach(), "length_exponent": attention.length_exponent}
    expected = inhibitor_attention_int8(query_codes, key_codes, levels, grid, **parameters, **options)
    assert torch.equal(trained, expected)
    with torch.no_grad():
        assert torch.equal(attention(query, key, value, mask, is_causal, SCALE), expected)
    # H's grid: the output over one rescale is a whole number
    whole = integer_attention(query_codes, key_codes, levels, grid, **options)
    seen = torch.ones(40, 40).tril().bool() & mask if is_causal else mask
    length = seen.sum(-1, keepdim=True).clamp(min=1)
    gain = attention.eta.view(-1, 1, 1)
    if grid.reach is not None:
        length = 0.5 + whole[..., 16:] / grid.reach.view(-1, 1, 1)
        gain = gain * torch.einsum("bhqf,hf->bhq", query, attention.query_gain).exp().unsqueeze(-1)
    factor = grid.value_step.view(-1, 1, 1) * gain * length ** -attention.length_exponent.view(-1, 1, 1)
    torch.testing.assert_close(expected, whole[..., :16] * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_eight_bits_lose_little_and_fewer_lose_more(config):
    noise = []
    for bits in (8, 6, 4):
        attention, (query, key, value) = made(bits, tokens=200, **config)
        exact = inhibitor_attention(query, key, value, scale=SCALE, **parameters_of(attention, query))
        with torch.no_grad():
            found = attention(query, key, value, None, False, SCALE)
        error = (found - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))
        noise.append(-10 * error.log10())
    assert (noise[0] > noise[1] + 8).all()
    assert (noise[1] > noise[2] + 8).all()
    assert (noise[0] > 30).all()  # of H itself, in which most of what was summed has cancelled


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_are_those_of_the_float_operator_on_what_the_codes_stand_for(config):
    attention, inputs = made(kept=0.8, **config)  # some values are clipped
    tensors = [x.clone().requires_grad_() for x in inputs]
    weight = torch.randn(1, 3, 40, 16, generator=torch.Generator().manual_seed(5))
    (attention(*tensors, None, False, SCALE) * weight).sum().backward()

    grid = attention.grid(SCALE)
    steps = [step.view(-1, 1, 1) for step in (grid.query_key_step, grid.query_key_step, grid.value_step)]
    codes = [quantize_query_key(x, grid.query_key_step).float() - 128 for x in inputs[:2]]
    codes.append(quantize_value(inputs[2], grid.value_step).float())
    points = [(code * step).requires_grad_() for code, step in zip(codes, steps, strict=True)]
    smooth = copy.deepcopy(attention)
    smooth.zero_grad()
    query = inputs[0].clone().requires_grad_()  # of which the gain is, as it comes
    (smooth.attend(*points, smooth.gain(query), None, False, SCALE) * weight).sum().backward()

    for tensor, point, code in zip(tensors, points, codes, strict=True):
        inside = code.abs() < 127
        expected = point.grad + query.grad if tensor is tensors[0] and query.grad is not None else point.grad
        torch.testing.assert_close(tensor.grad[inside], expected[inside], rtol=1e-4, atol=1e-5)
        assert (~inside).any()
    for name, parameter in smooth.named_parameters():
        if "step" not in name:
            torch.testing.assert_close(attention.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    # LSQ: the step's is Σ grad · (code − x / step), where clipped Σ grad · code; that of log2 is ln 2 · step times it
    point, x, code, step = points[2], inputs[2], codes[2], steps[2]
    residual = torch.where((x / step).abs() <= 127, code - x / step, code)
    expected = (point.grad * residual).sum((0, 2, 3)) * grid.value_step * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(attention.log2_value_step.grad, expected, rtol=1e-3, atol=1e-4)


def test_clipped_inputs_get_no_gradient():
    """But through the gain, which is of the query as it comes."""
    attention, (query, key, value) = made(query_gain=False)
    query = (query * 50).requires_grad_()
    attention(query, key, value, None, False, SCALE).sum().backward()
    clipped = (query.detach() / attention.steps()[0].view(-1, 1, 1)).abs() > 129
    assert clipped.any()
    assert (query.grad[clipped] == 0).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_descent_on_the_steps_alone_lowers_the_error(config):
    attention, (query, key, value) = made(bits=4, **config)
    target = inhibitor_attention(query, key, value, scale=SCALE, **parameters_of(attention, query))
    with torch.no_grad():
        attention.log2_query_key_step += 1.5
    steps = [attention.log2_query_key_step, attention.log2_value_step]
    optimizer = torch.optim.Adam(steps, lr=0.03)
    losses = []
    for _ in range(60):
        loss = (attention(query, key, value, None, False, SCALE) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_grid_follows_a_fused_optimizer():
    """Which changes parameters without telling their version."""
    attention, (query, key, value) = made()
    optimizer = torch.optim.AdamW(attention.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = attention(query, key, value, None, False, SCALE)
    attention(query, key, value, None, False, SCALE).square().sum().backward()
    optimizer.step()
    fresh = copy.deepcopy(attention)
    with torch.no_grad():
        after = attention(query, key, value, None, False, SCALE)
        assert torch.equal(after, fresh(query, key, value, None, False, SCALE))
    assert not torch.equal(after, before)
