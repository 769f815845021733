"""What must stay equal, or change in a known way, in random cases; hypothesis prints the case that fails."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inhibitor.ops import blocked, cpu, masks
from inhibitor.ops.masks import UNHEARD
from tests.ops.cases import (
    HEADS,
    LUCK,
    MASKS,
    PARAMETERS,
    TOLERANCES,
    Arguments,
    Case,
    arguments,
    relative_error,
    sizes,
)

EXAMPLES = 100  # for each property: 1200 cases in all

few = st.integers(1, 7)
flag = st.booleans()


def cases_of(size: st.SearchStrategy[int]) -> st.SearchStrategy[Case]:
    return st.builds(
        lambda heads, **rest: Case(heads=heads[0], key_heads=heads[1], **rest),
        heads=st.sampled_from(HEADS),
        batch=st.integers(1, 3),
        queries=size,
        keys=size,
        head_dim=size,
        value_dim=size,
        mask=st.sampled_from(MASKS),
        is_causal=flag,
        center=flag,
        signed=flag,
        parameters=st.sampled_from(PARAMETERS),
        reach=flag,
    )


cases = cases_of(few)
seeds = st.integers(0, 10**6)


def random_cases(test):
    """A test run on many cases, the same ones each time."""
    return settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)(given(cases, seeds)(test))


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Several tiles in most cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "CPU_TILE", 150)
        yield


def changed(call: Arguments, options: dict[str, Any] | None = None, /, **tensors: torch.Tensor) -> Arguments:
    return Arguments(call.tensors | tensors, call.options | (options or {}))


def dense_mask(case: Case, call: Arguments) -> torch.Tensor:
    """The whole rule, so that ``is_causal`` may be dropped and the keys be moved."""
    allowed = masks.dense(call.options["attn_mask"], case.is_causal, case.queries, case.keys, torch.device("cpu"))
    return allowed.expand(case.batch, case.heads, case.queries, case.keys)


def one_head(case: Case, call: Arguments, allowed: torch.Tensor, head: int) -> Arguments:
    """A call of one query head and its key head; ``allowed`` is the dense mask of all."""
    key_head = head * case.key_heads // case.heads
    tensors = {name: call.tensors[name][:, key_head : key_head + 1] for name in ("key", "value")}
    tensors["query"] = call.tensors["query"][:, head : head + 1]
    for name in set(call.tensors) - set(tensors):
        parameter = call.tensors[name]
        tensors[name] = parameter[head : head + 1] if parameter.numel() > 1 else parameter
    return changed(call, {"attn_mask": allowed[:, head : head + 1]}, **tensors)


def lengthened(tensor: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """A tensor with rows of large numbers behind its own."""
    generator = torch.Generator().manual_seed(seed)
    more = 100 * torch.randn(*tensor.shape[:2], rows, tensor.shape[3], generator=generator, dtype=tensor.dtype)
    return torch.cat([tensor, more], 2)


def padded(case: Case, call: Arguments, seed: int) -> Arguments:
    """A call with two more queries and three more keys, which the mask hides."""
    more = {"query": 2, "key": 3, "value": 3}
    tensors = {name: lengthened(call.tensors[name], rows, seed + rows) for name, rows in more.items()}
    allowed = torch.nn.functional.pad(dense_mask(case, call), (0, 3, 0, 2), value=False)
    return changed(call, {"attn_mask": allowed}, **tensors)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= TOLERANCES["float64"]


@random_cases
def test_the_order_of_the_keys_does_not_matter(case, seed):
    call, grad = arguments(case, seed=seed)
    call = changed(call, {"attn_mask": dense_mask(case, call), "is_causal": False})
    order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(seed))
    key, value = (call.tensors[name][:, :, order] for name in ("key", "value"))
    permuted = changed(call, {"attn_mask": call.options["attn_mask"][..., order]}, key=key, value=value)
    found, expected = permuted.with_gradients(grad), call.with_gradients(grad)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor[:, :, order] if name in ("key", "value") else tensor)


@random_cases
def test_queries_do_not_see_each_other(case, seed):
    call, _ = arguments(case, seed=seed)
    call = changed(call, {"attn_mask": dense_mask(case, call), "is_causal": False})
    order = torch.randperm(case.queries, generator=torch.Generator().manual_seed(seed))[: 1 + case.queries // 2]
    some = {"attn_mask": call.options["attn_mask"][:, :, order]}
    assert_equal(changed(call, some, query=call.tensors["query"][:, :, order])(), call()[:, :, order])


@random_cases
def test_a_batch_is_its_rows(case, seed):
    call, grad = arguments(case, seed=seed)
    call = changed(call, {"attn_mask": dense_mask(case, call)})
    rows = []
    for row in range(case.batch):
        tensors = {name: call.tensors[name][row : row + 1] for name in ("query", "key", "value")}
        alone = changed(call, {"attn_mask": call.options["attn_mask"][row : row + 1]}, **tensors)
        rows.append(alone.with_gradients(grad[row : row + 1]))
    for name, tensor in call.with_gradients(grad).items():
        parts = [found[name] for found in rows]
        assert_equal(torch.cat(parts) if tensor.dim() == 4 else torch.stack(parts).sum(0), tensor)


@random_cases
def test_heads_are_apart(case, seed):
    call, _ = arguments(case, seed=seed)
    allowed, together = dense_mask(case, call), call()
    for head in range(case.heads):
        alone = one_head(case, call, allowed, head)
        assert_equal(alone(), together[:, head : head + 1])


@random_cases
def test_grouped_heads_are_repeated_ones(case, seed):
    call, _ = arguments(case, seed=seed)
    tensors = {name: call.tensors[name].repeat_interleave(case.heads // case.key_heads, 1) for name in ("key", "value")}
    assert_equal(changed(call, {"enable_gqa": False}, **tensors)(), call())


@random_cases
def test_padding_changes_nothing(case, seed):
    call, grad = arguments(case, seed=seed)
    found = padded(case, call, seed).with_gradients(lengthened(grad, 2, seed))
    for name, tensor in call.with_gradients(grad).items():
        assert_equal(found[name][:, :, : tensor.shape[2]] if tensor.dim() == 4 else found[name], tensor)


@random_cases
def test_the_slope_scales_query_and_key(case, seed):
    """γ · c |q − k| = γ |c q − c k|."""
    call, _ = arguments(case, seed=seed)
    scaled = {name: 1.7 * call.tensors[name] for name in ("query", "key")}
    if "gamma" in call.tensors:
        steeper = changed(call, gamma=1.7 * call.tensors["gamma"])
    else:
        steeper = changed(call, {"gamma": 1.7 * call.options.get("gamma", 1.0)})
    assert_equal(steeper(), changed(call, {}, **scaled)())
    assert_equal(changed(call, {"scale": 1.7 * case.head_dim**-0.5})(), changed(call, {}, **scaled)())


@random_cases
def test_the_length_exponent_divides_by_a_power_of_the_keys_in_sight(case, seed):
    call, _ = arguments(case, seed=seed)
    count = dense_mask(case, call).sum(-1, keepdim=True).clamp(min=1).double()
    tensors = {name: t for name, t in call.tensors.items() if name not in ("length_exponent", "reach")}
    plain = changed(Arguments(tensors, call.options), {"length_exponent": 0.0, "reach": None})
    exponents = torch.tensor([0.0, 0.4, 1.0, -0.5], dtype=torch.float64)[: case.heads]
    powered = changed(plain, {"length_exponent": exponents})
    assert_equal(powered(), plain() * count ** -exponents.view(-1, 1, 1))
    assert_equal(changed(plain, {"length_exponent": 0.7})(), plain() * count**-0.7)
    everything = changed(plain, {"length_exponent": exponents, "reach": 1e15})  # nothing is out of such a reach
    assert_equal(everything(), plain() * (count + UNHEARD) ** -exponents.view(-1, 1, 1))


@random_cases
def test_a_gain_for_each_query_scales_its_row(case, seed):
    call, _ = arguments(case, seed=seed)
    gain = torch.randn(case.batch, case.heads, case.queries, generator=torch.Generator().manual_seed(seed)).double()
    plain = changed(Arguments({n: t for n, t in call.tensors.items() if n != "eta"}, call.options), {"eta": 1.0})
    assert_equal(changed(plain, {"eta": gain})(), plain() * gain.unsqueeze(-1))


@random_cases
def test_centring_takes_out_what_all_scores_share(case, seed):
    """A feature in which every key is 3 away from every query adds 3 · scale to all scores."""
    call, _ = arguments(case, seed=seed)
    call = changed(call, {"scale": 0.6})
    query, key = (call.tensors[name] for name in ("query", "key"))
    query, key = torch.nn.functional.pad(query, (0, 1), value=3.0), torch.nn.functional.pad(key, (0, 1))
    moved = changed(call, query=query, key=key)
    if case.center:
        assert_equal(moved(), call())
    else:  # δ makes up for it
        parameters = {"gamma": 1.0, "delta": 0.0} | call.options | call.tensors
        gamma, delta = (torch.as_tensor(parameters[name], dtype=torch.float64) for name in ("gamma", "delta"))
        shifted = (delta + 3 * 0.6 * gamma).expand(case.heads)
        options = {name: option for name, option in call.options.items() if name != "delta"}
        assert_equal(Arguments(call.tensors | {"delta": shifted}, options)(), moved())


@random_cases
def test_causal_is_the_lower_triangle(case, seed):
    call, grad = arguments(case, seed=seed)
    mask = call.options["attn_mask"]
    triangle = torch.ones(case.queries, case.keys, dtype=torch.bool).tril()
    explicit = changed(call, {"is_causal": False, "attn_mask": triangle if mask is None else triangle & mask})
    found, expected = explicit.with_gradients(grad), changed(call, {"is_causal": True}).with_gradients(grad)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor)


@random_cases
def test_the_signed_form_is_odd_and_made_of_two_unsigned_ones(case, seed):
    """H(−V) = −H(V), and H(V) = U(V⁺) − U((−V)⁺) with U the unsigned form."""
    call, _ = arguments(case, seed=seed)
    value = call.tensors["value"]
    signed, unsigned = ({"signed": choice} for choice in (True, False))
    expected = changed(call, signed)()
    assert_equal(-changed(call, signed, value=-value)(), expected)
    both = (changed(call, unsigned, value=part.relu())() for part in (value, -value))
    assert_equal(next(both) - next(both), expected)


@random_cases
def test_eta_scales_the_result(case, seed):
    call, _ = arguments(case, seed=seed)
    plain = Arguments({name: t for name, t in call.tensors.items() if name != "eta"}, call.options)
    plain = changed(plain, {"eta": 1.0})
    factors = torch.tensor([0.0, 1.5, -2.0, 1.0], dtype=torch.float64)[: case.heads]
    assert_equal(changed(plain, {"eta": factors})(), plain() * factors.view(-1, 1, 1))
    assert_equal(changed(plain, {"eta": -0.5})(), plain() * -0.5)


# The native kernels in float32: 250 cases for each of four properties, more lengths than fill a vector among them.
native = pytest.mark.skipif(not cpu.INSTALLED, reason="the package was installed without its native kernels")
native_cases = cases_of(st.integers(1, 40))


def random_native_cases(test):
    """The instruction sets in turn, by the seed."""

    def each(case, seed):
        names = cpu.instruction_sets()
        with cpu.using(names[seed % len(names)]):
            test(case, seed)

    each.__name__ = test.__name__
    return native(
        settings(max_examples=250, deadline=None, derandomize=True, database=None)(given(native_cases, seeds)(each))
    )


def assert_close(case: Case, call: Arguments, found: torch.Tensor, expected: torch.Tensor, grad: torch.Tensor) -> None:
    assert relative_error(found, expected.double(), sizes(case, call, grad)["output"]) <= 4 * LUCK


@random_native_cases
def test_native_the_order_of_the_keys_does_not_matter(case, seed):
    call, grad = arguments(case, torch.float32, seed)
    call = changed(call, {"attn_mask": dense_mask(case, call), "is_causal": False})
    order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(seed))
    key, value = (call.tensors[name][:, :, order] for name in ("key", "value"))
    permuted = changed(call, {"attn_mask": call.options["attn_mask"][..., order]}, key=key, value=value)
    assert_close(case, call, permuted("cpu"), call("cpu"), grad)


@random_native_cases
def test_native_a_batch_is_its_rows_to_the_last_bit(case, seed):
    call, grad = arguments(case, torch.float32, seed)
    call = changed(call, {"attn_mask": dense_mask(case, call)})
    rows = []
    for row in range(case.batch):
        tensors = {name: call.tensors[name][row : row + 1] for name in ("query", "key", "value")}
        alone = changed(call, {"attn_mask": call.options["attn_mask"][row : row + 1]}, **tensors)
        rows.append(alone.with_gradients(grad[row : row + 1], "cpu"))
    for name, tensor in call.with_gradients(grad, "cpu").items():
        if tensor.dim() == 4:
            assert torch.equal(torch.cat([found[name] for found in rows]), tensor), name


@random_native_cases
def test_native_heads_are_apart_to_the_last_bit(case, seed):
    call, _ = arguments(case, torch.float32, seed)
    allowed = dense_mask(case, call)
    together = changed(call, {"attn_mask": allowed})("cpu")
    for head in range(case.heads):
        alone = one_head(case, call, allowed, head)
        assert torch.equal(alone("cpu"), together[:, head : head + 1])


@random_native_cases
def test_native_padding_changes_nothing(case, seed):
    call, grad = arguments(case, torch.float32, seed)
    found = padded(case, call, seed)("cpu")[:, :, : case.queries]
    assert_close(case, call, found, call("cpu"), grad)
