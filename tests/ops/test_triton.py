"""The Triton kernels: on a GPU where there is one, else under Triton's interpreter, on small shapes.

The interpreter takes seconds for what a GPU does in microseconds, and cuts where hardware rounds to bfloat16.
"""

import math
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from inhibitor import inhibitor_attention, which_backend
from inhibitor.errors import OperatorError
from inhibitor.ops import operator, reference, triton
from inhibitor.ops.triton.configuration import Device, choose
from tests.ops.cases import FACTOR, LUCK, SWEEP, Arguments, Case, arguments, relative_error, separate, sizes
from tests.ops.layouts import beyond_two_to_the_31st, different, features_first, heads_of_stride_zero, step_two

pytest.importorskip("triton", reason="Triton is not installed: pip install 'inhibitor-attention[triton]'")
ON_A_GPU = torch.accelerator.is_available()
DEVICE = str(torch.accelerator.current_accelerator()) if ON_A_GPU else "cpu"
pytestmark = pytest.mark.skipif(not (ON_A_GPU or triton.interpreted()), reason="Triton was imported to compile")
needs_gpu = pytest.mark.skipif(not ON_A_GPU, reason="needs a GPU")
NAN, INF = float("nan"), float("inf")

# Tiles have 16 rows and 16 keys under the interpreter: none of these lengths fills them, most need several.
CASES = [
    Case(1, 2, 2, 17, 19, 5, 6, reach=True),
    Case(2, 2, 1, 17, 5, 3, 20, mask="bk", parameters="per head"),
    Case(1, 4, 2, 3, 33, 17, 2, mask="hk", parameters="shared", reach=True),
    Case(1, 4, 2, 17, 18, 2, 3, mask="bhqk", parameters="per head", reach=True),
    Case(1, 2, 2, 35, 18, 3, 2, is_causal=True, parameters="per head"),
    Case(1, 1, 1, 18, 35, 2, 3, is_causal=True, signed=False, parameters="numbers", reach=True),
    Case(1, 2, 2, 19, 20, 4, 3, mask="bk", is_causal=True, center=False, parameters="per head", reach=True),
    Case(2, 2, 2, 5, 17, 3, 4, mask="q", signed=False, center=False, parameters="per head"),
    Case(1, 1, 1, 1, 18, 70, 9, mask="k", parameters="numbers"),
    Case(1, 1, 1, 2, 3, 256, 200),
    Case(1, 1, 1, 2, 3, 2, 256, parameters="shared", reach=True),
]
# On a device tiles have 64 rows and keys; each new head size or option is a compilation of seconds.
LARGE = [
    *SWEEP[::20],
    Case(2, 4, 2, 130, 300, 64, 64, mask="bk", parameters="per head"),
    Case(1, 4, 4, 257, 257, 64, 64, is_causal=True, parameters="per head", reach=True),
    Case(1, 2, 1, 129, 200, 128, 128, mask="bhqk", parameters="per head"),
    Case(1, 1, 1, 70, 150, 256, 256, parameters="numbers", reach=True),
]
SMALL = Case(1, 2, 1, 3, 17, 2, 3, mask="bhqk", parameters="per head", reach=True)


def on_device(given: Arguments) -> Arguments:
    options = {name: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for name, o in given.options.items()}
    return Arguments({name: tensor.to(DEVICE) for name, tensor in given.tensors.items()}, options)


def run(given: Arguments, grad: torch.Tensor, attend: Any = inhibitor_attention) -> dict[str, torch.Tensor]:
    """The result and its gradients, back on the CPU."""
    found = on_device(given).with_gradients(grad.to(DEVICE), "triton", attend)
    return {name: tensor.cpu() for name, tensor in found.items()}


def summed(*, backend: str, **named: Any) -> torch.Tensor:
    """What the operator adds up, before it is scaled: with the last feature, and integers of integers."""
    result: torch.Tensor
    result = reference.attention(**named) if backend == "reference" else operator.attention(**named, backend=backend)
    return result


