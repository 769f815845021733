"""The native kernels, for every instruction set that this processor can run."""

import itertools
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from inhibitor import inhibitor_attention
from inhibitor.errors import OperatorError
from inhibitor.ops import blocked, cpu
from tests.ops.cases import BY_DTYPE, FACTOR, LUCK, Arguments, Case, arguments, relative_error, separate, sizes
from tests.ops.layouts import LAYOUTS, beyond_two_to_the_31st, check_strides, equal

pytestmark = pytest.mark.skipif(not cpu.INSTALLED, reason="the package was installed without its native kernels")
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Case(3, 4, 2, 17, 13, 5, 6, mask="bhqk", is_causal=True, parameters="per head")
FEW = Case(3, 4, 2, 2, 13, 5, 6, mask="bhqk", is_causal=True, parameters="per head")  # read where they lie
LARGE = Case(1, 2, 2, 300, 300, 33, 20, mask="k", is_causal=True, parameters="per head")  # several parts and blocks


@pytest.fixture
def threads():
    """Set how many threads PyTorch has; afterwards it has what it had."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_a_process(program: str, *arguments: str, seconds: float = 60) -> str:
    """What a program prints that runs by itself and must end in time."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(("dtype", "case"), BY_DTYPE, ids=str)
def test_errs_at_most_twice_as_much_as_the_plain_formula(dtype, case, record_property):
    """And the instruction sets differ from each other by no more than that."""
    given, grad = arguments(case, dtype)
    given = separate(case, given)
    size = sizes(case, given, grad)
    plain = given.to(torch.float32).with_gradients(grad, "reference")  # half precision is accumulated in float32
    truth = given.to(torch.float64).with_gradients(grad, "reference")
    results = {}
    for name in cpu.instruction_sets():
        with cpu.using(name):
            results[name] = given.with_gradients(grad, "cpu")
    for tensor, true in truth.items():
        allowed = FACTOR * relative_error(plain[tensor].to(results[name][tensor].dtype), true, size[tensor]) + LUCK
        for name, found in results.items():
            assert found[tensor].shape == true.shape
            assert found[tensor].dtype == (dtype if true.dim() == 4 else torch.float32)
            error = relative_error(found[tensor], true, size[tensor])
            assert error <= allowed, (name, tensor)
            record_property(f"error of cpu {dtype} {'forward' if tensor == 'output' else 'gradients'}", error)
        for one, other in itertools.combinations(results.values(), 2):
            assert relative_error(one[tensor], other[tensor].double(), size[tensor]) <= allowed, tensor


