"""Int8 linear layers: codes by every kernel, products by oneDNN, and both in a compiled graph."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.weak import WeakTensorKeyDictionary

from inhibitor.errors import ModelError, OperatorError
from inhibitor.ops import int8_linear as module
from inhibitor.ops import integer_cpu
from inhibitor.ops.int8_linear import codes, int8_codes, int8_linear


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
    multiplier, zero = torch.logspace(-1, 2, shape[1]), torch.tensor(zero_point, dtype=torch.int32)
    expected = ((x * multiplier).round() + zero_point).clamp(0, 255).to(torch.uint8)
    assert torch.equal(codes(x, multiplier, zero), expected)
    apart = x.repeat_interleave(2, 1)[:, ::2]  # features that do not lie side by side
    assert torch.equal(codes(apart, multiplier, zero), expected)
    assert torch.equal(codes(x.unsqueeze(1), multiplier, zero), expected.unsqueeze(1))


def test_codes_of_halves_and_of_the_ends(path):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf"), -float("inf"), 1e-45]])
    assert codes(x, torch.ones(10), torch.tensor(100)).tolist() == [[100, 102, 102, 100, 98, 255, 0, 255, 0, 100]]


@pytest.mark.parametrize("row", [0, 129])
def test_nan_has_no_code(path, row):
    x = torch.zeros(130, 2500)
    x[row, -1] = torch.nan
    with pytest.raises(OperatorError, match="input of an int8 linear layer: expected numbers, got NaN"):
        codes(x, torch.ones(2500), torch.tensor(128))


def test_a_compiler_makes_the_same_codes():
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(1)) * 4
    multiplier, zero_point = torch.logspace(-1, 2, 100), torch.tensor(117, dtype=torch.int32)
    compiled = torch.compile(lambda x: codes(x.relu(), multiplier, zero_point), fullgraph=True)
    assert torch.equal(compiled(x), codes(x.relu(), multiplier, zero_point))


def test_codes_are_traced_as_an_operator(path):
    """What is traced with one input is the function of every other."""
    multiplier, zero_point = layer()[:2]
    first, second = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    traced = make_fx(lambda x: codes(x, multiplier, zero_point))(first)
    assert torch.equal(traced(second), codes(second, multiplier, zero_point))
    assert codes(first.to("meta"), multiplier.to("meta"), zero_point).shape == (3, 48)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert codes(torch.randn(2, 48), multiplier, zero_point).shape == (2, 48)
    torch.library.opcheck(int8_codes, (first, multiplier, zero_point))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, m, z: (x, m.half(), z), r"multiplier: expected torch\.float32 .* got torch\.float16"),
        (lambda x, m, z: (x[..., :4], m, z), r"an int8 linear layer: expected 48 features, got shape \(3, 4\)"),
    ],
    ids=["half precision", "features"],
)
def test_codes_are_refused_what_they_would_misread(path, change, match):
    with pytest.raises(ModelError, match=match):
        codes(*change(torch.randn(3, 48), *layer()[:2]))


def some_codes(*shape):
    """Codes of any value."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def exact(given, zero_point, weight, scale, bias):
    """The layer's output in float64."""
    return (given.double() - zero_point) @ weight.double().T * scale.double() + bias.double()


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
def test_the_product_is_that_of_the_codes(shape):
    given, (_, *rest) = some_codes(*shape), layer()
    found = int8_linear(given, *rest)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(given, *rest), rtol=1e-6, atol=1e-4)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 processors")
