"""A compact suite for a build of the integer kernels: for mutants and for sanitizers, run in a process of its own.

    python -m tests.ops.integer_compact library.so [library.so ...]

prints a line for each: its path and the first check that fails, or "survives".
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from inhibitor import IntegerGrid, inhibitor_attention_int8
from inhibitor.errors import OperatorError
from inhibitor.ops import IntegerCache, cpu, integer_attention, integer_cpu
from tests.ops.cases import SWEEP, Case, mask
from tests.ops.integer_cases import attend, codes, grid_of
from tests.ops.layouts import features_first
from tests.ops.suite import Suite

CASES = [
    Case(2, 4, 2, 5, 4, 3, 2),
    Case(1, 4, 1, 67, 70, 20, 9, mask="hk"),
    Case(2, 4, 4, 70, 150, 17, 40, mask="bhqk", reach=True),
    Case(1, 4, 4, 130, 131, 24, 36, is_causal=True),
    Case(1, 4, 4, 130, 131, 24, 36, is_causal=True, signed=False, center=False),
    Case(1, 4, 4, 130, 131, 24, 32, is_causal=True, center=False, reach=True),
    Case(1, 4, 4, 9, 1100, 33, 20, signed=False),
    Case(1, 1, 1, 12, 7, 256, 5),
    Case(2, 4, 1, 40, 140, 16, 16, mask="bk", is_causal=True),
    Case(1, 4, 2, 2, 1100, 20, 9, mask="bhqk", reach=True),
    Case(1, 2, 2, 1, 40, 16, 12),
    Case(1, 4, 4, 7, 40, 19, 3, center=False),
    Case(1, 2, 2, 300, 600, 64, 64, center=False),
]


def options_of(case: Case) -> dict[str, Any]:
    return {
        "attn_mask": mask(case, torch.Generator().manual_seed(0)),
        "is_causal": case.is_causal,
        "center": case.center,
        "signed": case.signed,
        "enable_gqa": case.key_heads not in (1, case.heads),
    }


@functools.cache
def prepared(case: Case, floats: bool) -> tuple[tuple[Tensor, ...], IntegerGrid, Tensor]:
    """Inputs, a grid and the reference's result."""
    tensors = codes(case)
    if floats:
        generator = torch.Generator().manual_seed(1)
        tensors = tuple(1.5 * torch.randn(x.shape, generator=generator) for x in tensors)  # type: ignore[assignment]
    grid = grid_of(case)
    return tensors, grid, attend(tensors, grid, **options_of(case), backend="reference")


def values() -> None:
    for case in CASES:
        for floats in (False, True):
            tensors, grid, expected = prepared(case, floats)
            assert torch.equal(attend(tensors, grid, **options_of(case), backend="cpu"), expected), str(case)


def extremes() -> None:
    for q, k, v in ((0, 255, 127), (7, 7, -128)):
        query, key = torch.full((1, 1, 2, 256), q, dtype=torch.uint8), torch.full((1, 1, 1, 256), k, dtype=torch.uint8)
        value = torch.full((1, 1, 1, 3), v, dtype=torch.int8)
        key, value = key.expand(1, 1, 2**17, 256), value.expand(1, 1, 2**17, 3)
        for center in (True, False):
            grid = IntegerGrid.of(1.0, 1.0, 2.0**-11, 0.0, scale=1.0, reach=255.0)
            found, heard = integer_attention(query, key, value, grid, center=center, backend="cpu").split([3, 1], -1)
            z = 0 if center or q == k else 31  # 65280 + 1024 is held as 65535
            assert torch.equal(found, torch.full_like(found, 2**17 * (127 - z) * (1 if v > 0 else -1)))
            assert torch.equal(heard, torch.full_like(heard, 2**17 * (255 - z)))


def numbers() -> None:
    case = Case(1, 2, 2, 3, 40, 256, 4)
    query, key, value = codes(case)
    key[0, 1, ::3] = query[0, 1, :1]
    for shift in (8, 11, 15, 16, 17, 31):  # a reach beyond every value, so that z counts beyond it too
        for threshold in (-(2**18), -90000, -65535, -300, 0, 300, 65535, 90000, 2**18):
            given = ([32768, 65535], [shift] * 2, [threshold] * 2, [255, 200])
            grid = IntegerGrid(torch.ones(2), torch.ones(2), *(torch.tensor(x, dtype=torch.int32) for x in given))
            expected = integer_attention(query, key, value, grid, backend="reference")
            assert torch.equal(integer_attention(query, key, value, grid, backend="cpu"), expected)


