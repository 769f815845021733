"""The public function: what it accepts, what a mask hides."""

import pytest
import torch

from inhibitor import inhibitor_attention, which_backend
from inhibitor.ops import cpu
from tests.ops.cases import LUCK, TOLERANCES, Arguments, Case, arguments, relative_error

BACKENDS = [*(f"cpu-{name}" for name in cpu.instruction_sets()), "torch", "reference"]
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


Q = randn(2, 4, 3, 8)
K = randn(2, 4, 5, 8)


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


def test_the_default_device_is_not_asked_what_a_tensor_says():
    expected = which_backend(), inhibitor_attention(Q, K, K, length_exponent=0.5, reach=0.5, is_causal=True)
    with torch.device("meta"):
        found = which_backend(), inhibitor_attention(Q, K, K, length_exponent=0.5, reach=0.5, is_causal=True)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
