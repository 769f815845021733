"""Int8 linear layers: codes by every kernel, products by oneDNN, and both in a compiled graph."""

import pytest
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from inhibitor.errors import OperatorError
from inhibitor.ops import int8_linear as module
from inhibitor.ops import integer_cpu
from inhibitor.ops.int8_linear import codes, int8_linear


@pytest.fixture(params=[*integer_cpu.instruction_sets(), "PyTorch"])
def path(request, monkeypatch):
    """Each way that codes are made here, in turn."""
    if request.param == "PyTorch":
        monkeypatch.setattr(integer_cpu, "INSTALLED", False)
        yield
    else:
        with integer_cpu.using(request.param):
            yield


def layer(in_features=48, out_features=24, seed=0):
    """Multipliers, zero point, weight, scale and bias."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(in_features, generator=generator) * 60 + 1,
        torch.tensor(117, dtype=torch.int32),
        torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8),
        torch.rand(out_features, generator=generator) + 0.1,
        torch.randn(out_features, generator=generator),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (130, 33), (5, 768), (700, 512), (0, 8), (4, 0)])
@pytest.mark.parametrize("zero_point", [0, 117, 255])
def test_codes_are_rounded_to_even_and_clipped(path, shape, zero_point):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4
    multiplier = torch.logspace(-1, 2, shape[1])
    expected = ((x * multiplier).round() + zero_point).clamp(0, 255).to(torch.uint8)
    assert torch.equal(codes(x, multiplier, zero_point), expected)
    apart = x.repeat_interleave(2, 1)[:, ::2]  # features that do not lie side by side
    assert torch.equal(codes(apart, multiplier, zero_point), expected)


def test_codes_of_halves_and_of_the_ends(path):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf"), -float("inf"), 1e-45]])
    assert codes(x, torch.ones(10), 100).tolist() == [[100, 102, 102, 100, 98, 255, 0, 255, 0, 100]]


@pytest.mark.parametrize("row", [0, 129])
def test_nan_has_no_code(path, row):
    x = torch.zeros(130, 2500)
    x[row, -1] = torch.nan
    with pytest.raises(OperatorError, match="input of an int8 linear layer: expected numbers, got NaN"):
        codes(x, torch.ones(2500), 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
def test_the_product_is_that_of_the_codes(dtype, shape):
    multiplier, zero_point, weight, scale, bias = layer()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    offset = codes(x.float().view(-1, 48), multiplier, 117).double() - 117
    expected = (offset @ weight.double().T * scale.double() + bias.double()).view(*shape[:-1], 24).to(dtype)
    found = int8_linear(x, multiplier, zero_point, weight, scale, bias)
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-4)


def test_the_operator_passes_pytorchs_own_checks():
    multiplier, zero_point, weight, scale, bias = layer()
    for x, given in ((torch.randn(5, 48), bias), (torch.randn(2, 3, 48), None)):
        torch.library.opcheck(int8_linear, (x, multiplier, zero_point, weight, scale, given))


def test_the_weight_is_packed_once_and_again_when_it_changes(monkeypatch):
    kept = WeakTensorKeyDictionary()
    monkeypatch.setattr(module, "_PACKED", kept)
    multiplier, zero_point, weight, scale, bias = layer()
    given = multiplier, zero_point, nn.Buffer(weight), scale, bias
    x = torch.randn(4, 48)
    compiled = torch.compile(lambda x: int8_linear(x, *given), fullgraph=True)
    first = int8_linear(x, *given)
    (packed,) = kept.values()
    assert torch.equal(int8_linear(x, *given), first)
    assert torch.equal(compiled(x), first)
    assert torch.equal(compiled(x), first)
    assert [entry is packed for entry in kept.values()] == [True]
    given[2].neg_()
    zero_point.fill_(100)
    torch.testing.assert_close(compiled(x), int8_linear(x, *given))
    assert not torch.allclose(int8_linear(x, *given), first)
    assert [entry is packed for entry in kept.values()] == [False]
