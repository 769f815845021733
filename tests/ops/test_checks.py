"""What the public function refuses, and how it says so."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from inhibitor import InhibitorError, inhibitor_attention
from inhibitor.errors import OperatorError
from inhibitor.ops import cpu
from tests.ops.cases import Arguments, Case, arguments

BACKENDS = [*(f"cpu-{name}" for name in cpu.instruction_sets()), "torch", "reference"]
NAN, INF = float("nan"), float("inf")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Q = randn(2, 4, 3, 8)
K = randn(2, 4, 5, 8)
NESTED = torch.nested.nested_tensor(list(K), layout=torch.jagged)

# name, arguments that differ from a good call, the argument that the error names, what it says was expected, what came
BAD_CALLS = [
    ("query a list", {"query": [[1.0]]}, "query", "a tensor", "list"),
    ("key None", {"key": None}, "key", "a tensor", "NoneType"),
    ("query of rank 3", {"query": Q[0]}, "query", "4 dimensions", "(4, 3, 8)"),
    ("value of rank 5", {"value": K[None]}, "value", "4 dimensions", "(1, 2, 4, 5, 8)"),
    ("nested key", {"key": NESTED}, "key", "a dense tensor", "a nested one"),
    ("sparse key", {"key": K.to_sparse()}, "key", "a dense tensor", "torch.sparse_coo"),
    ("integers", {"query": Q.long(), "key": K.long(), "value": K.long()}, "query", "float64, float32", "torch.int64"),
    ("complex value", {"value": K.to(torch.complex64)}, "value", "float64, float32", "torch.complex64"),
    ("boolean key", {"key": K > 0}, "key", "float64, float32", "torch.bool"),
    ("key of another dtype", {"key": K.double()}, "key", "query's dtype torch.float32", "torch.float64"),
    ("value in half", {"value": K.half()}, "value", "query's dtype torch.float32", "torch.float16"),
    ("value on another device", {"value": K.to("meta")}, "value", "query's device cpu", "meta"),
    ("no feature", {"query": Q[..., :0], "key": K[..., :0]}, "query", "at least one feature", "(2, 4, 3, 0)"),
    ("no value feature", {"value": K[..., :0]}, "value", "at least one feature", "(2, 4, 5, 0)"),
    ("another head_dim", {"key": K[..., :7]}, "key", "query's head_dim 8", "(2, 4, 5, 7)"),
    ("too few values", {"value": K[:, :, :4]}, "value", "each of the 5 keys", "(2, 4, 4, 8)"),
    ("batch 3 for 2", {"key": randn(3, 4, 5, 8)}, "batch", "equal sizes, or 1", "2, 3 and 2"),
    ("batch 0 for 2", {"key": K[:0], "value": K[:0]}, "batch", "equal sizes, or 1", "2, 0 and 0"),
    ("other heads in value", {"value": K[:, :2]}, "value", "key's 4 heads", "2 heads"),
    ("no heads in value", {"key": K[:, :1], "value": K[:, :0]}, "value", "query's 4 heads, or 1", "0 heads"),
    ("grouped, not said", {"key": K[:, :2], "value": K[:, :2]}, "key", "query's 4 heads, or 1", "2 heads"),
    ("three heads for four", {"key": K[:, :3], "value": K[:, :3]}, "key", "query's 4 heads, or 1", "3 heads"),
    (
        "three groups for four",
        {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True},
        "key",
        "a number of heads that divides query's 4",
        "3 heads",
    ),
    ("no key heads", {"key": K[:, :0], "value": K[:, :0], "enable_gqa": True}, "key", "divides query's 4", "0 heads"),
    ("additive mask", {"attn_mask": torch.zeros(3, 5)}, "attn_mask", "a boolean tensor", "torch.float32"),
    ("mask of 0 and 1", {"attn_mask": torch.ones(3, 5).long()}, "attn_mask", "a boolean tensor", "torch.int64"),
    ("mask a list", {"attn_mask": [True]}, "attn_mask", "a boolean tensor", "list"),
    ("mask of (batch, keys)", {"attn_mask": torch.ones(2, 5) > 0}, "attn_mask", "(2, 4, 3, 5)", "(2, 5)"),
    ("mask too wide", {"attn_mask": torch.ones(6) > 0}, "attn_mask", "(2, 4, 3, 5)", "(6,)"),
    ("mask of rank 5", {"attn_mask": torch.ones(1, 1, 1, 1, 1) > 0}, "attn_mask", "(2, 4, 3, 5)", "(1, 1, 1, 1, 1)"),
    ("mask elsewhere", {"attn_mask": torch.ones(5, device="meta") > 0}, "attn_mask", "query's device cpu", "meta"),
    ("gamma for 3 heads", {"gamma": torch.ones(3)}, "gamma", "of shape (4,)", "torch.float32 of shape (3,)"),
    ("gamma per row", {"gamma": torch.ones(4, 1, 1)}, "gamma", "of shape (4,)", "torch.float32 of shape (4, 1, 1)"),
    ("eta of integers", {"eta": torch.ones(4).long()}, "eta", "floating-point tensor", "torch.int64"),
    ("delta elsewhere", {"delta": torch.ones(4, device="meta")}, "delta", "query's device cpu", "meta"),
    ("gamma a word", {"gamma": "one"}, "gamma", "a number or", "'one'"),
    ("gamma None", {"gamma": None}, "gamma", "a number or", "None"),
    ("delta a list", {"delta": [0.0] * 4}, "delta", "a number or", "[0.0, 0.0, 0.0, 0.0]"),
    ("eta complex", {"eta": 1j}, "eta", "a number or", "1j"),
    ("length_exponent for 5", {"length_exponent": torch.ones(5)}, "length_exponent", "of shape (4,)", "(5,)"),
    ("eta per row", {"eta": torch.ones(2, 4, 5)}, "eta", "shape (2, 4, 3)", "torch.float32 of shape (2, 4, 5)"),
    ("eta per row of integers", {"eta": torch.ones(2, 4, 3).long()}, "eta", "floating-point", "torch.int64"),
    ("reach 0", {"reach": 0.0}, "reach", "above 0", "0.0"),
    ("reach NaN", {"reach": NAN}, "reach", "above 0", "nan"),
    ("reach without end", {"reach": INF}, "reach", "a finite number", "inf"),
    ("reach a word", {"reach": "far"}, "reach", "a number or", "'far'"),
    ("reach for 3 heads", {"reach": torch.ones(3)}, "reach", "of shape (4,)", "(3,)"),
    ("scale a tensor", {"scale": torch.tensor(0.5)}, "scale", "a number or None", "tensor(0.5000)"),
    ("scale a word", {"scale": "auto"}, "scale", "a number or None", "'auto'"),
    ("mask for is_causal", {"is_causal": torch.ones(3, 5) > 0}, "is_causal", "True or False", "Tensor"),
    ("is_causal None", {"is_causal": None}, "is_causal", "True or False", "NoneType"),
    ("center a word", {"center": "mean"}, "center", "True or False", "str"),
    ("signed a number", {"signed": 1.0}, "signed", "True or False", "float"),
    ("unknown backend", {"backend": "cuda"}, "backend", "one of auto, cpu, triton, torch, reference", "'cuda'"),
    ("backend a list", {"backend": ["torch"]}, "backend", "one of auto, cpu, triton, torch, reference", "['torch']"),
]


@pytest.mark.parametrize(
    ("changed", "subject", "expected", "got"), [r[1:] for r in BAD_CALLS], ids=[r[0] for r in BAD_CALLS]
)
def test_a_bad_call_is_refused_by_name(changed, subject, expected, got):
    with pytest.raises(OperatorError) as caught:
        inhibitor_attention(**{"query": Q, "key": K, "value": K} | changed)
    error = caught.value
    assert isinstance(error, InhibitorError)
    assert isinstance(error, ValueError)
    assert error.subject == subject
    assert expected in error.expected
    assert got in error.got
    assert len(error.remedy) > 10
    assert str(error) == f"{subject}: expected {error.expected}, got {error.got}. {error.remedy}"
    assert Path(caught.traceback[-1].path).name in ("checks.py", "backends.py")  # not in a deeper layer


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"attn_mask": torch.zeros(3, 5)}, "additive_mask == 0"),
        ({"attn_mask": torch.ones(3, 5).long()}, "mask.bool()"),
        ({"key": NESTED}, "to_padded_tensor"),
        ({"attn_mask": torch.ones(2, 5) > 0}, "mask[:, None, None, :]"),
        ({"key": K[:, :2], "value": K[:, :2]}, "enable_gqa=True"),
        ({"backend": "opencl"}, "Known: auto, cpu, triton, torch, reference."),
        ({"backend": "torhc"}, "Did you mean 'torch'?"),
    ],
    ids=["additive mask", "tokenizer's mask", "nested key", "padding mask", "grouped heads", "far name", "near name"],
)
def test_the_remedy_is_what_to_write(changed, remedy):
    with pytest.raises(OperatorError, match=re.escape(remedy)):
        inhibitor_attention(**{"query": Q, "key": K, "value": K} | changed)


FORWARD_MODE = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x.flip(2),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "of a sum": lambda function, x: torch.func.jvp(lambda x: function(x).sum(), (x,), (x.flip(2),))[1],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("kind", FORWARD_MODE)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_forward_mode_is_the_references_alone_and_elsewhere_an_error(backend, kind):
    x = randn(1, 2, 3, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        return inhibitor_attention(x, x, x, delta=0.5, backend=backend)

    if backend == "reference":
        assert FORWARD_MODE[kind](function, x).any()
    else:
        with pytest.raises(OperatorError, match=r'a tangent.*backend="reference"'):
            FORWARD_MODE[kind](function, x)


@pytest.mark.parametrize("name", ["query", "key", "value", "gamma", "delta", "reach", "eta", "length_exponent"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_tangent_that_would_be_lost_is_refused_and_no_other(backend, name):
    given, _ = arguments(Case(1, 2, 2, 3, 5, 3, 4, parameters="per head", reach=True), torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given.tensors[name], torch.ones_like(given.tensors[name]))
        call = Arguments(given.tensors | {name: dual}, given.options)
        if backend == "reference" or name in ("eta", "length_exponent"):
            assert forward_ad.unpack_dual(call(backend)).tangent.any()
        else:
            with pytest.raises(OperatorError, match=r"inhibitor_attention: expected .*a tangent"):
                call(backend)