@pytest.mark.parametrize("offset", [3.0, 30.0], ids=str)
@pytest.mark.parametrize("queries", [2, 65], ids=["few queries", "many queries"])
@pytest.mark.parametrize("rule", ["everything", "causal", "causal, without the first key"])
def test_what_query_and_key_share_costs_no_digits(rule, queries, offset, instruction_set):
    """Σ|q − k| does not change when both move: nor may its error, beyond that of the moved inputs."""
    case = Case(1, 2, 2, queries, 65, 64, 32, parameters="numbers", is_causal=rule != "everything")
    given, grad = arguments(case, torch.float32)
    if "first" in rule:
        given.options["attn_mask"] = torch.arange(65) >= 1
        given.tensors["key"][:, :, 0] = -1e4
    given = separate(case, given)
    moved = {name: given.tensors[name] + offset for name in ("query", "key")}
    given = Arguments(given.tensors | moved, given.options)
    size = sizes(case, given, grad)
    truth = given.to(torch.float64).with_gradients(grad, "reference")
    plain, found = given.with_gradients(grad, "reference"), given.with_gradients(grad, "cpu")
    for name, true in truth.items():
        allowed = FACTOR * relative_error(plain[name], true, size[name]) + LUCK
        assert relative_error(found[name], true, size[name]) <= allowed, name


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("rule", ["everything", "masked", "causal"])
def test_ties_choose_as_autograd_of_the_reference_does(rule, center, signed, instruction_set):
    """Integers and quarters, eight keys: every sum and every mean of the whole row is exact in float32."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    tensors = {
        "query": integers(2, 4, 70, 3),
        "key": integers(2, 2, 8, 3),
        "value": integers(2, 2, 8, 4),
        "gamma": torch.tensor([1.0, 2.0, -1.0, 0.5]),
        "delta": torch.tensor([1.0, 0.0, -1.0, 0.25]),
    }
    # Four keys in sight, or of the first 1, 2, 4 and 8: means of a number that is no power of two are rounded.
    mask = torch.rand(2, 4, 70, 8, generator=generator).argsort(-1) < 4 if rule == "masked" else None
    if rule == "causal":
        mask = (torch.arange(70) >= 7) | torch.isin(torch.arange(70), torch.tensor([0, 1, 3]))
        mask = mask.view(70, 1).expand(-1, 8)
    options = {"attn_mask": mask, "is_causal": rule == "causal", "center": center, "signed": signed}
    given = Arguments(tensors, options | {"scale": 1.0, "enable_gqa": True})
    grad = integers(2, 4, 70, 4)
    found, expected = given.with_gradients(grad, "cpu"), given.with_gradients(grad, "reference")
    for name, truth in expected.items():  # but for the mean of the gradients, a few roundings
        assert relative_error(found[name], truth.double()) <= 4 * LUCK, name


@pytest.mark.parametrize("name", ["gamma", "delta"])
def test_a_row_with_one_key_in_sight_has_a_score_of_zero_and_no_slope(name, instruction_set):
    """S − mean S is 0 to the last bit where the mean is of one number: as in the first row of every causal call."""
    given, grad = arguments(Case(2, 3, 3, 40, 40, 20, 8), torch.float32)
    given.options.update(attn_mask=torch.eye(40, dtype=torch.bool))
    tensors = given.tensors | {"gamma": torch.full((3,), 0.7), "delta": torch.zeros(3)}
    found = Arguments(tensors, given.options).with_gradients(grad, "cpu")
    assert not found[name].any()
    assert not found["query"].any()
    assert not found["key"].any()


def test_a_query_that_is_its_key_has_distance_zero_and_no_slope(instruction_set):
    x = randn(2, 3, 40, 20)
    tensors = {"query": x, "key": x, "value": randn(2, 3, 40, 8, seed=1), "delta": torch.zeros(3)}
    given = Arguments(tensors, {"attn_mask": torch.eye(40, dtype=torch.bool), "center": False})
    found = given.with_gradients(randn(2, 3, 40, 8, seed=2), "cpu")
    assert torch.equal(found["output"], tensors["value"])
    assert not any(found[name].any() for name in ("query", "key", "delta"))


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a half-precision type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [1, 8], ids=["few queries", "many queries"])
def test_every_half_precision_number_is_read(queries, dtype, instruction_set):
    """One key, so that Z = 0 and the result is the value."""
    value = patterns(dtype).view(256, 1, 1, 256)
    query = torch.zeros(256, 1, queries, 4, dtype=dtype)
    options = blocked.Options(None, False, True, True, 1.0)
    found = cpu.forward(query, query[:, :, :1], value, torch.ones(1), torch.zeros(1), None, options)
    torch.testing.assert_close(found, value.float().expand_as(found), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_rounded_to_nearest_even(dtype, instruction_set):
    """The gradient of a value that passes is that of the result: all numbers of the type, those halfway, and beside."""
    exact = patterns(dtype).float()
    between = (exact[:-1].double() + exact[1:].double()).div(2).float()
    around = [torch.nextafter(between, torch.tensor(way)) for way in (-INF, INF)]
    grad = torch.cat([exact, between, *around])
    grad = torch.nn.functional.pad(grad, (0, -grad.numel() % 256)).view(-1, 1, 1, 256)
    query = torch.zeros(len(grad), 1, 1, 4, dtype=dtype)
    value = torch.ones(grad.shape, dtype=dtype)
    options = blocked.Options(None, False, True, True, 1.0)
    found = cpu.backward(grad, query, query, value, torch.ones(1), torch.zeros(1), None, options)[2]
    torch.testing.assert_close(found, grad.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [2, 33], ids=["few queries", "many queries"])
def test_half_precision_is_accumulated_in_float32(queries, dtype, instruction_set):
    """The registered operator's sum comes before the one rounding: as exact as for the same numbers in float32."""
    given, grad = arguments(Case(2, 2, 2, queries, 257, 64, 32, mask="bk"), dtype)
    options = blocked.Options(given.options["attn_mask"].expand(-1, 1, 1, -1), False, True, True, 0.125)

    def both(given: Arguments) -> tuple[torch.Tensor, ...]:
        query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
        inputs = (query, key, value, torch.ones(2), torch.zeros(2), None, options)
        return cpu.forward(*inputs), *cpu.backward(grad.float(), *inputs)

    for found, wide in zip(both(given), both(given.to(torch.float32)), strict=True):
        assert torch.equal(found, wide.to(found.dtype))
    assert both(given)[0].dtype == torch.float32


