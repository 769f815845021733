"""The integer operator in Triton: the reference's bits, on a GPU or under Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from inhibitor import IntegerGrid, inhibitor_attention_int8
from inhibitor.errors import OperatorError
from inhibitor.ops import integer_attention, which_integer_backend
from tests.ops.cases import Case
from tests.ops.integer_cases import codes, floats_of, grid_of, options_of
from tests.ops.test_triton import CASES, DEVICE, LARGE, ON_A_GPU, needs_gpu, pytestmark

__all__ = ["pytestmark"]  # skipped where test_triton is
NAN = float("nan")


def both(function: Any, tensors: Any, grid: IntegerGrid, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference gives, and Triton, back on the CPU."""
    expected = function(*tensors, grid, **options, backend="reference")
    there = {name: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    found = function(*(x.to(DEVICE) for x in tensors), grid.to(DEVICE), **there, backend="triton")
    assert found.dtype == expected.dtype
    return expected, found.cpu()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_has_the_references_bits(case):
    expected, found = both(integer_attention, codes(case), grid_of(case), **options_of(case))
    assert torch.equal(found, expected)


@needs_gpu
@pytest.mark.parametrize("case", LARGE if ON_A_GPU else LARGE[:1], ids=str)
def test_has_the_references_bits_in_cases_of_many_tiles(case):
    expected, found = both(integer_attention, codes(case), grid_of(case), **options_of(case))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_puts_floats_on_the_grid_as_the_reference_does(dtype):
    case = CASES[3]
    rescale = {"eta": torch.tensor([0.7, -1.0, 0.0, 2.0]), "length_exponent": 0.5}
    tensors = floats_of(case, dtype)
    expected, found = both(inhibitor_attention_int8, tensors, grid_of(case), **rescale, **options_of(case))
    assert torch.equal(found, expected)
    assert found.any()


def test_means_of_sums_that_no_float32_holds():
    query = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 253)
    key = torch.tensor([255, 0, 254], dtype=torch.uint8).repeat(101)[:301].view(1, 1, 301, 1).expand(1, 1, 301, 253)
    value = torch.full((1, 1, 301, 2), 127, dtype=torch.int8)
    numbers = (torch.tensor([x], dtype=torch.int32) for x in (1 << 15, 26, 64515 - 3))
    grid = IntegerGrid(torch.ones(1), torch.ones(1), *numbers)
    expected, found = both(integer_attention, (query, key, value), grid)
    assert torch.equal(found, expected)
    assert found.unique().numel() > 1


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_extremes(signed):
    """Every value, -128 too; multipliers, shifts and thresholds at their ends."""
    case = Case(1, 4, 4, 3, 256, 2, 1)
    query, key, _ = codes(case)
    value = torch.arange(-128, 128).to(torch.int8).view(1, 1, 256, 1)
    ends = [1 << 15, (1 << 16) - 1, 50000, 50000], [31, 8, 16, 15], [1 << 18, -(1 << 18), 100, -20], [255, 255, 200, 1]
    grid = IntegerGrid(torch.ones(4), torch.ones(4), *(torch.tensor(x, dtype=torch.int32) for x in ends))
    expected, found = both(integer_attention, (query, key, value), grid, signed=signed, center=False)
    assert torch.equal(found, expected)
    assert found[:, 2:].any()


def test_what_is_heard_and_a_gain_of_each_query():
    case = replace(CASES[3], reach=True)
    eta = torch.rand(case.batch, case.heads, case.queries, generator=torch.Generator().manual_seed(3))
    rescale = {"eta": eta, "length_exponent": 0.5}
    expected, found = both(inhibitor_attention_int8, codes(case), grid_of(case), **rescale, **options_of(case))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_without_queries_or_keys(queries, keys, reach):
    case = Case(1, 2, 1, queries, keys, 4, 3, reach=reach)
    expected, found = both(integer_attention, codes(case), grid_of(case), enable_gqa=True)
    assert torch.equal(found, expected)


def test_nan_is_refused_where_a_query_sees_it():
    case = Case(1, 2, 2, 3, 5, 4, 3)
    query, key, value = floats_of(case)
    grid, mask = grid_of(case), torch.tensor([True, True, False, True, True])
    key[0, 1, 2] = value[0, 0, 2, 1] = NAN
    expected, found = both(inhibitor_attention_int8, (query, key, value), grid, attn_mask=mask)
    assert torch.equal(found, expected)
    with pytest.raises(OperatorError, match="key: expected numbers, got NaN where a query sees it"):
        both(inhibitor_attention_int8, (query, key, value), grid)


def test_it_is_chosen_on_a_gpu_alone():
    assert which_integer_backend(torch.empty(1, 1, 1, 1, device=DEVICE)).name == ("triton" if ON_A_GPU else "cpu")
    query, value = (torch.zeros(1, 1, 2, 2, dtype=code, device="meta") for code in (torch.uint8, torch.int8))
    grid = IntegerGrid.of(0.1, 0.1, 1.0, 0.0, scale=1.0).to("meta")
    with pytest.raises(OperatorError, match=r"backend: .*no Triton kernel for meta"):
        integer_attention(query, query, value, grid, backend="triton")
