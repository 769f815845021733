"""The public function: what it accepts, what it refuses and how it says so, what a mask hides."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from inhibitor import InhibitorError, inhibitor_attention, which_backend
from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, operator, reference
from inhibitor.ops.attention import constant_in_graphs
from tests.ops.cases import LUCK, TOLERANCES, Arguments, Case, arguments, relative_error

BACKENDS = [*(f"cpu-{name}" for name in cpu.instruction_sets()), "torch", "reference"]
needs_kernels = pytest.mark.skipif(not cpu.INSTALLED, reason="the package was installed without its native kernels")
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


Q = randn(2, 4, 3, 8)
K = randn(2, 4, 5, 8)

# name, arguments that differ from a good call, the argument that the error names, what it says was expected, what came
BAD_CALLS = [
    ("query a list", {"query": [[1.0]]}, "query", "a tensor", "list"),
    ("key None", {"key": None}, "key", "a tensor", "NoneType"),
    ("query of rank 3", {"query": Q[0]}, "query", "4 dimensions", "(4, 3, 8)"),
    ("value of rank 5", {"value": K[None]}, "value", "4 dimensions", "(1, 2, 4, 5, 8)"),
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
    assert Path(caught.traceback[-1].path).name == "attention.py"  # said where the user enters, not in a deeper layer


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"attn_mask": torch.zeros(3, 5)}, "additive_mask == 0"),
        ({"attn_mask": torch.ones(2, 5) > 0}, "mask[:, None, None, :]"),
        ({"key": K[:, :2], "value": K[:, :2]}, "enable_gqa=True"),
        ({"backend": "opencl"}, "Known: auto, cpu, triton, torch, reference."),
        ({"backend": "torhc"}, "Did you mean 'torch'?"),
    ],
    ids=["additive mask", "padding mask", "grouped heads", "far name", "near name"],
)
def test_the_remedy_is_what_to_write(changed, remedy):
    with pytest.raises(OperatorError, match=re.escape(remedy)):
        inhibitor_attention(**{"query": Q, "key": K, "value": K} | changed)


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


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter", [1.5, torch.tensor(1.5), torch.ones(4, dtype=torch.float64)], ids=str)
def test_the_result_has_the_dtype_of_query(dtype, backend, parameter):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native kernels do not take float64")
    query, key = Q.to(dtype), K.to(dtype)
    names = ("gamma", "eta", "delta", "length_exponent", "reach")
    result = inhibitor_attention(query, key, key, backend=backend, **dict.fromkeys(names, parameter))
    assert (result.dtype, tuple(result.shape)) == (dtype, (2, 4, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_batch_and_heads_of_size_one_are_broadcast(backend):
    full = inhibitor_attention(Q, K[:1, :1].expand(2, 4, -1, -1), K[:, :1].expand(-1, 4, -1, -1), backend=backend)
    assert torch.equal(inhibitor_attention(Q, K[:1, :1], K[:, :1], backend=backend), full)
    one_query = inhibitor_attention(Q[:1], K, K, backend=backend)
    assert torch.equal(one_query, inhibitor_attention(Q[:1].expand(2, -1, -1, -1), K, K, backend=backend))
    assert torch.equal(
        inhibitor_attention(Q, K[:, :2], K[:, :1], enable_gqa=True, backend=backend),
        inhibitor_attention(Q, K[:, :2], K[:, :1].expand(-1, 2, -1, -1), enable_gqa=True, backend=backend),
    )


EMPTY = {
    "no batch": ((0, 4, 3, 8), (0, 4, 5, 8)),
    "no batch in query": ((0, 4, 3, 8), (1, 4, 5, 8)),
    "no batch in key": ((1, 4, 3, 8), (0, 4, 5, 8)),
    "no heads": ((2, 0, 3, 8), (2, 0, 5, 8)),
    "no query heads": ((2, 0, 3, 8), (2, 1, 5, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 5, 8)),
    "no keys": ((2, 4, 3, 8), (2, 4, 0, 8)),
    "neither": ((2, 4, 0, 8), (2, 4, 0, 8)),
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("masked", ["full", "causal", "padding"])
@pytest.mark.parametrize(("query", "key"), EMPTY.values(), ids=EMPTY)
def test_empty_inputs_give_zeros_and_zero_gradients(query, key, masked, backend):
    query, key = randn(*query).requires_grad_(), randn(*key).requires_grad_()
    value = randn(*key.shape[:3], 6).requires_grad_()
    heads = query.shape[1]
    names = ("gamma", "eta", "delta", "length_exponent", "reach")
    leaves = {"query": query, "key": key, "value": value}
    leaves |= {name: torch.full((heads,), 0.5, requires_grad=True) for name in names}
    mask = torch.ones(key.shape[2], dtype=torch.bool) if masked == "padding" else None
    result = Arguments(leaves, {"attn_mask": mask, "is_causal": masked == "causal"})(backend)
    batch = 0 if 0 in (query.shape[0], key.shape[0]) else query.shape[0]
    assert result.shape == (batch, heads, query.shape[2], 6)
    assert not result.any()
    torch.autograd.backward(result.sum())
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# What hides all of the keys 2 and 5 in batch 1, and leaves enough else to see.
def hiding(kind: str) -> tuple[Case, torch.Tensor]:
    case = Case(2, 4, 2, 5, 7, 3, 4, parameters="per head", is_causal="causal" in kind, reach=True)
    allowed = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    if "arbitrary" in kind:
        allowed = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    allowed[1, :, :, [2, 5]] = False
    return case, allowed[:, :1, :1] if "padding" in kind else allowed


HIDING = ["padding", "arbitrary", "padding and causal", "arbitrary and causal"]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30], ids=str)
@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("options", [{}, {"center": False}, {"signed": False}], ids=["plain", "uncentred", "unsigned"])
def test_what_lies_in_keys_that_none_may_see_changes_no_bit(options, kind, garbage, backend):
    case, allowed = hiding(kind)
    given, grad = arguments(case, torch.float32)
    given.options.update(options, attn_mask=allowed)

    def filled(number: float) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
        for name in ("key", "value"):
            tensors[name][1, :, [2, 5]] = number
        return Arguments(tensors, given.options).with_gradients(grad, backend)

    found, expected = filled(garbage), filled(0.0)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert tensor.isfinite().all()
    assert not found["key"][1, :, [2, 5]].any()
    assert not found["value"][1, :, [2, 5]].any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30], ids=str)
def test_keys_after_the_last_query_are_hidden_by_the_causal_rule(garbage, backend):
    given, grad = arguments(Case(1, 2, 2, 3, 6, 3, 4, is_causal=True), torch.float32)

    def filled(number: float) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
        tensors["key"][:, :, 3:] = tensors["value"][:, :, 3:] = number
        return Arguments(tensors, given.options).with_gradients(grad, backend)

    found, expected = filled(garbage), filled(0.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("kind", HIDING)
def test_what_is_not_finite_reaches_all_that_may_see_it_and_nothing_else(kind, name, garbage, backend):
    case, allowed = hiding(kind)
    given, _ = arguments(case, torch.float32)
    options = given.options | {"attn_mask": allowed}
    clean = Arguments(given.tensors, options)(backend)
    tensors = given.tensors | {name: given.tensors[name].clone()}
    tensors["eta"] = torch.ones(4)  # ∞ · 0 is another matter
    clean = Arguments(given.tensors | {"eta": torch.ones(4)}, options)(backend)

    sees = allowed.expand(2, 4, 5, 7) & (torch.ones(5, 7, dtype=torch.bool).tril() if case.is_causal else True)
    reached = torch.zeros(2, 4, 5, 4, dtype=torch.bool)
    if name == "query":
        tensors[name][0, 1, 3, 2] = garbage
        reached[0, 1, 3] = sees[0, 1, 3].any()
    else:
        tensors[name][0, 1, 3, 2] = garbage  # key head 1 serves heads 2 and 3
        features = slice(None) if name == "key" else slice(2, 3)
        reached[0, 2:, :, features] = sees[0, 2:, :, 3, None]
    assert reached.any()

    found = Arguments(tensors, options)(backend)
    assert torch.equal(~found.isfinite(), reached)
    assert torch.equal(found[~reached], clean[~reached])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["about zero", "far from zero"])
@pytest.mark.parametrize("kind", ["arbitrary", "causal"])
@pytest.mark.parametrize("queries", [2, 40], ids=["few queries", "many queries"])
def test_what_other_queries_see_changes_no_bit_of_one_that_does_not(queries, kind, offset, garbage, backend):
    """Nor does a number so large that in a sum with it all others would be lost."""
    case = Case(2, 2, 2, queries, 40, 3, 4, mask="bhqk" if kind == "arbitrary" else None, is_causal=kind == "causal")
    given, _ = arguments(case, torch.float32)
    for name in ("query", "key"):
        given.tensors[name] += offset
    clean = given(backend)
    mask = given.options["attn_mask"]
    allowed = torch.ones(queries, 40, dtype=torch.bool).tril() if mask is None else mask
    blind = ~allowed.expand(2, 2, queries, 40)[..., 20]
    assert blind.any()
    assert queries == 2 or not blind.all()
    given.tensors["key"][:, :, 20] = given.tensors["value"][:, :, 20] = garbage
    assert torch.equal(given(backend)[blind], clean[blind])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", ["gamma", "eta", "delta", "length_exponent", "reach"])
def test_a_parameter_that_is_nan_reaches_its_head_only(name, backend):
    given, _ = arguments(Case(2, 4, 4, 3, 5, 3, 4, parameters="per head", reach=True), torch.float32)
    clean = given(backend)
    given.tensors[name][2] = NAN
    found = given(backend)
    assert found[:, 2].isnan().all()
    assert torch.equal(found[:, [0, 1, 3]], clean[:, [0, 1, 3]])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_without_centring_an_infinitely_far_key_is_inhibited_whole(backend):
    key = K.clone()
    key[:, :, 2, 0] = INF
    found = inhibitor_attention(Q, key, K, center=False, backend=backend)
    seen = torch.arange(5) != 2
    expected = inhibitor_attention(Q, K, K, center=False, attn_mask=seen, backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("is_causal", [False, True], ids=["mask", "mask and causal"])
def test_a_query_that_sees_no_key_gets_zero_and_passes_no_gradient_back(is_causal, backend):
    case = Case(2, 4, 2, 5, 7, 3, 4, mask="bhqk", is_causal=is_causal, parameters="per head", reach=True)
    given, grad = arguments(case, torch.float32 if backend == "cpu" else torch.float64)
    allowed = given.options["attn_mask"]
    allowed[0] = allowed[:, :, 2] = allowed[1, 1:3, 4] = False
    if is_causal:
        allowed[:, :, 1, :2] = False  # sees keys 2 to 6 by the mask, 0 and 1 by the causal rule
        allowed[:, :, 1, 2:] = True
    sees = (allowed & torch.ones(5, 7, dtype=torch.bool).tril()) if is_causal else allowed
    blind = ~sees.any(-1)
    assert not blind.all()

    found = given.with_gradients(grad, backend)
    assert torch.equal(found["output"][blind], torch.zeros_like(found["output"][blind]))
    assert found["output"][~blind].any(-1).float().mean() > 0.5
    assert torch.equal(found["query"][blind], torch.zeros_like(found["query"][blind]))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["key"][0].any()
    assert not found["value"][0].any()
    quiet = given.with_gradients(grad.masked_fill(blind.unsqueeze(-1), 0), backend)
    assert all(torch.equal(found[name], quiet[name]) for name in found)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_padded_batch_equals_its_rows_unpadded(backend):
    """RELIABILITY, trap 1, at the level of the operator: every row with as many keys and queries as it has."""
    dtype, tolerance = (torch.float32, 4 * LUCK) if backend == "cpu" else (torch.float64, TOLERANCES["float64"])
    given, _ = arguments(Case(3, 2, 2, 8, 8, 4, 4, parameters="per head", reach=True), dtype)
    lengths = (8, 5, 1)
    padding = torch.arange(8) < torch.tensor(lengths).view(3, 1, 1, 1)
    for is_causal in (False, True):
        options = given.options | {"is_causal": is_causal}
        padded = Arguments(given.tensors, options | {"attn_mask": padding})(backend)
        for row, length in enumerate(lengths):
            cut = {name: t[row : row + 1, :, :length] if t.dim() == 4 else t for name, t in given.tensors.items()}
            alone = Arguments(cut, options)(backend)
            assert relative_error(padded[row : row + 1, :, :length], alone.double()) <= tolerance


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


def test_the_default_device_is_not_asked_what_a_tensor_says():
    expected = which_backend(), inhibitor_attention(Q, K, K, length_exponent=0.5, reach=0.5, is_causal=True)
    with torch.device("meta"):
        found = which_backend(), inhibitor_attention(Q, K, K, length_exponent=0.5, reach=0.5, is_causal=True)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_what_a_graph_takes_as_constant_is_marked_as_pytorch_marks_it():
    ours, theirs = (mark(lambda: 0) for mark in (constant_in_graphs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}