def test_the_product_is_exact_without_vnni():
    """Where oneDNN's sums of two products would saturate; a newer processor is made to act like an older one."""
    program = """
    import torch
    from inhibitor.ops import int8_linear as module

    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        assert module._saturates()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for rows, features, outputs in ((1, 2, 1), (1, 33, 7), (40, 48, 24), (200, 384, 64)):
        codes = torch.randint(0, 256, (rows, features), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-128, 128, (outputs, features), generator=generator, dtype=torch.int8)
        codes[0], weight[0] = 255, 127
        zero_point, scale = torch.tensor(3, dtype=torch.int32), torch.ones(outputs)
        for halved, given in ((True, weight), (False, weight.clamp(-64, 64))):
            assert module._pack(given, 0).halved == halved
            found = module.int8_linear(codes, zero_point, given, scale, None)
            assert torch.equal(found.double(), (codes.double() - 3) @ given.double().T)
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(40, 48), (2, 3, 48), (0, 48)])
def test_codes_of_what_an_activation_gives(name, shape):
    given, (_, zero_point, weight, scale, bias) = some_codes(*shape), layer()
    scale = scale * 1e-3
    multiplier, zero = torch.tensor(30.0), torch.tensor(20, dtype=torch.int32)
    found = int8_linear(given, zero_point, weight, scale, bias, name, multiplier, zero)
    assert found.dtype == torch.uint8
    expected = ACTIVATIONS[name](exact(given, zero_point, weight, scale, bias)) * 30 + 20
    missed = found.double() - expected.clamp(0, 255)
    assert (missed.abs() <= 0.5 + 5e-3).all()  # oneDNN's GELU is an approximation
    assert found.numel() == 0 or found.max() - found.min() > 100


def test_numbers_are_those_of_the_call_wherever_they_lie():
    """Tensors of one number that come and go may lie where others lay; and some changes PyTorch does not count."""
    given, (_, _, *rest) = some_codes(4, 48), layer()

    def check(zero_point, expected):
        found = int8_linear(given, zero_point, *rest)
        torch.testing.assert_close(found.double(), exact(given, expected, *rest), rtol=1e-6, atol=1e-3)

    for number in range(0, 200, 20):
        check(torch.full((1 << 20,), number, dtype=torch.int32)[0], number)
    zero_point = torch.tensor(3, dtype=torch.int32)
    check(zero_point, 3)
    zero_point.data.fill_(100)
    check(zero_point, 100)
    with torch.inference_mode():
        zero_point = torch.tensor(3, dtype=torch.int32)
        check(zero_point, 3)
        zero_point.fill_(100)
        check(zero_point, 100)


def test_weights_are_those_of_the_call_wherever_they_lie():
    given, (_, zero_point, weight, scale, bias) = some_codes(4, 48), layer()

    def check(weight):
        found = int8_linear(given, zero_point, weight, scale, bias)
        torch.testing.assert_close(found.double(), exact(given, zero_point, weight, scale, bias), rtol=1e-6, atol=1e-3)

    held = weight.clone()
    for number in range(5):
        held.data = weight.roll(number, 0)  # where the one before the last lay, perhaps
        check(held)
    with torch.inference_mode():
        inside = weight.clone()
        check(inside)
        inside.neg_()
        check(inside)


def test_the_default_device_is_not_that_of_a_layer(path):
    given, (multiplier, *rest) = some_codes(4, 48), layer()
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    expected = int8_linear(given, *rest), codes(x, multiplier, rest[0])
    with torch.device("meta"):
        found = int8_linear(given, *rest), codes(x, multiplier, rest[0])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_codes_of_a_negated_view_are_those_of_what_it_means(path):
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    multiplier, zero_point = layer()[:2]
    assert torch.equal(codes(torch._neg_view(x), multiplier, zero_point), codes(-x, multiplier, zero_point))


def test_the_operator_passes_pytorchs_own_checks():
    _, zero_point, weight, scale, bias = layer()
    for shape, given in (((5, 48), bias), ((2, 3, 48), None)):
        torch.library.opcheck(int8_linear, (some_codes(*shape), zero_point, weight, scale, given))
    output = "gelu", torch.tensor(30.0), torch.tensor(20, dtype=torch.int32)
    torch.library.opcheck(int8_linear, (some_codes(5, 48), zero_point, weight, scale, bias, *output))


def test_new_grids_are_followed():
    given, (_, zero_point, weight, scale, bias) = some_codes(5, 48), layer()
    multiplier, zero = torch.tensor(0.5), torch.tensor(100, dtype=torch.int32)
    arguments = given, zero_point, weight, 1e-3 * scale, bias, "none", multiplier, zero
    before = int8_linear(*arguments).double()
    assert 0 < before.min() < before.max() < 245
    zero.fill_(110)
    assert torch.equal(int8_linear(*arguments).double(), before + 10)
    multiplier.fill_(0.25)
    torch.testing.assert_close(int8_linear(*arguments).double(), 110 + (before - 100) / 2, rtol=0, atol=0.8)


def test_a_weight_of_inference_mode_is_packed_once_and_again_when_it_changes(monkeypatch):
    packed, pack = [], module._pack

    def counted(weight, version):
        packed.append(version)
        return pack(weight, version)

    monkeypatch.setattr(module, "_pack", counted)
    given, (_, *rest) = some_codes(4, 48), layer()
    with torch.inference_mode():
        rest[1] = rest[1].clone()
        for times in (1, 2):
            for _ in range(3):
                found = int8_linear(given, *rest)
            torch.testing.assert_close(found.double(), exact(given, *rest), rtol=1e-6, atol=1e-3)
            assert len(packed) == times
            rest[1].neg_()


def test_the_weight_is_packed_once_and_again_when_it_changes(monkeypatch):
    kept = WeakTensorKeyDictionary()
    monkeypatch.setattr(module, "_PACKED", kept)
    _, zero_point, weight, scale, bias = layer()
    given = zero_point, nn.Buffer(weight), scale, bias
    x = some_codes(4, 48)
    compiled = torch.compile(lambda x: int8_linear(x, *given), fullgraph=True)
    first = int8_linear(x, *given)
    (packed,) = kept.values()
    assert torch.equal(int8_linear(x, *given), first)
    assert torch.equal(compiled(x), first)
    assert torch.equal(compiled(x), first)
    assert [entry is packed for entry in kept.values()] == [True]
    given[1].neg_()
    zero_point.fill_(100)
    torch.testing.assert_close(compiled(x), int8_linear(x, *given))
    assert not torch.allclose(int8_linear(x, *given), first)
    assert [entry is packed for entry in kept.values()] == [False]