def ends() -> None:
    """Numbers beyond the grid, halves between two codes."""
    x = torch.tensor([-1e30, -128.5, -127.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, 0.0]).view(1, 1, 1, 12)
    x = torch.cat([x, x.flip(3)], 3)
    key = torch.zeros(1, 1, 3, 24)
    key[0, 0, 1], key[0, 0, 2] = 3.0, x[0, 0, 0]
    grid = IntegerGrid.of(1.0, 1.0, 0.01, 0.0, scale=1.0)
    for center in (True, False):
        expected = integer_attention(x, key, 20 * key, grid, center=center, backend="reference")
        assert torch.equal(integer_attention(x, key, 20 * key, grid, center=center, backend="cpu"), expected)


def hidden() -> None:
    """NaN that no query sees is nothing, and one that some query sees is refused."""
    case = Case(1, 2, 2, 9, 40, 20, 18)
    (query, key, value), grid, _ = prepared(case, True)
    query, key, value = query.clone(), key.clone(), value.clone()
    allowed = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[:, 20:] = allowed[4] = False
    expected = integer_attention(query, key, value, grid, attn_mask=allowed, backend="cpu")
    key[:, :, 20:] = value[:, :, 20:] = query[:, :, 4] = torch.nan
    assert torch.equal(integer_attention(query, key, value, grid, attn_mask=allowed, backend="cpu"), expected)
    for number, name in enumerate(("query", "key", "value")):
        for place in (0, -1):
            tensors = [x.clone() for x in prepared(case, True)[0]]
            tensors[number][0, 1, 3, place] = torch.nan
            try:
                attend(tensors, grid, backend="cpu")
            except OperatorError as error:
                assert error.subject == name  # noqa: PT017
            else:
                raise AssertionError("not refused")


def strides() -> None:
    case = CASES[2]
    for floats in (False, True):
        tensors, grid, expected = prepared(case, floats)
        strided = [features_first(x) for x in tensors]
        assert torch.equal(attend(strided, grid, **options_of(case), backend="cpu"), expected)


def cached() -> None:
    for case in (CASES[0], CASES[10], Case(2, 4, 2, 3, 70, 20, 33, mask="hqk", signed=False, reach=True)):
        for floats in (False, True):
            (query, key, value), grid, sums = prepared(case, floats)
            expected = sums[..., : case.value_dim].float() * grid.value_step.view(-1, 1, 1)
            for piece in (1, 7, 64):
                cache = IntegerCache(case.batch, case.key_heads, case.head_dim, case.value_dim, grid)
                for first in range(0, case.keys, piece):
                    cache.append(key[:, :, first : first + piece], value[:, :, first : first + piece])
                options = {name: options_of(case)[name] for name in ("attn_mask", "center", "signed")}
                assert torch.equal(cache.attend(query, **options), expected)


def rescaled() -> None:
    """A factor for every row; of what it hears where there is a reach."""
    for case in (CASES[1], CASES[2], CASES[3]):
        (query, key, value), grid, _ = prepared(case, False)
        options = options_of(case) | {"eta": 1.5, "length_exponent": torch.linspace(0.0, 1.0, case.heads)}
        expected = inhibitor_attention_int8(query, key, value, grid, **options, backend="reference")
        assert torch.equal(inhibitor_attention_int8(query, key, value, grid, **options, backend="cpu"), expected)


def threads() -> None:
    tensors, grid, expected = prepared(CASES[-1], False)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = attend(tensors, grid, **options_of(CASES[-1]), backend="cpu")
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(1)


def linear() -> None:
    """The inputs of linear layers, in one part and in several, with ties, ends and NaN."""
    for rows, features in ((3, 37), (700, 512)):
        x = torch.randint(-600, 600, (rows, features), generator=torch.Generator().manual_seed(2)) / 4
        multiplier = torch.tensor([1.0, 2.0, 0.5]).repeat(features)[:features]
        expected = ((x * multiplier).round() + 117).clamp(0, 255).to(torch.uint8)
        assert torch.equal(integer_cpu.codes(x, multiplier, 117), expected)
        x[-1, -1] = torch.nan
        try:
            integer_cpu.codes(x, multiplier, 117)
        except OperatorError:
            continue
        raise AssertionError("NaN got a code")


def sweep() -> None:
    """A tenth of the sweep."""
    for case in SWEEP[::10]:
        tensors, grid, expected = prepared(case, True)
        assert torch.equal(attend(tensors, grid, **options_of(case), backend="cpu"), expected), str(case)


CHECKS = [values, extremes, numbers, ends, hidden, strides, rescaled, cached, threads, linear]


def prepare() -> None:
    for case in CASES:
        for floats in (False, True):
            prepared(case, floats)


if __name__ == "__main__":
    Suite((cpu, integer_cpu), CHECKS, sweep, prepare).main(sys.argv[1:])
