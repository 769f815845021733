"""Linear layers and embeddings in 8 bits: the same numbers in training and after it."""

import copy

import pytest
import torch
from torch import nn

from inhibitor import InhibitorError
from inhibitor.models.int8_layers import FakeInt8Embedding, FakeInt8Linear, Int8Embedding, Int8Linear
from inhibitor.ops.int8_linear import codes
from inhibitor.quantization.calibrate import input_grid


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

    def filled(self, form, bits=8):
        layer = form(self.linear.in_features, self.linear.out_features, True, bits=bits)
        ranges = torch.stack(torch.aminmax(self.x, dim=0))
        with torch.no_grad():
            layer.fill(self.linear, *input_grid(self.linear, self.x, ranges, bits=bits))
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


@pytest.mark.parametrize("bits", [8, 7])
def test_the_linear_layer_is_what_was_trained(bits):
    case = Outliers()
    fake, real = case.filled(FakeInt8Linear, bits), case.filled(Int8Linear, bits)
    assert int(real.weight_codes.int().abs().max()) == 2 ** (bits - 1) - 1
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
