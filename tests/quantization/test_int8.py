"""The integer parts: the same numbers in training and after it, gradients of the smooth function behind them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from inhibitor import InhibitorConfig, InhibitorError, inhibitor_attention
from inhibitor.models.int8 import (
    FakeInt8Embedding,
    FakeInt8Linear,
    Int8Embedding,
    Int8Linear,
    IntegerInhibitorAttention,
)
from inhibitor.ops.int8_linear import codes
from inhibitor.ops.integer import inhibitor_attention_int8, integer_attention
from inhibitor.ops.integer_grid import quantize_query_key, quantize_value
from inhibitor.quantization.calibrate import best_step, calibrate_attention, input_grid

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


class Outliers:
    """Inputs with a constant feature, one of zeros, and one a thousand times as large as the others."""

    def __init__(self, tokens=600, features=48, outputs=24):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(tokens, features, generator=generator)
        self.x[:, 3], self.x[:, 4] = 2.5, 0.0
        self.x[:, 5] *= 1000
        self.linear = nn.Linear(features, outputs)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(outputs, features, generator=generator) * 0.1)
            self.linear.weight[:, 5] *= 1e-3
        self.target = self.linear(self.x).detach()

    def filled(self, form):
        layer = form(self.linear.in_features, self.linear.out_features, True)
        with torch.no_grad():
            layer.fill(self.linear, *input_grid(self.linear, self.x, torch.stack(torch.aminmax(self.x, dim=0))))
        return layer

    def noise(self, output):
        error = output - self.target
        return 10 * torch.log10(self.target.square().sum() / error.square().sum()).item()


def test_the_linear_layer_keeps_small_features_beside_large_ones():
    case = Outliers()
    with torch.no_grad():
        assert case.noise(case.filled(Int8Linear)(case.x)) > 30
    # one step for all features, as per-tensor quantisation has it, would not
    step = case.x.abs().max() / 127
    assert case.noise(case.linear((case.x / step).round() * step)) < 15


def test_the_linear_layer_is_what_was_trained():
    case = Outliers()
    fake, real = case.filled(FakeInt8Linear), case.filled(Int8Linear)
    x = case.x.view(4, 150, -1)
    with torch.no_grad():
        torch.testing.assert_close(fake(x), real(x), rtol=1e-5, atol=1e-4)
        whole = codes(case.x, real.multiplier, real.zero_point).double() - real.zero_point
        exact = real.scale * (whole @ real.weight_codes.double().T) + real.bias
        torch.testing.assert_close(real(case.x).double(), exact.double(), rtol=1e-6, atol=1e-5)
    fake(x).square().sum().backward()
    assert (fake.weight.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
def test_the_output_has_the_dtype_of_the_input(dtype, shape):
    layer = Outliers().filled(Int8Linear)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    offset = codes(x.float(), layer.multiplier, layer.zero_point).double() - layer.zero_point
    expected = (offset @ layer.weight_codes.double().T * layer.scale.double() + layer.bias.double()).to(dtype)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours():
    case = Outliers()
    layer = case.filled(Int8Linear)
    with torch.no_grad():
        together = layer(torch.cat([case.x[:1], 1e3 * case.x[1:300]]))
        assert torch.equal(together[:1], layer(case.x[:1]))


def test_linear_layers_follow_new_weights_and_copies():
    case = Outliers()
    layer = case.filled(Int8Linear)
    with torch.no_grad():
        before = layer(case.x)
        assert torch.equal(copy.deepcopy(layer)(case.x), before)
        layer.weight_codes.neg_()
        torch.testing.assert_close(layer(case.x) - layer.bias, layer.bias - before, rtol=1e-4, atol=1e-4)


def test_an_int8_layer_is_not_trained():
    case = Outliers()
    layer = case.filled(Int8Linear)
    with pytest.raises(InhibitorError, match="expected inference"):
        layer(case.x).sum().backward()
    with pytest.raises(InhibitorError, match="an input that takes a gradient"):
        layer(case.x.requires_grad_())


def test_embeddings_keep_every_row():
    table = nn.Embedding(50, 32)
    with torch.no_grad():
        table.weight[7] = 0
        table.weight[8] *= 1000
    small, fake = Int8Embedding(50, 32), FakeInt8Embedding(50, 32)
    small.fill(table)
    fake.fill(table)
    indices = torch.arange(50).view(5, 10)
    error = (small(indices) - table(indices)).abs().amax(-1)
    assert (error <= 0.51 * table(indices).abs().amax(-1) / 127).all()
    assert torch.equal(fake(indices), small(indices))
    fake(indices).square().sum().backward()
    torch.testing.assert_close(fake.weight.grad, 2 * small(indices).view(50, 32))
