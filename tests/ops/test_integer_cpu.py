"""The native integer kernels: the reference's bits, for every instruction set that this processor can run."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from inhibitor import IntegerGrid, inhibitor_attention_int8
from inhibitor.errors import OperatorError
from inhibitor.ops import IntegerCache, cpu, integer_attention, integer_cpu, quantize_query_key, quantize_value
from tests.ops.cases import SWEEP, Case
from tests.ops.integer_cases import attend, codes, floats_of, grid_of, options_of
from tests.ops.layouts import LAYOUTS, beyond_two_to_the_31st

pytestmark = pytest.mark.skipif(not integer_cpu.INSTALLED, reason="the package was installed without its kernels")
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = Case(3, 4, 2, 17, 13, 5, 6, mask="bhqk", is_causal=True)
LARGE = Case(1, 4, 2, 150, 1100, 60, 40, mask="bk", reach=True)  # several blocks of keys and of rows
BEYOND = Case(2, 2, 2, 70, 600, 64, 64, is_causal=True, reach=True)


@pytest.fixture(params=integer_cpu.instruction_sets())
def integer_set(request):
    """Each instruction set of this build and processor in turn."""
    with integer_cpu.using(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Set how many threads PyTorch has; afterwards it has what it had."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", [*SWEEP, LARGE, BEYOND], ids=str)
def test_has_the_references_bits(case):
    query, key, value = codes(case)
    grid, options = grid_of(case), options_of(case)
    expected = integer_attention(query, key, value, grid, **options, backend="reference")
    for name in integer_cpu.instruction_sets():
        with integer_cpu.using(name):
            found = integer_attention(query, key, value, grid, **options, backend="cpu")
        assert found.dtype == torch.int32
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, LARGE, *SWEEP[::40]], ids=str)
def test_puts_floats_on_the_grid_as_the_reference_does(case, dtype):
    query, key, value = floats_of(case, dtype)
    grid, options = grid_of(case), options_of(case)
    eta = torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(3))
    rescale: dict[str, Any] = {"eta": eta if case.center else 0.7, "length_exponent": 0.5}
    expected = inhibitor_attention_int8(query, key, value, grid, **rescale, **options, backend="reference")
    for name in integer_cpu.instruction_sets():
        with integer_cpu.using(name):
            found = inhibitor_attention_int8(query, key, value, grid, **rescale, **options, backend="cpu")
        assert found.dtype == dtype
        assert torch.equal(found, expected), name


def test_every_number_goes_to_the_same_code(integer_set):
    """All of bfloat16 but NaN, and the halves between codes with their neighbours."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    every = every[~every.isnan()]
    halves = torch.arange(-300.0, 300.0) + 0.5
    edges = torch.cat([halves, halves.nextafter(torch.tensor(math.inf)), halves.nextafter(torch.tensor(-math.inf))])
    x = torch.cat([every, edges * 0.03125, torch.zeros(7 * 257)])
    x = x[: len(x) // 257 * 257].view(1, 1, -1, 257)[..., :256].contiguous()
    rows = x.shape[2]
    grid = IntegerGrid.of(0.03125, 0.03125, 1e-30, 0.0, scale=1.0)  # z is 0
    eye = torch.eye(rows, dtype=torch.bool)
    found = integer_attention(x, x, x, grid, attn_mask=eye, backend="cpu")  # each query sees one key: the value is left
    assert torch.equal(found, quantize_value(x, grid.value_step).to(torch.int32))
    # One key of zeros, a value of ones, a slope of 1 per step: z of one feature is the code's distance from 128.
    column = x.reshape(1, 1, -1, 1)
    slope = IntegerGrid.of(0.03125, 1.0, 1.0 / 0.03125, -0.5 / 0.03125 * 0.03125, scale=1.0)
    zero, large = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 127.0)
    left = integer_attention(column, zero, large, slope, center=False, backend="cpu")
    distance = (quantize_query_key(column, slope.query_key_step).int() - 128).abs()
    assert torch.equal(left, 127 - distance.clamp(max=127))


EXTREMES = {
    "farthest": (0, 255, 127),
    "nearest": (255, 255, -127),
    "the value that has no opposite": (0, 0, -128),
}