def written(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor as a kernel stores it in a dtype: the interpreter cuts where hardware rounds to bfloat16."""
    if dtype == torch.bfloat16 and not ON_A_GPU:
        tensor = (tensor.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return tensor.to(dtype)


def check_accuracy(case: Case, dtype: torch.dtype) -> None:
    given, grad = arguments(case, dtype)
    given = separate(case, given)
    size = sizes(case, given, grad)
    plain = given.to(torch.float32).with_gradients(grad, "reference")
    truth = given.to(torch.float64).with_gradients(grad, "reference")
    found = run(given, grad)
    for name, true in truth.items():
        assert found[name].shape == true.shape
        assert found[name].dtype == (dtype if true.dim() == 4 else torch.float32)
        allowed = FACTOR * relative_error(written(plain[name], found[name].dtype), true, size[name]) + LUCK
        assert relative_error(found[name], true, size[name]) <= allowed, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_at_most_twice_as_much_as_the_plain_formula(case):
    check_accuracy(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_half_precision_errs_at_most_twice_as_much(case, dtype):
    check_accuracy(case, dtype)


@needs_gpu
@pytest.mark.parametrize("case", LARGE if ON_A_GPU else LARGE[:1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_at_most_twice_as_much_in_cases_of_many_tiles(case, dtype):
    check_accuracy(case, dtype)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 3, 1), (3, 0, 1), (3, 3, 0)])
def test_without_queries_keys_or_batch_results_are_empty_or_zero(queries, keys, batch):
    given, grad = arguments(Case(batch, 2, 1, queries, keys, 4, 3, parameters="per head", reach=True), torch.float32)
    for name, tensor in run(given, grad).items():
        assert not tensor.any(), name


@pytest.mark.parametrize("rule", ["everything", "masked", "causal"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_ties_choose_as_autograd_of_the_reference_does(rule, signed):
    """Integers and quarters: q = k, |V| = Z, τ = Z, V = 0 and S − mean + δ = 0 all occur, and each takes 0."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    tensors = {"query": integers(1, 4, 18, 3), "key": integers(1, 2, 8, 3), "value": integers(1, 2, 8, 4)}
    tensors["gamma"] = torch.tensor([1.0, 2.0, -1.0, 0.5])
    tensors["delta"] = torch.tensor([1.0, 0.0, -1.0, 0.25])
    tensors["reach"] = torch.tensor([1.0, 2.0, 0.5, 0.25])
    mask = None  # four keys in sight, or of the first 1, 2, 4 and 8: other means are rounded
    if rule == "masked":
        mask = torch.rand(1, 4, 18, 8, generator=generator).argsort(-1) < 4
    if rule == "causal":
        mask = ((torch.arange(18) >= 7) | torch.isin(torch.arange(18), torch.tensor([0, 1, 3]))).view(1, 1, 18, 1)
        mask = mask.expand(1, 1, 18, 8)
    options = {"attn_mask": mask, "is_causal": rule == "causal", "center": True, "signed": signed, "scale": 1.0}
    given, grad = Arguments(tensors, options), integers(1, 4, 18, 5)
    found, expected = run(given, grad, summed), given.with_gradients(grad, "reference", summed)
    for name, truth in expected.items():
        assert relative_error(found[name], truth.double()) <= 4 * LUCK, name


def test_a_row_with_one_key_in_sight_has_a_score_of_zero_and_no_slope():
    given, grad = arguments(Case(1, 2, 2, 18, 18, 5, 3), torch.float32)
    given.options.update(attn_mask=torch.eye(18, dtype=torch.bool))
    found = run(
        Arguments(given.tensors | {"gamma": torch.full((2,), 0.7), "delta": torch.zeros(2)}, given.options), grad
    )
    assert not found["gamma"].any()
    assert not found["query"].any()
    assert not found["key"].any()


@pytest.mark.parametrize("rule", ["keys", "rows"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_out_of_sight_changes_no_bit(poison, rule):
    given, grad = arguments(Case(1, 2, 2, 18, 20, 4, 3, parameters="per head", reach=True), torch.float32)
    mask = torch.ones(18, 20, dtype=torch.bool)  # queries × keys
    mask[:, [1, 17]] = False
    if rule == "rows":
        mask[4] = False  # a row that sees nothing
        mask[:, 7] = mask[7, :] = False
    given.options["attn_mask"] = mask if rule == "rows" else mask[:1]
    expected = run(given, grad)
    tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
    hidden = ~mask.any(0)
    for name in ("key", "value"):
        tensors[name][:, :, hidden] = poison
    tensors["query"][:, :, ~mask.any(1)] = poison
    found = run(Arguments(tensors, given.options), grad)
    assert different(found, expected) == set()
    assert not found["output"][:, :, ~mask.any(1)].any()
    assert not any(found[name][:, :, hidden].any() for name in ("key", "value"))


def test_nan_and_infinity_in_sight_reach_what_depends_on_them_and_nothing_else():
    given, _ = arguments(Case(1, 1, 1, 20, 19, 4, 3, parameters="per head", reach=True), torch.float32)
    names = ("query", "key", "value", "gamma", "delta", "reach")
    options = {"attn_mask": None, "is_causal": True, "center": True, "signed": True, "scale": 0.5}

    def broken(name: str, row: int, feature: int, number: float) -> torch.Tensor:
        tensors = {name: given.tensors[name].clone() for name in names}
        tensors[name][0, 0, row, feature] = number
        return on_device(Arguments(tensors, options))("triton", summed)[0, 0].isfinite().cpu()

    causal = torch.arange(20)
    assert torch.equal(broken("query", 5, 1, NAN), (causal != 5).view(-1, 1).expand(-1, 4))
    assert torch.equal(broken("key", 17, 0, NAN), (causal < 17).view(-1, 1).expand(-1, 4))
    for number in (NAN, INF):
        expected = torch.ones(20, 4, dtype=torch.bool)
        expected[17:, 2] = False
        assert torch.equal(broken("value", 17, 2, number), expected)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e36])
def test_values_of_any_size_are_scaled_without_loss(size):
    given, grad = arguments(Case(1, 1, 1, 3, 5, 4, 3, parameters="numbers"), torch.float32)
    tensors = given.tensors | {"value": given.tensors["value"] * size}
    moved = Arguments(tensors, given.options | {"gamma": 0.7 * size, "delta": 0.5 * size})
    expected = moved.to(torch.float64).with_gradients(grad, "reference")
    found = run(moved, grad)
    assert relative_error(found["output"] / size, expected["output"] / size) <= 8 * LUCK
    assert torch.equal(found["value"] != 0, expected["value"] != 0)


@pytest.mark.parametrize("layout", [features_first, step_two, heads_of_stride_zero], ids=lambda layout: layout.__name__)
def test_strides_change_no_bit(layout):
    given, grad = arguments(SMALL, torch.float32)
    strided = {name: layout(tensor) if tensor.dim() == 4 else tensor for name, tensor in given.tensors.items()}
    dense = {name: tensor.contiguous() for name, tensor in strided.items()}
    found, expected = (
        run(Arguments(strided, given.options), layout(grad)),
        run(Arguments(dense, given.options), layout(grad)),
    )
    assert different(found, expected) <= {"eta", "length_exponent"}  # summed by PyTorch, in the order of memory


@pytest.mark.parametrize("poison", [NAN, 1e30])
def test_uninitialised_memory_does_not_show(poison, monkeypatch):
    given, grad = arguments(SMALL, torch.float32)
    expected, empty, poured = run(given, grad), torch.empty, []

    def poisoned(*args, **options):
        poured.append(args)
        return empty(*args, **options).fill_(poison)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert different(run(given, grad), expected) == set()
    assert poured


@pytest.mark.parametrize("reach", [True, False], ids=["reach", "no reach"])
def test_the_registration_holds(reach):
    given, _ = arguments(Case(1, 2, 1, 2, 3, 2, 3, mask="bk", parameters="per head", reach=reach), torch.float32)
    given = on_device(given)
    names = ("query", "key", "value", "gamma", "delta", "reach")[: 5 + reach]
    tensors = [given.tensors[name].requires_grad_() for name in names]
    options = (*(() if reach else (None,)), given.options["attn_mask"], False, True, True, 0.5, "triton")
    torch.library.opcheck(operator.attention, (*tensors, *options))
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3] + reach, device=DEVICE)
    torch.library.opcheck(operator.attention_backward, (grad, *(tensor.detach() for tensor in tensors), *options))


