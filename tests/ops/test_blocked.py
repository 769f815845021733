"""The PyTorch backend against the reference: values, accuracy, tiles, strides, memory, threads."""

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inhibitor import inhibitor_attention
from inhibitor.ops import blocked, operator
from tests.ops.cases import (
    BATCHES,
    BY_DTYPE,
    FACTOR,
    HEAD_DIMS,
    HEADS,
    LENGTHS,
    LUCK,
    MANY_KEYS,
    MANY_ROWS,
    MASKS,
    PARAMETERS,
    SWEEP,
    TOLERANCES,
    WIDE,
    Arguments,
    Case,
    arguments,
    relative_error,
    separate,
    sizes,
)
from tests.ops.layouts import LAYOUTS, beyond_two_to_the_31st, check_strides, equal

SMALL = Case(3, 4, 2, 17, 13, 5, 6, mask="bhqk", is_causal=True, parameters="per head")


@pytest.mark.parametrize(
    ("cases", "least"), [(SWEEP, 500), (SWEEP[::2], 250), (SWEEP[1::2], 250)], ids=["all", "first half", "second half"]
)
def test_the_sweep_has_every_pair_of_lengths_and_every_option(cases, least):
    assert len(cases) >= least
    lengths = {*itertools.product(LENGTHS, LENGTHS), *itertools.product(MANY_ROWS, MANY_KEYS)}
    assert {(case.queries, case.keys) for case in cases} == lengths
    for name, values in {
        "batch": BATCHES,
        "head_dim": HEAD_DIMS + WIDE,
        "value_dim": HEAD_DIMS + WIDE,
        "mask": MASKS,
        "is_causal": (False, True),
        "center": (False, True),
        "signed": (False, True),
        "parameters": PARAMETERS,
        "reach": (False, True),
    }.items():
        assert {getattr(case, name) for case in cases} == set(values), name
    assert {(case.heads, case.key_heads) for case in cases} == set(HEADS)
    assert any(case.head_dim != case.value_dim for case in cases)


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_equals_the_reference_in_float64(case, cut):
    cut(case.tile)
    given, grad = arguments(case)
    found, expected = given.with_gradients(grad), given.with_gradients(grad, "reference")
    for name, truth in expected.items():
        assert found[name].shape == truth.shape
        assert found[name].dtype == truth.dtype
        size = sizes(case, given, grad)[name] if name == "reach" else None  # of which little is left
        assert relative_error(found[name], truth, size) <= TOLERANCES["float64"], name