def test_half_precision_distances_do_not_overflow(instruction_set):
    """RELIABILITY, trap 3: Σ|q − k| passes float16's 65504 long before the inputs do."""
    for queries in (1, 9):
        query = torch.full((1, 1, queries, 64), 3e4, dtype=torch.float16)
        key = torch.stack([-query[0, :, 0], query[0, :, 0]], 1).unsqueeze(0)
        value = torch.tensor([[1.0], [2.0]], dtype=torch.float16).view(1, 1, 2, 1)
        result = inhibitor_attention(query, key, value, backend="cpu")
        assert result.flatten().tolist() == [2.0] * queries  # the far key is inhibited, the near one is not


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, FEW], ids=["many queries", "few queries"])
def test_strides_change_no_bit_and_no_input_is_written_to(case, layout, dtype, instruction_set):
    check_strides(case, layout, dtype, "cpu")


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "grad"])
@pytest.mark.parametrize("heads", [1, 2], ids=["few queries", "many queries"])
def test_elements_beyond_two_to_the_31st_are_found(heads, name, offset, instruction_set):
    """Of the operator itself: autograd would copy the gradient into a dense one."""
    case = Case(1, heads, 1, 3, 3, 4, 3)
    given, grad = arguments(case, torch.bfloat16)
    tensors = {name: tensor[:, :1] for name, tensor in given.tensors.items()} | {
        "grad": grad[:, :1].float(),
        "mask": torch.tensor([[True, True, False], [False, True, True], [True, False, True]]).view(1, 1, 3, 3),
    }

    def both(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        query, key, value, grad, mask = (tensors[name] for name in ("query", "key", "value", "grad", "mask"))
        query, grad = query.expand(-1, heads, -1, -1), grad.expand(-1, heads, -1, -1)
        options = blocked.Options(mask, False, True, True, 0.5)
        inputs = (query, key, value, torch.ones(heads), torch.zeros(heads), None, options)
        return [cpu.forward(*inputs), *cpu.backward(grad, *inputs)[:5]]

    expected = both(tensors)
    assert all(tensor.any() for tensor in expected)
    found = both(tensors | {name: beyond_two_to_the_31st(tensors[name], offset)})
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_conjugated_and_negated_views_are_what_they_mean(instruction_set):
    """PyTorch's lazy minus sign is not in the memory."""
    lazy = torch.view_as_complex(randn(1, 2, 9, 8, 2)).conj().imag
    assert lazy.is_neg()
    plain = lazy.resolve_neg()
    assert torch.equal(*(inhibitor_attention(x, plain + 1, x, backend="cpu") for x in (lazy, plain)))


@pytest.mark.parametrize("poison", [NAN, 1e30])
@pytest.mark.parametrize("case", [SMALL, FEW, LARGE], ids=["many queries", "few queries", "several blocks"])
def test_uninitialised_memory_does_not_show(case, poison, instruction_set, monkeypatch):
    """Neither what results are written to nor what a thread has kept from a call with other numbers."""
    given, grad = arguments(case, torch.float32)
    expected = given.with_gradients(grad, "cpu")
    other = Arguments({name: torch.full_like(t, poison) for name, t in given.tensors.items()}, given.options)
    empty, poured = torch.empty, []

    def poisoned(*args, **options):
        poured.append(args)
        return empty(*args, **options).fill_(poison)

    monkeypatch.setattr(torch, "empty", poisoned)
    other.with_gradients(grad, "cpu")
    assert equal(given.with_gradients(grad, "cpu"), expected)
    assert poured


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype, instruction_set):
    given, grad = arguments(SMALL, torch.float32)
    expected = given.with_gradients(grad, "cpu")
    found = in_a_process(
        """
        import sys, torch
        from inhibitor.ops import cpu, operator
        from tests.ops.cases import arguments
        from tests.ops.layouts import equal
        from tests.ops.test_cpu import FEW, SMALL
        with cpu.using(sys.argv[1]):
            for case in (FEW, SMALL):
                given, grad = arguments(case, torch.float32)
                expected = given.with_gradients(grad, "cpu")
                torch.set_default_dtype(getattr(torch, sys.argv[2]))
                found = given.with_gradients(grad, "cpu")
                torch.set_default_dtype(torch.float32)
                print(all(found[n].dtype == t.dtype for n, t in expected.items()) and equal(found, expected))
        """,
        instruction_set,
        str(dtype).removeprefix("torch."),
    )
    assert found == "True\nTrue"
    assert equal(given.with_gradients(grad, "cpu"), expected)


