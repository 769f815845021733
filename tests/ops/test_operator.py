"""The registration with PyTorch: schema, shapes, autograd, compilation, autocast."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from inhibitor import inhibitor_attention
from inhibitor.ops import cpu
from tests.ops.cases import Case, arguments

HALF = (torch.bfloat16, torch.float16)
SAMPLES = {
    "plain": Case(2, 2, 2, 5, 7, 4, 3),
    "grouped": Case(2, 4, 2, 5, 7, 4, 3),
    "padding": Case(2, 2, 2, 5, 7, 4, 3, mask="bk"),
    "mask": Case(2, 2, 2, 5, 7, 4, 3, mask="bhqk", center=False),
    "causal": Case(1, 2, 1, 5, 5, 1, 1, is_causal=True, signed=False),
    "both": Case(2, 2, 2, 5, 7, 4, 3, mask="hq", is_causal=True, reach=True),
    "reach": Case(2, 4, 2, 5, 7, 4, 3, reach=True),
    "no queries": Case(2, 2, 2, 0, 7, 4, 3),
    "no keys": Case(2, 2, 2, 5, 0, 4, 3, reach=True),
    "no batch": Case(0, 2, 2, 5, 7, 4, 3),
}
BACKENDS = ["cpu", "torch"] if cpu.INSTALLED else ["torch"]
CALLS = [
    *((name, torch.float32, "contiguous", backend) for name in SAMPLES for backend in BACKENDS),
    ("grouped", torch.float64, "strided", "torch"),
    *(("mask", torch.float32, "strided", backend) for backend in BACKENDS),
    *(("both", dtype, "strided", backend) for dtype in HALF for backend in BACKENDS),
]


def inputs(name: str, dtype: torch.dtype, layout: str, backend: str, requires_grad: bool) -> tuple[Any, ...]:
    """What the registered operator takes."""
    case = SAMPLES[name]
    given, _ = arguments(case, dtype)
    tensors = [given.tensors[tensor] for tensor in ("query", "key", "value")]
    if layout == "strided":
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    tensors += [torch.rand(case.heads) for _ in range(2 + case.reach)]
    mask = given.options["attn_mask"]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, -1, case.keys)
    tensors = [tensor.detach().requires_grad_(requires_grad) for tensor in tensors]
    return (*tensors, *(() if case.reach else (None,)), mask, case.is_causal, case.center, case.signed, 0.5, backend)


@pytest.mark.parametrize(("name", "dtype", "layout", "backend"), CALLS, ids=lambda part: str(part).replace(" ", "_"))
def test_opcheck_of_the_operator(name, dtype, layout, backend):
    given = inputs(name, dtype, layout, backend, requires_grad=True)
    torch.library.opcheck(torch.ops.inhibitor.attention.default, given)


@pytest.mark.parametrize(("name", "dtype", "layout", "backend"), CALLS, ids=lambda part: str(part).replace(" ", "_"))
def test_opcheck_of_its_backward(name, dtype, layout, backend):
    tensors = inputs(name, dtype, layout, backend, requires_grad=False)
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3] + SAMPLES[name].reach)
    torch.library.opcheck(torch.ops.inhibitor.attention_backward.default, (grad.to(dtype), *tensors))


def test_on_the_meta_device_only_shapes_are_computed():
    query, key, value = (
        tensor.to("meta") for tensor in arguments(SAMPLES["grouped"], torch.bfloat16)[0].tensors.values()
    )
    result = inhibitor_attention(query, key, value, enable_gqa=True)
    assert (result.device.type, result.dtype, tuple(result.shape)) == ("meta", torch.bfloat16, (2, 4, 5, 3))


def layer(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gamma: torch.Tensor, attn_mask: torch.Tensor
) -> torch.Tensor:
    """The call with what surrounds it in a model."""
    context = inhibitor_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        gamma=gamma,
        eta=gamma,
        delta=gamma,
        length_exponent=gamma / 2,
        reach=gamma + 0.1,
        attn_mask=attn_mask,
    )
    return context.transpose(1, 2).flatten(2)


def batch(length: int) -> list[torch.Tensor]:
    """Arguments of ``layer``; all but the last, the mask, need a gradient."""
    generator = torch.Generator().manual_seed(length)
    tensors = [torch.randn(2, length, 4, 8, generator=generator, requires_grad=True) for _ in range(3)]
    tensors.append(torch.rand(4, generator=generator).requires_grad_())
    padding = torch.rand(2, 1, 1, length, generator=generator) < 0.8
    return [*tensors, padding]


def test_compiles_whole_and_follows_the_length():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in (8, 12, 33, 7, 64):
        check(compiled, length)
    assert counter.frame_count == 2  # once for the first length, once more for any other


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
    return inhibitor_attention(query, key, value, delta=0.5, length_exponent=0.5, reach=0.7, attn_mask=attn_mask)


def with_batch(batch: int, length: int = 9) -> tuple[torch.Tensor, ...]:
    """Arguments of ``attend``."""
    query, key, value = torch.randn(3, batch, 4, length, 16, generator=torch.Generator().manual_seed(batch))
    return query, key, value, torch.arange(length).view(1, 1, 1, -1).expand(batch, -1, -1, -1) < length - 2


def test_compiles_once_for_every_batch():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for size in (2, 3, 5, 4):
        torch.testing.assert_close(compiled(*with_batch(size)), attend(*with_batch(size)), rtol=1e-6, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_is_exported_for_every_batch_and_length(strict):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, attn_mask):
            return attend(query, key, value, attn_mask)

    sizes, of_mask = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    shapes = (sizes, sizes, sizes, of_mask | {3: torch.export.Dim.DYNAMIC})
    exported = torch.export.export(Module(), with_batch(2), dynamic_shapes=shapes, strict=strict).module()
    given = with_batch(5, length=30)
    torch.testing.assert_close(exported(*given), attend(*given), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_compiles_with_inductor():
    torch.compiler.reset()
    with torch._inductor.config.patch(compile_threads=1):  # no worker processes
        check(torch.compile(layer, fullgraph=True), 12)


def check(compiled: Callable[..., torch.Tensor], length: int) -> None:
    inputs = batch(length)
    found, expected = compiled(*inputs), layer(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grad = torch.ones_like(expected)
    gradients = (torch.autograd.grad(output, inputs[:-1], grad) for output in (found, expected))
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


def test_compiled_results_equal_eager_ones_bit_for_bit():
    torch.compiler.reset()
    inputs = batch(9)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs), layer(*inputs))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"center": False, "signed": False, "scale": 0.3}], ids=str)
def test_numbers_and_flags_compile(options):
    torch.compiler.reset()
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))

    def call(gamma: float) -> torch.Tensor:
        return inhibitor_attention(query, key, value, gamma=gamma, eta=gamma, length_exponent=gamma, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for gamma in (1.0, 0.5, 0.25):
        torch.testing.assert_close(compiled(gamma), call(gamma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_changes_nothing(dtype, backend):
    given, grad = arguments(Case(2, 4, 2, 17, 33, 32, 8, mask="bk", parameters="per head", reach=True), dtype)
    expected = given.with_gradients(grad, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = given.with_gradients(grad, backend)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