@pytest.mark.parametrize(("dtype", "case"), BY_DTYPE, ids=str)
def test_errs_at_most_twice_as_much_as_the_plain_formula(dtype, case, cut, record_property):
    cut(case.tile)
    given, grad = arguments(case, dtype)
    given = separate(case, given)
    size = sizes(case, given, grad)
    found = given.with_gradients(grad)
    plain = given.to(torch.float32).with_gradients(grad, "reference")  # half precision is accumulated in float32
    truth = given.to(torch.float64).with_gradients(grad, "reference")
    errors = {name: relative_error(found[name], truth[name], size[name]) for name in truth}
    for name, error in errors.items():
        assert found[name].dtype == (dtype if name in ("output", "query", "key", "value") else torch.float32)
        rounded = plain[name].to(found[name].dtype)
        assert error <= FACTOR * relative_error(rounded, truth[name], size[name]) + LUCK, name
    record_property(f"error of {dtype} forward", errors.pop("output"))
    record_property(f"error of {dtype} gradients", max(errors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_accumulated_in_float32(dtype):
    """The registered operator's sum comes before the one rounding: as exact as for the same numbers in float32."""
    case = Case(2, 2, 2, 33, 257, 64, 32, mask="bk")
    given, _ = arguments(case, dtype)
    one, zero = torch.ones(2), torch.zeros(2)

    def total(given: Arguments) -> torch.Tensor:
        query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
        mask = given.options["attn_mask"]
        options = (mask, False, True, True, 0.125, "torch")
        result: torch.Tensor = operator.attention(query, key, value, one, zero, None, *options)
        return result

    assert total(given).dtype == torch.float32
    assert torch.equal(total(given), total(given.to(torch.float32)))


def test_half_precision_distances_do_not_overflow():
    """RELIABILITY, trap 3: Σ|q − k| passes float16's 65504 long before the inputs do."""
    query = torch.full((1, 1, 1, 64), 3e4, dtype=torch.float16)
    key = torch.stack([-query[0], query[0]], 2)
    value = torch.tensor([[1.0], [2.0]], dtype=torch.float16).view(1, 1, 2, 1)
    result = inhibitor_attention(query, key, value, backend="torch")
    assert result.item() == 2.0  # the far key is inhibited, the near one is not


TILES = (1, 12, 13 * 6, 3 * 13 * 6, 17 * 13 * 6 - 1, 17 * 13 * 6, 5 * 17 * 13 * 6, 1 << 19)


@pytest.mark.parametrize("tile", TILES)
def test_tiles_cover_everything_once_and_do_not_show(tile, cut, monkeypatch):
    given, grad = arguments(SMALL)
    seen = torch.zeros(SMALL.batch * SMALL.heads, SMALL.queries, dtype=torch.int64)
    tiles = blocked._tiles

    def watched(*args):
        for piece in tiles(*args):
            assert piece.buffer.numel() <= max(tile, piece.buffer.shape[1] * piece.buffer.shape[3])
            seen[piece.heads, piece.rows] += 1
            yield piece

    monkeypatch.setattr(blocked, "_tiles", watched)
    cut(tile)
    found, expected = given.with_gradients(grad), given.with_gradients(grad, "reference")
    assert torch.equal(seen, torch.full_like(seen, 2))  # forward and backward
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= TOLERANCES["float64"], name


def test_tile_sizes_make_tails_of_rows_and_of_heads():
    """That the test above sees what it is for."""
    rows = {tile // (13 * 6) for tile in TILES if tile < 17 * 13 * 6}
    assert any(1 < count < 17 and 17 % count for count in rows)
    heads = {tile // (17 * 13 * 6) for tile in TILES}
    assert any(1 < count < 12 and 12 % count for count in heads)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_no_bit_and_no_input_is_written_to(layout, dtype, cut):
    cut(500)
    check_strides(SMALL, layout, dtype, "torch")


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_elements_beyond_two_to_the_31st_are_found(name, offset):
    given, grad = arguments(Case(1, 1, 1, 3, 3, 4, 4), torch.bfloat16)
    far = beyond_two_to_the_31st(given.tensors[name], offset)
    moved = Arguments(given.tensors | {name: far}, given.options)
    assert torch.equal(moved(), given())
    leaf = far.detach().requires_grad_()
    moved = Arguments(given.tensors | {name: leaf}, given.options)
    assert torch.equal(torch.autograd.grad(moved(), leaf, grad)[0], given.with_gradients(grad)[name])


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_uninitialised_memory_does_not_show(poison, cut, monkeypatch):
    cut(500)
    given, grad = arguments(SMALL)
    expected = given.with_gradients(grad)
    empty, poured = torch.empty, []

    def poisoned(*args, **options):
        poured.append(args)
        return empty(*args, **options).fill_(poison)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert equal(given.with_gradients(grad), expected)
    assert poured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made under it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def _free(self, pointer: int, size: int) -> None:
        self.live -= size
        self.seen.discard(pointer)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(t.untyped_storage()) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in known | self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def peaks(length: int) -> tuple[int, int]:
    """Bytes that forward and backward hold beyond their inputs at 1x12xlengthx64, results included."""
    query, key, value, grad = torch.randn(4, 1, 12, length, 64, generator=torch.Generator().manual_seed(0))
    options = blocked.Options(None, False, True, True, 0.125)
    found = []
    for call in (blocked.forward, lambda *args: blocked.backward(grad, *args)):
        gc.collect()
        with LiveBytes() as counted:
            kept = call(query, key, value, torch.ones(12), torch.zeros(12), None, options)
        found.append(counted.peak)
        del kept
        gc.collect()
        assert counted.live == 0  # the count is a count: what was made is gone
    return found[0], found[1]


def test_memory_grows_with_the_length_not_with_its_square(cut):
    cut(blocked.CPU_TILE)
    short, long = peaks(512), peaks(1024)
    one = 12 * 1024 * 64 * 4  # bytes of query, key or value; queries × keys × head_dim would be 1024 times that
    tile = blocked.CPU_TILE * 4
    for name, peak, half, results in zip(("forward", "backward"), long, short, (1, 3), strict=True):
        assert peak <= (results + 2) * one + 3 * tile, name
        assert peak <= 2 * half, name


def test_runs_are_bit_identical():
    given, grad = arguments(Case(2, 4, 2, 65, 63, 32, 60, mask="bk", parameters="per head"), torch.float32)
    first = given.with_gradients(grad)
    assert all(equal(given.with_gradients(grad), first) for _ in range(5))


def test_four_threads_agree_with_one():
    given, grad = arguments(SMALL, torch.float32)
    expected = given.with_gradients(grad)
    start = threading.Barrier(4)

    def hundred_calls(_: int) -> bool:
        start.wait(timeout=30)
        return all(equal(given.with_gradients(grad), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(hundred_calls, range(4), timeout=60))