# Masks of (2, 4, 9, 70): as given, how they broadcast.
MASK_SHAPES = [
    *itertools.product((1, 2), (1, 4), (1, 9), (1, 70)),
    *itertools.product((1, 4), (1, 9), (1, 70)),
    *itertools.product((1, 9), (1, 70)),
    (70,),
    (1,),
    (),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("queries", [2, 9], ids=["few queries", "many queries"])
def test_every_form_of_a_mask_is_the_mask_written_out(queries, is_causal, shape, instruction_set):
    case = Case(2, 4, 4, 9, 70, 5, 6, is_causal=is_causal)
    given, grad = arguments(case, torch.float32)
    if queries == 2:
        given.tensors["query"], grad = given.tensors["query"][:, :, 7:], grad[:, :, 7:]
        shape = tuple(2 if size == 9 else size for size in shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.6
    full = mask.expand(2, 4, queries, 70)
    expanded, dense = (Arguments(given.tensors, given.options | {"attn_mask": m}) for m in (mask, full.contiguous()))
    expected = dense.with_gradients(grad, "cpu")
    assert equal(expanded.with_gradients(grad, "cpu"), expected)
    strided = Arguments(given.tensors, given.options | {"attn_mask": full})  # stride 0
    assert equal(strided.with_gradients(grad, "cpu"), expected)
    truth = dense.to(torch.float64).with_gradients(grad, "reference")
    for name, tensor in truth.items():
        assert relative_error(expected[name], tensor) <= 20 * LUCK, name


def test_a_mask_of_bytes_other_than_one_is_true_all_the_same(instruction_set):
    given, grad = arguments(Case(2, 4, 4, 9, 70, 5, 6, mask="bhqk"), torch.float32)
    mask = given.options["attn_mask"]
    odd = (mask.byte() * torch.randint(1, 256, mask.shape, generator=torch.Generator().manual_seed(0))).byte()
    given.options["attn_mask"] = odd.view(torch.bool)
    found = given.with_gradients(grad, "cpu")
    given.options["attn_mask"] = mask
    assert equal(found, given.with_gradients(grad, "cpu"))


@pytest.mark.parametrize(("queries", "keys"), [(3, 70), (70, 3), (70, 200), (200, 70), (1, 5), (5, 1)])
def test_causal_is_aligned_to_the_top_left_whatever_the_lengths(queries, keys, instruction_set):
    given, grad = arguments(Case(1, 2, 2, queries, keys, 8, 8, is_causal=True), torch.float32)
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    explicit = Arguments(given.tensors, given.options | {"is_causal": False, "attn_mask": triangle})
    found, expected = given.with_gradients(grad, "cpu"), explicit.to(torch.float64).with_gradients(grad, "reference")
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= 20 * LUCK, name


def resident_growth(program: str) -> int:
    """MiB by which the resident peak of a process grows over ``run()``, of which it says what ``results`` take."""
    return int(
        in_a_process(
            "import resource, sys, torch\nfrom inhibitor import inhibitor_attention\nfrom inhibitor.ops import cpu\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            + textwrap.dedent(program)
            + "\nbefore = peak(); run(); print((peak() - before) // (2**20 if sys.platform == 'darwin' else 2**10))",
            seconds=300,
        )
    )


def test_an_expanded_mask_is_not_copied():
    """16 MiB as given; written out for 12 heads it would be 192."""
    growth = resident_growth(
        """
        q, k, v = torch.randn(3, 1, 12, 4096, 2)
        mask = torch.ones(1, 1, 4096, 4096, dtype=torch.bool).tril()
        def call(n):
            inhibitor_attention(q[:, :, :n], k, v, attn_mask=mask[:, :, :n].expand(-1, 12, -1, -1), backend="cpu")
        call(64)
        def run(): call(4096)
        """
    )
    assert growth < 100


MIB = 2**20
LENGTH, DIM, HEADS = 16384, 64, 2


def forward_bytes(length: int, dim: int, threads: int) -> int:
    """What csrc/forward.h takes, two copies of key and value a thread, beside 64 MiB for all else."""
    return 64 * MIB + threads * 2 * (length * 2 * dim * 4)


def backward_bytes(length: int, dim: int, heads: int, threads: int) -> int:
    """What csrc/backward.h takes: key and value thrice, three times 48 rows of scores; and 4 parts a thread to sum."""
    working = 3 * (length * 2 * dim * 4) + 3 * 48 * (length + 64) * 4
    parts = max(heads, 4 * threads + heads)
    return 64 * MIB + threads * working + parts * (length * 2 * dim * 4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_memory_at_16384_tokens_is_some_copies_of_the_inputs(backward, threads):
    """Two of twelve heads, to be done in seconds; queries × keys would be 2 GiB."""
    growth = resident_growth(
        f"""
        torch.set_num_threads({threads})
        q, k, v, g = (torch.randn(1, {HEADS}, {LENGTH}, {DIM}, requires_grad={backward}) for _ in range(4))
        def call(n):
            out = inhibitor_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], backend="cpu")
            if {backward}: torch.autograd.grad(out, (q, k, v), g.detach()[:, :, :n])
        call(64)
        results = [torch.ones(1, {HEADS}, {LENGTH}, {DIM}) for _ in range({4 if backward else 1})]
        del results
        def run(): call({LENGTH})
        """
    )
    bound = backward_bytes(LENGTH, DIM, HEADS, threads) if backward else forward_bytes(LENGTH, DIM, threads)
    assert growth * MIB <= bound


def test_memory_of_few_queries_does_not_grow_with_the_heads_that_share_a_key():
    """Their scores at once would be 128 MiB, and keys and values are 32."""
    growth = resident_growth(
        """
        q, k, v = torch.randn(4, 32, 4, 16), torch.randn(4, 1, 65536, 16), torch.randn(4, 1, 65536, 16)
        def call(n): inhibitor_attention(q, k[:, :, :n], v[:, :, :n], backend="cpu")
        call(64)
        def run(): call(65536)
        """
    )
    assert growth < 64


def test_few_queries_of_heads_in_groups_are_those_of_each_alone():
    """So many keys that the scores of two key heads at a time are held, of nine."""
    query, key, value = randn(3, 24, 4, 4), randn(3, 3, 65536, 4), randn(3, 3, 65536, 3)
    options: dict[str, Any] = {"delta": 0.5, "reach": 1.0, "length_exponent": 1.0, "enable_gqa": True, "backend": "cpu"}
    found = inhibitor_attention(query, key, value, **options)
    for batch, head in itertools.product(range(3), range(3)):
        alone = slice(batch, batch + 1), slice(8 * head, 8 * head + 8)
        shared = slice(batch, batch + 1), slice(head, head + 1)
        assert torch.equal(found[alone], inhibitor_attention(query[alone], key[shared], value[shared], **options))


@pytest.mark.skipif(sys.platform == "win32", reason="what cannot be had is another size there")
def test_memory_that_cannot_be_had_is_an_error_and_not_the_end():
    """2^46 keys of stride 0."""
    key = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**46, 1)
    for queries in (1, 9):
        with pytest.raises(MemoryError, match="no memory for"):
            inhibitor_attention(randn(1, 1, queries, 1), key, key, backend="cpu")
    given, _ = arguments(SMALL, torch.float32)
    assert relative_error(given("cpu"), given.to(torch.float64)("reference")) < 1e-5


THREADED = [
    LARGE,
    Case(1, 1, 1, 257, 90, 64, 64, is_causal=True),
    Case(1, 1, 1, 200, 100, 64, 64, is_causal=True, signed=False),
    Case(1, 1, 1, 128, 90, 64, 64, is_causal=True, signed=False),
    Case(1, 1, 1, 200, 75, 64, 64, is_causal=True, signed=False, center=False),
    Case(1, 2, 1, 130, 700, 33, 20, mask="qk", signed=False, parameters="per head"),
    Case(2, 8, 2, 70, 300, 60, 64, mask="bk", parameters="per head"),
    Case(1, 4, 4, 1, 3000, 64, 64),
    Case(2, 4, 2, 2, 3000, 64, 60, mask="bk", signed=False, parameters="per head"),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_changes_no_bit_of_the_result(case, instruction_set, threads):
    """Nor do two runs with as many threads differ in the gradients."""
    given, grad = arguments(case, torch.float32)
    assert case.batch * case.heads * case.queries * case.keys * (case.head_dim + case.value_dim) // 2 >= 2**18
    results = []
    for count in (1, 2, 3):
        threads(count)
        first, *others = (given.with_gradients(grad, "cpu") for _ in range(4))
        assert all(equal(other, first) for other in others)
        results.append(first)
    for other in results[1:]:
        assert torch.equal(other["output"], results[0]["output"])
        for name, tensor in results[0].items():  # summed in another order
            assert relative_error(other[name], tensor.double()) <= 100 * LUCK, name


def test_eight_threads_of_python_agree_with_one(instruction_set):
    """A thousand calls each, forward and backward, of several shapes."""
    shapes = [SMALL, FEW, Case(1, 1, 1, 9, 33, 4, 4), Case(2, 2, 2, 5, 5, 16, 3, is_causal=True)]
    calls = []
    for case in shapes:
        given, grad = arguments(case, torch.float32)
        options = blocked.Options(None, case.is_causal, True, True, 0.5)
        query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
        inputs = (query, key, value, torch.ones(case.heads), torch.zeros(case.heads), None, options)
        calls.append((grad, inputs, [cpu.forward(*inputs), *cpu.backward(grad, *inputs)]))
    start = threading.Barrier(8)

    def thousand_calls(offset: int) -> int:
        start.wait(timeout=30)
        wrong = 0
        for i in range(500):
            grad, inputs, expected = calls[(i + offset) % len(calls)]
            found = [cpu.forward(*inputs), *cpu.backward(grad, *inputs)]
            wrong += not all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(thousand_calls, range(8), timeout=60)) == [0] * 8


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_after_a_fork_the_child_computes_the_same(instruction_set):
    """Its parent's threads are not there, and waiting for them would take for ever."""
    found = in_a_process(
        """
        import os, sys, torch
        from inhibitor.ops import cpu
        from tests.ops.cases import arguments
        from tests.ops.layouts import equal
        from tests.ops.test_cpu import LARGE
        torch.set_num_threads(2)
        with cpu.using(sys.argv[1]):
            given, grad = arguments(LARGE, torch.float32)
            result = given("cpu")
            child = os.fork()
            if not child:
                os._exit(0 if torch.equal(given("cpu"), result) else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(given("cpu"), result))
        """,
        instruction_set,
        seconds=60,
    )
    assert found == "0 True"


def attend_to(rows: list[torch.Tensor]) -> torch.Tensor:
    """A collate function that calls the operator."""
    x = torch.stack(rows)
    return inhibitor_attention(x, x, x, backend="cpu")


@needs_fork
def test_workers_of_a_data_loader_may_call_it():
    found = in_a_process(
        """
        import torch
        from torch.utils.data import DataLoader
        from tests.ops.test_cpu import attend_to, randn
        torch.set_num_threads(2)
        data = list(randn(24, 2, 200, 16))
        expected = [attend_to(data[i : i + 4]) for i in range(0, 24, 4)]
        loader = DataLoader(data, batch_size=4, num_workers=2, collate_fn=attend_to, multiprocessing_context="fork")
        for _ in range(2):
            print(all(torch.equal(*pair) for pair in zip(loader, expected, strict=True)))
        """
    )
    assert found == "True\nTrue"


def test_an_instruction_set_that_is_not_there_is_refused_by_name():
    before = cpu.instruction_set()
    match = r"instruction set: expected one of .*portable, got 'avx1024'"
    with pytest.raises(OperatorError, match=match), cpu.using("avx1024"):
        pass
    assert cpu.instruction_set() == before == cpu.instruction_sets()[0]
    assert cpu.instruction_sets()[-1] == "portable"


def test_the_instruction_set_in_use_is_said_and_put_back():
    before = cpu.instruction_set()

    def fail() -> None:
        with cpu.using("portable"):
            assert cpu.instruction_set() == "portable"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert cpu.instruction_set() == before


def test_parameters_may_be_strided_and_in_float64(instruction_set):
    given, grad = arguments(SMALL, torch.float32)
    names = ("gamma", "delta", "eta", "length_exponent")
    strided = {name: torch.stack([given.tensors[name], torch.full((4,), NAN)], 1)[:, 0] for name in names}
    assert not strided["gamma"].is_contiguous()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in (given.tensors | strided).items()}
    output = Arguments(leaves, given.options)("cpu")
    found = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad), strict=True))
    expected = given.with_gradients(grad, "cpu")
    assert equal({"output": output.detach(), **found}, expected)
    wide = {name: tensor.double() if name in names else tensor for name, tensor in given.tensors.items()}
    found = Arguments(wide, given.options).with_gradients(grad, "cpu")
    assert all(found[name].dtype == wide[name].dtype for name in wide)
    assert all(relative_error(found[name], expected[name].double()) <= 4 * LUCK for name in expected)