def test_compiles_whole_and_autocast_does_not_reach_inside():
    torch.compiler.reset()
    given, grad = arguments(CASES[0], torch.float32)
    given, grad = on_device(given), grad.to(DEVICE)
    compiled = torch.compile(inhibitor_attention, backend="aot_eager", fullgraph=True)
    expected = given.with_gradients(grad, "triton")
    assert different(given.with_gradients(grad, "triton", compiled), expected) == set()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(given("triton"), expected["output"])


def test_auto_on_a_gpu_is_triton_and_says_why_not():
    with FakeTensorMode():
        query = torch.empty(1, 2, 8, 64, device="cuda")
        assert which_backend(query).name == "triton"
        assert which_backend(query.double()).reason == "the Triton kernels do not take torch.float64"
        assert which_backend(query.expand(-1, -1, -1, 64), query.repeat(1, 1, 1, 5)).name == "torch"


REFUSED = [
    ({}, True, "there is no Triton kernel for cpu"),
    ({"dtype": torch.float64}, False, "do not take torch.float64"),
    ({"head_dim": 257}, False, "up to 256"),
]


@pytest.mark.parametrize(("changed", "compiling", "got"), REFUSED, ids=["on the CPU", "float64", "too wide"])
def test_what_triton_cannot_serve_is_refused_not_replaced(changed, compiling, got, monkeypatch):
    if compiling:
        monkeypatch.setattr(triton, "interpreted", lambda: False)
    device = "cpu" if compiling else DEVICE
    x = torch.ones(1, 1, 2, changed.get("head_dim", 4), dtype=changed.get("dtype", torch.float32), device=device)
    with pytest.raises(OperatorError, match=got) as caught:
        inhibitor_attention(x, x, x, backend="triton")
    assert caught.value.subject == "backend"


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", False)
    x = torch.ones(1, 1, 2, 4, device=DEVICE)
    with pytest.raises(OperatorError, match=r"Triton is not installed. pip install 'inhibitor-attention\[triton\]'"):
        inhibitor_attention(x, x, x, backend="triton")
    with FakeTensorMode():
        assert which_backend(torch.empty(1, 2, 8, 64, device="cuda")).reason == "Triton is not installed"


