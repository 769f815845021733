"""First derivatives against finite differences, ties against autograd of the reference, second derivatives refused."""

import pytest
import torch

from inhibitor import inhibitor_attention
from inhibitor.errors import OperatorError
from tests.ops.cases import TOLERANCES, Arguments, Case, arguments, relative_error, separate

CHECKED = [
    Case(2, 2, 2, 3, 4, 3, 2, parameters="per head"),
    Case(2, 2, 2, 3, 4, 3, 2, parameters="shared", center=False),
    Case(1, 4, 2, 3, 3, 2, 3, parameters="per head", is_causal=True, reach=True),
    Case(2, 4, 1, 2, 5, 2, 2, parameters="per head", mask="bk", is_causal=True),
    Case(2, 2, 2, 3, 4, 1, 1, parameters="per head", mask="bhqk", reach=True),
    Case(1, 2, 2, 3, 4, 3, 2, parameters="per head", mask="q", signed=False),
    Case(1, 2, 1, 3, 4, 3, 2, parameters="shared", mask="hk", signed=False, center=False, reach=True),
]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() == 4 else tensor


def step_two(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor


def one_batch_one_head(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1, :1].clone() if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.parametrize("layout", [torch.clone, transposed, step_two], ids=["contiguous", "transposed", "step_two"])
def test_gradients_are_those_of_finite_differences(case, layout, cut):
    cut(20)
    given = separate(case, arguments(case)[0])
    leaves = {name: layout(tensor).detach().requires_grad_() for name, tensor in given.tensors.items()}
    names = {"query", "key", "value", "gamma", "eta", "delta", "length_exponent"}
    assert set(leaves) == (names | {"reach"} if case.reach else names)
    check(leaves, given)


@pytest.mark.parametrize("case", [case for case in CHECKED if case.heads == case.key_heads], ids=str)
def test_gradients_of_broadcast_key_and_value_are_those_of_finite_differences(case):
    given, _ = arguments(case, seed=4)
    shared = ("key", "value")
    leaves = {name: one_batch_one_head(t) if name in shared else t for name, t in given.tensors.items()}
    check({name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}, given)


def check(leaves: dict[str, torch.Tensor], given: Arguments) -> None:
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return Arguments(dict(zip(leaves, tensors, strict=True)), given.options)()

    assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("rule", ["everything", "masked", "causal"])
def test_ties_choose_as_autograd_of_the_reference_does(signed, center, rule):
    """Integers: q = k, |V| = Z, V = 0 and S − mean + δ = 0 all occur, and each takes 0."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    tensors = {
        "query": integers(2, 4, 9, 3),
        "key": integers(2, 2, 8, 3),
        "value": integers(2, 2, 8, 4),
        "gamma": torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64),
        "delta": torch.tensor([1.0, 0.0, -1.0, 0.25], dtype=torch.float64),
    }
    mask = torch.rand(2, 4, 9, 8, generator=generator) < 0.5 if rule == "masked" else None
    options = {"attn_mask": mask, "is_causal": rule == "causal", "center": center, "signed": signed}
    given = Arguments(tensors, options | {"scale": 1.0, "enable_gqa": True})

    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    if rule == "everything":
        score = tensors["gamma"].view(-1, 1, 1) * torch.cdist(query, key, p=1.0)
        score = score - score.mean(-1, keepdim=True) if center else score
        score = score + tensors["delta"].view(-1, 1, 1)
        assert (query.unsqueeze(-2) == key.unsqueeze(-3)).any()
        assert (score == 0).any()
        assert ((value.abs().unsqueeze(-3) == score.relu().unsqueeze(-1)) & (score.unsqueeze(-1) > 0)).any()

    grad = integers(2, 4, 9, 4)
    found, expected = given.with_gradients(grad), given.with_gradients(grad, "reference")
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= TOLERANCES["ties"], name


@pytest.mark.parametrize("name", ["query", "key", "value", "gamma", "delta"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_second_derivative_is_refused_and_says_what_to_do(backend, name):
    given, _ = arguments(Case(1, 2, 2, 3, 4, 3, 2, parameters="per head"), torch.float32)
    leaf = given.tensors[name].requires_grad_()
    (first,) = torch.autograd.grad(given(backend).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(OperatorError, match=r'expected a first derivative.*backend="reference" can be') as error:
        torch.autograd.grad(first.sum(), leaf)
    assert error.value.subject == "inhibitor_attention"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_only_what_needs_a_gradient_gets_one(backend):
    given, _ = arguments(Case(1, 2, 2, 3, 4, 3, 2), torch.float32)
    key, query = given.tensors["key"].requires_grad_(), given.tensors["query"]
    torch.autograd.backward(given(backend).sum())
    assert key.grad is not None
    assert query.grad is None
    with torch.no_grad():
        assert not given(backend).requires_grad


def test_gradients_reach_a_tensor_that_is_query_key_and_value_at_once():
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = torch.autograd.grad(inhibitor_attention(x, x, x, delta=0.5, backend="torch").sum(), x)[0]
    expected = torch.autograd.grad(inhibitor_attention(x, x, x, delta=0.5, backend="reference").sum(), x)[0]
    assert relative_error(found, expected) <= TOLERANCES["float64"]