@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_largest_numbers_overflow_nothing(extreme, center, integer_set):
    """Distances of 65280, and sums over 2¹⁷ keys of the largest value."""
    q, k, v = EXTREMES[extreme]
    query = torch.full((1, 1, 5, 256), q, dtype=torch.uint8)
    key = torch.full((1, 1, 1, 256), k, dtype=torch.uint8).expand(1, 1, 2**17, 256)
    value = torch.full((1, 1, 1, 3), v, dtype=torch.int8).expand(1, 1, 2**17, 3)
    grid = IntegerGrid.of(1.0, 1.0, 2.0**-15, 0.0, scale=1.0, reach=255.0)
    *found, heard = integer_attention(query, key, value, grid, center=center, backend="cpu").unbind(-1)
    excess = min(65280 * (q != k) * (not center) + int(grid.threshold), 65535)
    z = (int(grid.multiplier) * excess) >> int(grid.shift)
    least = max(v, -127)
    assert int(grid.threshold) == 16384
    assert torch.equal(heard, torch.full_like(heard, 2**17 * (255 - z)))
    for total in found:
        assert torch.equal(total, torch.full_like(total, 2**17 * (abs(least) - z) * (1 if least > 0 else -1)))
        assert int(total.abs().max()) < 2**24


@pytest.mark.parametrize("threshold", [-(2**18), -65536, -65535, -1, 0, 1, 65535, 65536, 2**18])
@pytest.mark.parametrize("shift", [*range(8, 20), 31])
def test_every_shift_and_threshold_has_the_references_bits(shift, threshold, integer_set):
    case = Case(1, 2, 2, 3, 70, 256, 4)
    query, key, value = codes(case)
    key[0, 1, ::3] = query[0, 1, :1]
    numbers = ([32768, 65535], [shift] * 2, [threshold] * 2, [255, 200])
    grid = IntegerGrid(torch.ones(2), torch.ones(2), *(torch.tensor(x, dtype=torch.int32) for x in numbers))
    for center in (True, False):
        expected = integer_attention(query, key, value, grid, center=center, backend="reference")
        assert torch.equal(integer_attention(query, key, value, grid, center=center, backend="cpu"), expected)


@pytest.mark.parametrize("reach", [1, 126, 127, 128, 254, 255])
def test_every_inhibition_counts_towards_every_reach(reach, integer_set):
    """All z there are, at a shift that is steep and one that is not, in rows that begin and end anywhere."""
    query = torch.zeros(1, 2, 300, 2, dtype=torch.uint8)
    key = torch.zeros(1, 2, 300, 2, dtype=torch.uint8)
    key[0, 0, :, 0] = torch.randperm(300, generator=torch.Generator().manual_seed(0)).clamp(max=255)
    key[0, 1] = key[0, 0]
    value = torch.full((1, 2, 300, 16), 127, dtype=torch.int8)  # no feature is left over for what is heard
    slopes = torch.tensor([1.0, 0.7])
    grid = IntegerGrid.of(1.0, 1.0, slopes, -0.5, scale=1.0, reach=float(reach))
    assert grid.shift.tolist() == [15, 16]
    found = integer_attention(query, key, value, grid, is_causal=True, center=False, backend="cpu")
    for head, slope in enumerate(grid.multiplier.double() * 2.0 ** -grid.shift.double()):
        excess = (key[0, head, :, 0].int() + grid.threshold[head]).clamp(min=0)
        left = (reach - (excess * slope).floor().clamp(max=255)).clamp(min=0)
        assert found[0, head, :, -1].tolist() == left.cumsum(0).tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kind", ["codes", "float32", "bfloat16"])
