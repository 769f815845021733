"""Which backend serves a call, and what it says where one cannot."""

import pytest
import torch

from inhibitor import inhibitor_attention, which_backend
from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, operator, reference
from inhibitor.ops.backends import constant_in_graphs

needs_kernels = pytest.mark.skipif(not cpu.INSTALLED, reason="the package was installed without its native kernels")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Q = randn(2, 4, 3, 8)
K = randn(2, 4, 5, 8)


@needs_kernels
def test_auto_can_be_asked_what_it_uses_and_why():
    choice = which_backend(Q)
    assert choice.name == "cpu"
    assert choice.reason == f"native kernels for {cpu.instruction_set()}"
    assert which_backend() == which_backend(Q, K) == choice
    for dtype in (torch.bfloat16, torch.float16):
        assert which_backend(Q.to(dtype)) == choice


# query, value, what keeps the native kernels from them
NOT_NATIVE = [
    ("float64", Q.double(), None, "the native kernels do not take torch.float64"),
    ("another device", Q.to("meta"), None, "there is no native kernel for meta"),
    ("wide head_dim", torch.zeros(1, 1, 1, 257), K, "the native kernels take head_dim and value_dim up to 256"),
    ("wide value_dim", Q, torch.zeros(1, 1, 1, 257), "the native kernels take head_dim and value_dim up to 256"),
]


@needs_kernels
@pytest.mark.parametrize(("query", "value", "reason"), [r[1:] for r in NOT_NATIVE], ids=[r[0] for r in NOT_NATIVE])
def test_what_the_native_kernels_do_not_take_goes_to_pytorch_by_auto_and_is_refused_by_name(query, value, reason):
    choice = which_backend(query, value)
    assert (choice.name, choice.reason) == ("torch", reason)
    value = query if value is None else value
    query, value = query.expand(1, 1, 3, -1) if query.shape[0] == 1 else query[:1, :1], value[:1, :1, :1]
    key = query[:, :, :1]
    assert inhibitor_attention(query, key, value).shape == (1, 1, 3, value.shape[3])
    with pytest.raises(OperatorError, match=r'can serve, got .*Pass backend="auto"') as error:
        inhibitor_attention(query, key, value, backend="cpu")
    assert error.value.got == reason


def test_the_widest_tensors_for_the_native_kernels_go_there():
    assert which_backend(torch.zeros(1, 1, 1, 256), torch.zeros(1, 1, 1, 256)).name == which_backend().name


def test_without_native_kernels_auto_says_so_and_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "INSTALLED", False)
    missing = "the package was installed without its native kernels"
    assert (which_backend().name, which_backend().reason) == ("torch", missing)
    with pytest.raises(OperatorError, match="pip install") as error:
        inhibitor_attention(Q, K, K, backend="cpu")
    assert error.value.got == missing
    # Where kernels would not help, they are not asked for.
    assert which_backend(Q.double()).reason == "the native kernels do not take torch.float64"


@pytest.mark.parametrize("name", ["auto", *(["cpu"] if cpu.INSTALLED else []), "torch", "reference"])
def test_the_backend_that_was_asked_for_runs(name, monkeypatch):
    ran: list[str] = []

    def watch(owner, attribute, label):
        run = getattr(owner, attribute)

        def watched(*args):
            ran.append(label)
            return run(*args)

        monkeypatch.setattr(owner, attribute, watched)

    watch(reference, "attention", "reference")
    for label, module in operator.BACKENDS.items():
        watch(module, "forward", label)
        watch(module, "backward", label)

    result = inhibitor_attention(Q.clone().requires_grad_(), K, K, backend=name)
    chosen = which_backend(Q).name if name == "auto" else name
    assert ran == [chosen]
    torch.autograd.backward(result.sum())
    assert ran == ([chosen] if name == "reference" else [chosen] * 2)


def test_what_a_graph_takes_as_constant_is_marked_as_pytorch_marks_it():
    ours, theirs = (mark(lambda: 0) for mark in (constant_in_graphs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}