def test_every_tile_of_every_configuration_is_one_that_triton_can_hold():
    """Columns are read without a detour only while they have fewer numbers than a program has threads."""
    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None]
    for device in [Device("cuda", 132, capability) for capability in capabilities]:
        for width in (16, 32, 64, 128, 256):
            for backward in (False, True):
                found = choose(device, width, backward)
                assert max(found.rows, found.keys, width) < 32 * found.warps
                assert math.log2(found.rows).is_integer()
                assert found.warps * 32 * found.programs * (found.registers or 0) <= 1 << 16


@needs_gpu
@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_elements_beyond_two_to_the_31st_are_found(name, offset):
    given, grad = arguments(Case(1, 1, 1, 3, 3, 4, 4), torch.bfloat16)
    given, grad = on_device(given), grad.to(DEVICE)
    with torch.device(DEVICE):
        far = beyond_two_to_the_31st(given.tensors[name], offset)
    moved = Arguments(given.tensors | {name: far}, given.options)
    assert torch.equal(moved("triton"), given("triton"))
    leaf = far.detach().requires_grad_()
    found = torch.autograd.grad(Arguments(given.tensors | {name: leaf}, given.options)("triton"), leaf, grad)[0]
    assert torch.equal(found, given.with_gradients(grad, "triton")[name])


@needs_gpu
def test_runs_are_bit_identical_and_replay_in_a_graph():
    given, grad = arguments(
        Case(2, 4, 2, 130, 300, 64, 64, mask="bk", parameters="per head", reach=True), torch.bfloat16
    )
    given, grad = on_device(given), grad.to(DEVICE)
    first = given.with_gradients(grad, "triton")
    assert all(different(given.with_gradients(grad, "triton"), first) == set() for _ in range(50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = given("triton")
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, first["output"])