def test_strides_change_nothing_and_inputs_are_not_written_to(kind, layout, integer_set):
    tensors = codes(SMALL) if kind == "codes" else floats_of(SMALL, getattr(torch, kind))
    if kind == "codes" and layout.__name__ == "step_two":  # those two put NaN between the numbers
        strided = [x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2] for x in tensors]
    elif kind == "codes" and layout.__name__ == "offset_by_seven":
        strided = [torch.cat([x.flatten()[:7], x.flatten()])[7:].view(x.shape) for x in tensors]
    else:
        strided = [layout(x) for x in tensors]
    given = options_of(SMALL) | {"attn_mask": options_of(SMALL)["attn_mask"].mT.contiguous().mT}
    before = [(x.clone(), x._version) for x in strided]
    found = attend(strided, grid_of(SMALL), **given, backend="cpu")
    dense = [x.contiguous() for x in strided]
    assert torch.equal(found, attend(dense, grid_of(SMALL), **options_of(SMALL), backend="reference"))
    assert all(torch.equal(x, y) and x._version == version for x, (y, version) in zip(strided, before, strict=True))


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("number", range(3), ids=["query", "key", "value"])
def test_rows_beyond_two_to_the_31st_are_found(number, offset, integer_set):
    tensors = list(codes(Case(1, 1, 1, 3, 3, 4, 4)))
    grid = IntegerGrid.of(0.02, 0.02, 0.3, 0.5, scale=1.0)
    expected = attend(tensors, grid, backend="reference")
    tensors[number] = beyond_two_to_the_31st(tensors[number], offset)
    assert torch.equal(attend(tensors, grid, backend="cpu"), expected)


def test_what_no_query_sees_may_be_anything(integer_set):
    case = Case(2, 4, 2, 9, 40, 16, 8, reach=True)
    query, key, value = floats_of(case)
    allowed = torch.rand(2, 1, 9, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[..., 3] = allowed[..., 20:] = False
    allowed[:, :, 4] = False
    results = []
    for garbage in (0.0, NAN, math.inf):
        for tensor in (key, value):
            tensor[:, :, 3] = tensor[:, :, 20:] = garbage
        query[:, :, 4] = garbage
        options: dict[str, Any] = {"attn_mask": allowed, "enable_gqa": True}
        results.append(integer_attention(query, key, value, grid_of(case), **options, backend="cpu"))
        expected = integer_attention(query, key, value, grid_of(case), **options, backend="reference")
        assert torch.equal(results[-1], expected)
    assert not results[0][:, :, 4].any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_the_causal_rule_hides_may_be_anything_where_the_mask_shows_it(integer_set):
    case = Case(2, 4, 2, 9, 9, 16, 8, reach=True)
    query, key, value = floats_of(case)
    allowed = torch.ones(9, 9, dtype=torch.bool)
    allowed[5:, 5] = False  # only queries before the sixth, from which the rule keeps it
    options: dict[str, Any] = {"attn_mask": allowed, "is_causal": True, "enable_gqa": True}
    expected = integer_attention(query, key, value, grid_of(case), **options, backend="reference")
    key[:, :, 5] = value[:, :, 5] = NAN
    assert torch.equal(integer_attention(query, key, value, grid_of(case), **options, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("number", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_in_sight_is_refused_by_name(place, number, backend):
    tensors = [x.clone() for x in floats_of(Case(1, 2, 2, 40, 37, 19, 21))]
    tensors[number][0, place, place, place] = NAN
    grid = IntegerGrid.of(0.02, 0.02, torch.ones(2), 0.5, scale=1.0)
    name = ("query", "key", "value")[number]
    for chosen in integer_cpu.instruction_sets():
        with integer_cpu.using(chosen), pytest.raises(OperatorError, match=f"^{name}: expected numbers, got NaN"):
            attend(tensors, grid, backend=backend)


@pytest.mark.parametrize("case", [LARGE, BEYOND, Case(1, 1, 1, 257, 90, 64, 64, is_causal=True)], ids=str)
def test_the_number_of_threads_changes_nothing(case, integer_set, threads):
    query, key, value = floats_of(case)
    results = []
    for count in (1, 2, 3):
        threads(count)
        for _ in range(3):
            results.append(integer_attention(query, key, value, grid_of(case), **options_of(case), backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("poison", [127, 0x7FFFFFFF])
@pytest.mark.parametrize("reach", [False, True])
def test_uninitialised_memory_does_not_show(poison, reach, integer_set, monkeypatch):
    """Neither what results are written to nor what a thread or a cache holds from before."""
    case = Case(2, 4, 2, 3, 45, 20, 18, reach=reach)
    query, key, value = codes(case)
    expected = integer_attention(query, key, value, grid_of(case), enable_gqa=True, backend="cpu")
    full = [torch.full_like(x, 127) for x in (query, key, value)]
    empty = torch.empty

    def poisoned(*args, **options):
        tensor = empty(*args, **options)
        return tensor.fill_(poison & 0xFF if tensor.dtype == torch.uint8 else poison)

    monkeypatch.setattr(torch, "empty", poisoned)
    attend(full, grid_of(case), enable_gqa=True, backend="cpu")
    assert torch.equal(integer_attention(query, key, value, grid_of(case), enable_gqa=True, backend="cpu"), expected)
    cache = IntegerCache(2, 2, 20, 18, grid_of(case))
    cache.append(key, value)
    found = cache.attend(query)
    assert torch.equal(found, expected[..., :18].float() * grid_of(case).value_step.view(-1, 1, 1))


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 2, 1, 300, 64, 64),
        Case(2, 4, 2, 1, 300, 64, 64, reach=True),
        Case(1, 3, 3, 5, 70, 20, 33, mask="hqk", reach=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [[300], [1] * 70, [3, 40, 1, 26], [64, 6]], ids=str)
@pytest.mark.parametrize("kind", ["codes", "float32", "bfloat16"])
def test_a_cache_gives_what_its_tokens_give(kind, pieces, case, integer_set):
    query, key, value = codes(case) if kind == "codes" else floats_of(case, getattr(torch, kind))
    count = min(sum(pieces), case.keys)
    key, value = key[:, :, :count], value[:, :, :count]
    cache = IntegerCache(case.batch, case.key_heads, case.head_dim, case.value_dim, grid_of(case))
    first = 0
    for piece in pieces:
        cache.append(key[:, :, first : first + piece], value[:, :, first : first + piece])
        first += piece
    assert len(cache) == count
    given = options_of(case)
    seen = None if given["attn_mask"] is None else given["attn_mask"][..., :count]
    eta = torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(3))
    rescale: dict[str, Any] = {"eta": eta, "length_exponent": 0.5}
    expected = inhibitor_attention_int8(
        query, key, value, grid_of(case), **rescale, attn_mask=seen, enable_gqa=True, backend="reference"
    )
    assert torch.equal(cache.attend(query, **rescale, attn_mask=seen), expected)
    unsigned: dict[str, Any] = {"center": False, "signed": False, "attn_mask": seen}
    expected = inhibitor_attention_int8(query, key, value, grid_of(case), **unsigned, enable_gqa=True)
    assert torch.equal(cache.attend(query, **unsigned), expected)


def test_a_cache_takes_half_the_memory_of_one_in_bfloat16():
    grid = IntegerGrid.of(0.02, 0.02, torch.ones(12), 0.5, scale=0.125)
    cache = IntegerCache(1, 12, 64, 64, grid)
    cache.reserve(8192)
    key, value = randn(2, 1, 12, 8192, 64).bfloat16()
    cache.append(key, value)
    assert cache.nbytes == (key.nbytes + value.nbytes) // 2
    cache.append(key[:, :, :1], value[:, :, :1])  # room grows by a quarter
    assert cache.nbytes <= 1.26 * (key.nbytes + value.nbytes) / 2


def test_a_cache_written_by_one_instruction_set_is_read_by_another():
    case = Case(1, 2, 2, 3, 70, 40, 24)
    query, key, value = codes(case)
    expected = integer_attention(query, key, value, grid_of(case), backend="reference")
    for writer in integer_cpu.instruction_sets():
        cache = IntegerCache(1, 2, 40, 24, grid_of(case))
        with integer_cpu.using(writer):
            cache.append(key, value)
        for reader in integer_cpu.instruction_sets():
            with integer_cpu.using(reader):
                found = cache.attend(query) / grid_of(case).value_step.view(-1, 1, 1)
            assert torch.equal(found.round().int(), expected), (writer, reader)


def test_a_cache_refuses_what_does_not_fit_and_stays_as_it_was():
    grid = IntegerGrid.of(0.02, 0.02, torch.ones(4), 0.5, scale=0.125)
    for sizes, match in (
        ((1, 3, 64, 64), "key_heads: expected a number that divides"),
        ((1, 4, 257, 64), "head_dim: expected 1 to 256"),
        ((1, 4, 64, 0), "value_dim: expected 1 to 256"),
    ):
        with pytest.raises(OperatorError, match=match):
            IntegerCache(*sizes, grid)
    wrong: Any  # of types that a checker would refuse
    for wrong, match in (
        ((1, 4, 8.0, 8), "head_dim: expected 1 to 256, got 8.0"),
        ((-1, 4, 8, 8), "batch: expected 0 or more, got -1"),
        ((1, "4", 8, 8), "key_heads: expected a number that divides the grid's 4 heads, got '4'"),
    ):
        with pytest.raises(OperatorError, match=match):
            IntegerCache(wrong[0], wrong[1], wrong[2], wrong[3], grid)
    wrong = {"steps": 1}
    with pytest.raises(OperatorError, match="grid: expected an IntegerGrid, got dict"):
        IntegerCache(1, 4, 8, 8, wrong)
    cache = IntegerCache(1, 4, 8, 8, grid)
    good = randn(1, 4, 5, 8)
    cache.append(good, good)
    before = cache.attend(good)
    bad = good.clone()
    bad[0, 3, 4, 7] = NAN
    for key, value, match in (
        (good[:, :2], good, r"key: expected torch.float32 of shape \(1, 4, 5, 8\)"),
        (good, good[:, :, :4], "value: expected torch.float32 of shape"),
        (good, good.half(), "value: expected torch.float32 of shape"),
        (good.int(), good, "key: expected torch.uint8 of shape"),
        (bad, good, "key: expected numbers, got NaN"),
        (good, bad, "value: expected numbers, got NaN"),
    ):
        with pytest.raises(OperatorError, match=match):
            cache.append(key, value)
    assert len(cache) == 5
    assert torch.equal(cache.attend(good), before)
    with pytest.raises(OperatorError, match=r"query: expected floating point or torch\.uint8"):
        cache.attend(good[:, :2])
    with pytest.raises(OperatorError, match="query: expected numbers, got NaN"):
        cache.attend(bad)
    long = good[:, :, :1].expand(1, 4, 2**17, 8)
    with pytest.raises(OperatorError, match="key: expected 131072 tokens at most, got 131077"):
        cache.append(long, long)


def cache_of(key, value, grid):
    """A cache that holds these keys and values."""
    cache = IntegerCache(key.shape[0], key.shape[1], key.shape[3], value.shape[3], grid)
    cache.append(key, value)
    return cache


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("reach", [False, True])
def test_a_cache_is_filled_and_read_in_compiled_graphs(reach, compiler):
    query, key, value = floats_of(replace(SMALL, reach=reach))
    grid = grid_of(replace(SMALL, reach=reach))

    def step(cache, query, key, value):
        cache.append(key, value)
        return cache.attend(query, length_exponent=0.5)

    torch.compiler.reset()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    found, expected = (IntegerCache(3, 2, 5, 6, grid) for _ in range(2))
    for first in range(0, 12, 3):
        part = query, key[:, :, first : first + 3], value[:, :, first : first + 3]
        assert torch.equal(compiled(found, *part), step(expected, *part))
    assert len(found) == 12


def test_a_cache_takes_negated_views_for_what_they_mean():
    query, key, value = floats_of(SMALL)
    negated, *packed = (torch._neg_view(x) for x in (query, key, value))
    assert negated.is_neg()
    found = cache_of(packed[0], packed[1], grid_of(SMALL)).attend(negated)
    assert torch.equal(found, cache_of(-key, -value, grid_of(SMALL)).attend(-query))


def test_a_cache_passes_no_gradient_and_says_so():
    query, key, value = (x.requires_grad_() for x in floats_of(SMALL))
    cache = cache_of(key.detach(), value.detach(), grid_of(SMALL))
    with pytest.raises(OperatorError, match=r"key: expected a call without gradients.*torch\.no_grad"):
        cache.append(key, value.detach())
    with pytest.raises(OperatorError, match="value: expected a call without gradients"):
        cache.append(key.detach(), value)
    assert len(cache) == SMALL.keys
    for output in (cache.attend(query), cache.attend(query.detach(), eta=torch.ones(4, requires_grad=True))):
        with pytest.raises(OperatorError, match=r"expected a call without gradients.*fake quantisation"):
            output.sum().backward()
    with torch.no_grad():
        cache.append(key, value)
    assert len(cache) == 2 * SMALL.keys


def test_a_cache_refuses_tangents():
    query, key, value = floats_of(SMALL)
    cache = cache_of(key, value, grid_of(SMALL))
    match = "inhibitor_attention_int8: expected .*a tangent"
    with pytest.raises(OperatorError, match=match):
        torch.func.jvp(cache.attend, (query,), (query,))
    with forward_ad.dual_level(), pytest.raises(OperatorError, match=match):
        cache.append(forward_ad.make_dual(key, key), value)


def test_a_cache_is_read_by_many_queries_under_vmap():
    query, key, value = floats_of(SMALL)
    cache = cache_of(key, value, grid_of(SMALL))
    queries = torch.stack([query, query.flip(2)])
    with warnings.catch_warnings(action="ignore"):  # there is no batching rule: one after the other
        found = torch.vmap(cache.attend)(queries)
    assert torch.equal(found, torch.stack([cache.attend(x) for x in queries]))


def test_the_default_device_is_not_that_of_a_cache():
    query, key, value = floats_of(SMALL)
    grid = grid_of(SMALL)
    expected = cache_of(key, value, grid).attend(query)
    with torch.device("meta"):
        assert torch.equal(cache_of(key, value, grid).attend(query), expected)


@pytest.mark.parametrize("reach", [False, True])
def test_the_operators_of_a_cache_pass_pytorchs_own_checks(reach):
    case = replace(SMALL, reach=reach)
    query, key, value = floats_of(case)
    grid = grid_of(case)
    packed = tuple(torch.zeros(3, 2, 1, size, dtype=torch.uint8) for size in (32 * 8, 32 * 16))
    ops = torch.ops.inhibitor
    by_key = grid.query_key_step[::2], grid.value_step[::2]
    torch.library.opcheck(ops.integer_append.default, (key, value, *by_key, *packed, 0))
    torch.library.opcheck(ops.integer_append.default, (*codes(case)[1:], None, None, *packed, 0))
    factor, exponent = torch.ones(3, 4, 17, 1, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for scale in ((None, None), (factor, exponent if reach else None)):
        inputs = (query, *packed, *grid.tensors, *scale, None, True, True, 13, 6)
        torch.library.opcheck(ops.integer_attend.default, inputs)


def test_the_operator_passes_pytorchs_own_checks():
    factor, exponent = torch.ones(3, 4, 17, 1, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for tensors in (floats_of(SMALL), codes(SMALL)):
        for scale, reach in (
            ((None, None), False),
            ((factor, None), False),
            ((None, None), True),
            ((factor, None), True),
            ((factor, exponent), True),
        ):
            grid = grid_of(replace(SMALL, reach=reach))
            for backend in ("cpu", "reference"):
                inputs = (*tensors, *grid.tensors, *scale, None, True, True, True, backend)
                torch.library.opcheck(torch.ops.inhibitor.integer_attention.default, inputs)


@pytest.mark.parametrize("reach", [False, True])
def test_the_operator_that_makes_grids_passes_pytorchs_own_checks(reach):
    parameters = (*-torch.rand(2, 3), torch.ones(3), torch.zeros(3), torch.ones(3) if reach else None, 0.125)
    torch.library.opcheck(torch.ops.inhibitor.integer_grid.default, parameters)


@pytest.mark.parametrize("reach", [False, True])
def test_runs_in_a_compiled_graph_without_a_break(reach):
    query, key, value = floats_of(SMALL)
    grid = grid_of(replace(SMALL, reach=reach))

    def function(query, key, value):
        gain = query.sum(-1).exp()
        return inhibitor_attention_int8(query, key, value, grid, eta=gain, length_exponent=0.5, enable_gqa=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), function(query, key, value))


@pytest.mark.skipif(cpu.instruction_set() == "portable", reason="there is but one")
def test_instruction_sets_are_chosen_apart_from_those_of_the_float_kernels():
    before = integer_cpu.instruction_set()
    with integer_cpu.using("portable"):
        assert integer_cpu.instruction_set() == "portable"
        assert cpu.instruction_set() != "portable"
    assert integer_cpu.instruction_set() == before == integer_cpu.instruction_sets()[0]
    match = r"instruction set: expected one of .*portable, got 'avx1024'"
    with pytest.raises(OperatorError, match=match), integer_cpu.using("avx1024"):
        pass


def test_memory_that_cannot_be_had_is_an_error():
    """No call within the bounds needs so much that it could not be had: the library's answer alone is tested."""
    with pytest.raises(MemoryError, match="integer attention: no memory for 5 keys in 2 heads"):
        integer_cpu._check(1, 5, 2)
