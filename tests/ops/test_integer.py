"""The integer operator: its grid, its reference against loops and against the float operator, what it refuses."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from inhibitor import IntegerGrid, inhibitor_attention_int8
from inhibitor.errors import OperatorError
from inhibitor.ops import (
    integer_attention,
    integer_reference,
    quantize_query_key,
    quantize_value,
    which_integer_backend,
)
from tests.ops.cases import Case, arguments, mask
from tests.ops.integer_cases import codes, grid_of

HEADS = 4
NAN = float("nan")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(query, key, value, grid, allowed, center, signed):
    """The specification in Python's own integers, one head."""
    step = [int(tensor[0]) for tensor in (grid.multiplier, grid.shift, grid.threshold)]
    multiplier, shift, threshold = step
    output = []
    for i, row in enumerate(query):
        seen = [j for j in range(len(key)) if allowed[i][j]]
        distance = {j: sum(abs(a - b) for a, b in zip(row, key[j], strict=True)) for j in seen}
        middle = (2 * sum(distance.values()) + len(seen)) // (2 * len(seen)) if center and seen else 0
        middle = min(max(middle - threshold, -65535), 65535)
        result = [0] * (len(value[0]) + (grid.reach is not None))
        for j in seen:
            z = min(255, (min(max(distance[j] - middle, 0), 65535) * multiplier) >> shift)
            for feature, v in enumerate(value[j]):
                magnitude = abs(v) if signed else v
                left = max(magnitude - z, 0)
                result[feature] += -left if signed and v < 0 else left
            if grid.reach is not None:
                result[-1] += max(int(grid.reach[0]) - z, 0)
        output.append(result)
    return output


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("reach", [None, 1.0, 130.0, 200.0])
@pytest.mark.parametrize("slope", [1e-9, 2.0**-16, 0.01, 0.1, 0.7, 3.0, 60.0, 1e5])
def test_the_reference_is_the_specification(slope, reach, center, signed):
    case = Case(1, 1, 1, 7, 9, 5, 3, center=center, signed=signed)
    query, key, value = codes(case)
    allowed = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) < 2 / 3
    allowed[2] = False
    for delta in (-4.0, 0.0, 2.5):
        far = None if reach is None else reach * 0.02
        grid = IntegerGrid.of(0.02, 0.02, slope, delta * slope * 0.02, scale=1.0, reach=far)
        found = integer_attention(
            query, key, value, grid, attn_mask=allowed, center=center, signed=signed, backend="reference"
        )
        rows = [x[0, 0].tolist() for x in (query, key, value)]
        expected = by_hand(rows[0], rows[1], rows[2], grid, allowed.tolist(), center, signed)
        assert found[0, 0].tolist() == expected


@pytest.mark.parametrize("exponent", range(-20, 12))
def test_the_fixed_point_number_is_the_slope(exponent):
    """Within 2⁻¹⁶ of it, and at the ends of its range Z does not depend on it any more."""
    for mantissa in (1.0, 1.0 + 2**-17, 1.3, 2.0 - 2**-10, 2.0 - 2**-18):
        slope = mantissa * 2.0**exponent
        grid = IntegerGrid.of(1.0, 1.0, slope, 0.0, scale=1.0)
        multiplier, shift = int(grid.multiplier), int(grid.shift)
        assert 2**15 <= multiplier < 2**16
        assert 8 <= shift <= 31
        held = multiplier * 2.0**-shift
        if 2.0**-16 <= slope <= 2.0**8 - 2.0**-8:
            assert abs(held / slope - 1) <= 2**-16
        else:
            ends = [min(255, (e * multiplier) >> shift) for e in (0, 1, 65535)]
            assert ends == ([0, 255, 255] if slope > 1 else [0, 0, 0])
            assert ends[1:] == [min(255, math.floor(e * slope)) for e in (1, 65535)]


def test_the_threshold_holds_delta_and_the_half_that_rounds():
    grid = IntegerGrid.of(0.5, 0.25, torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]), scale=0.125)
    # δ in steps of the distance: 1 / (0.125 · 0.5) = 16 and −8; the half: 0.5 / (0.0625 / 0.25) = 2 and 1.
    assert grid.threshold.tolist() == [18, -7]


def test_the_reach_is_in_steps_of_the_value_and_fits_eight_bits():
    reach = torch.tensor([0.01, 1.0, 1.125, 63.8, 64.0])
    grid = IntegerGrid.of(1.0, 0.25, torch.ones(5), 0.0, scale=1.0, reach=reach)
    assert grid.reach is not None
    assert grid.reach.tolist() == [1, 4, 4, 255, 255]
    assert grid.reach.dtype == torch.int32
    assert IntegerGrid.of(1.0, 0.25, 1.0, 0.0, scale=1.0).reach is None
    moved = grid.to("meta").reach
    assert moved is not None
    assert moved.device.type == "meta"
    assert IntegerGrid.of(1.0, 1.0, 1.0, 0.0, scale=1.0, reach=torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inhibitions_beyond_every_value_still_count_towards_a_farther_reach(backend):
    """z of 0, 50, 127, 128, 199, 200, 254 and 255, at a slope of 1 that no rounding touches."""
    z = torch.tensor([0, 50, 127, 128, 199, 200, 254, 255])
    query, key = torch.zeros(1, 4, 1, 2, dtype=torch.uint8), torch.zeros(1, 4, len(z), 2, dtype=torch.uint8)
    key[..., 0] = z
    value = torch.full((1, 4, len(z), 1), 127, dtype=torch.int8)
    grid = IntegerGrid.of(1.0, 1.0, 1.0, -0.5, scale=1.0, reach=torch.tensor([1.0, 128.0, 200.0, 255.0]))
    total = integer_attention(query, key, value, grid, center=False, backend=backend)
    assert total[0, :, 0, 0].tolist() == [127 + 77] * 4
    # 1; 128 + 78 + 1; 200 + 150 + 73 + 72 + 1; 255 + 205 + 128 + 127 + 56 + 55 + 1
    assert total[0, :, 0, 1].tolist() == [1, 207, 496, 827]
    found = inhibitor_attention_int8(
        query, key, value, grid, eta=2.0, length_exponent=1.0, center=False, backend=backend
    )
    heard = [0.5 + count / reach for count, reach in ((1, 1), (207, 128), (496, 200), (827, 255))]
    torch.testing.assert_close(found.flatten(), torch.tensor([204 * 2 / n for n in heard]))


def test_a_grid_from_numbers_by_key_head_serves_its_group():
    grid = IntegerGrid.of(torch.tensor([0.5, 1.0]), 0.25, torch.ones(4), 0.0, scale=1.0)
    assert grid.query_key_step.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert grid.value_step.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("query_key_step", 0.0, "query_key_step: expected finite numbers greater than 0"),
        ("query_key_step", 1e-39, "query_key_step: expected finite numbers greater than 0"),
        ("value_step", NAN, "value_step: expected finite numbers greater than 0"),
        ("value_step", torch.tensor([1.0, -1.0]), "value_step: expected finite numbers greater than 0"),
        ("value_step", torch.ones(0), "value_step: expected finite numbers"),
        ("gamma", 0.0, "gamma: expected finite numbers greater than 0.*Train with γ > 0"),
        ("gamma", torch.tensor([1.0, -0.5, 1.0]), "gamma: expected finite numbers greater than 0"),
        ("delta", math.inf, "delta: expected finite numbers, got"),
        ("reach", 0.0, "reach: expected finite numbers greater than 0.*Train with τ > 0, or pass reach=None"),
        ("reach", torch.tensor([1.0, math.inf]), "reach: expected finite numbers greater than 0"),
        ("reach", torch.ones(3), "query_key_step: expected one number for each of 3 heads"),
        ("scale", 0.0, "scale: expected a number greater than 0"),
        ("scale", None, "scale: expected a number greater than 0, got None"),
        ("scale", torch.tensor(0.5), "scale: expected a number greater than 0"),
        ("gamma", None, "gamma: expected a number or a tensor, got None"),
        ("value_step", "a", "value_step: expected a number or a tensor, got 'a'"),
        ("gamma", torch.ones(5), "query_key_step: expected one number for each of 5 heads"),
    ],
)
def test_a_grid_refuses_what_has_no_integer_form(name, wrong, match):
    given: dict[str, Any] = {
        "query_key_step": torch.ones(2),
        "value_step": 1.0,
        "gamma": 1.0,
        "delta": 0.0,
        "scale": 1.0,
    }
    with pytest.raises(OperatorError, match=match):
        IntegerGrid.of(**(given | {name: wrong}))


def test_a_grid_put_together_by_hand_must_fit():
    good = IntegerGrid.of(0.5, 0.5, torch.ones(3), 0.0, scale=1.0)
    with pytest.raises(OperatorError, match=r"multiplier: expected torch.int32 of shape \(heads,\)"):
        IntegerGrid(good.query_key_step, good.value_step, good.multiplier.long(), good.shift, good.threshold)
    with pytest.raises(OperatorError, match=r"value_step: expected torch.float32 of shape \(heads,\)"):
        IntegerGrid(good.query_key_step, good.value_step[:2], good.multiplier, good.shift, good.threshold)
    with pytest.raises(OperatorError, match=r"reach: expected torch.int32 of shape \(heads,\)"):
        IntegerGrid(*good.tensors[:5], torch.ones(3))


def test_numbers_go_to_the_nearest_step_ties_to_even_and_stay_in_range():
    x = torch.tensor([-1e30, -64.3, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 63.7, math.inf, NAN]).view(1, 1, 1, -1)
    step = torch.ones(1)
    assert quantize_query_key(x, step).flatten().tolist() == [0, 64, 126, 128, 128, 128, 130, 130, 192, 255, 128]
    assert quantize_value(x, step).flatten().tolist() == [-127, -64, -2, 0, 0, 0, 2, 2, 64, 127, 0]
    assert quantize_query_key(x, step, bits=4).flatten().tolist() == [
        120,
        120,
        126,
        *[128] * 3,
        130,
        130,
        135,
        135,
        128,
    ]
    assert quantize_value(x, step, bits=4).flatten().tolist() == [-7, -7, -2, 0, 0, 0, 2, 2, 7, 7, 0]


IN_RANGE = {
    "multiplier": (1 << 15, 1 << 16),
    "shift": (8, 32),
    "threshold": (-(1 << 18), (1 << 18) + 1),
    "reach": (1, 256),
}


@pytest.mark.parametrize("name", IN_RANGE)
def test_a_grid_put_together_by_hand_stays_in_the_ranges_of_the_specification(name):
    good = IntegerGrid.of(0.5, 0.5, torch.ones(3), 0.0, scale=1.0, reach=1.0)
    low, end = IN_RANGE[name]
    for number in (low, end - 1):
        replace(good, **{name: torch.tensor([low, number, low], dtype=torch.int32)})
    for number in (low - 1, end):
        with pytest.raises(OperatorError, match=rf"{name}: expected numbers from {low} to {end - 1}, got .*{number}"):
            replace(good, **{name: torch.tensor([low, number, low], dtype=torch.int32)})


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, NAN])
@pytest.mark.parametrize("name", ["query_key_step", "value_step"])
def test_a_grid_put_together_by_hand_has_steps(name, wrong):
    good = IntegerGrid.of(0.5, 0.5, torch.ones(3), 0.0, scale=1.0)
    with pytest.raises(OperatorError, match=f"{name}: expected finite numbers greater than 0, got .*{wrong}"):
        replace(good, **{name: torch.tensor([1.0, wrong, 1.0])})


def test_a_grid_lies_on_one_device():
    good = IntegerGrid.of(0.5, 0.5, torch.ones(3), 0.0, scale=1.0)
    with pytest.raises(OperatorError, match="shift: expected query_key_step's device cpu, got meta"):
        replace(good, shift=good.shift.to("meta"))
    with pytest.raises(OperatorError, match="delta: expected gamma's device cpu, got meta"):
        IntegerGrid.of(0.5, 0.5, torch.ones(3), torch.zeros(3, device="meta"), scale=1.0)


def test_numbers_go_where_the_tensors_are():
    with torch.device("meta"):
        grid = IntegerGrid.of(0.5, 0.5, torch.ones(3, device="cpu"), 0.0, scale=1.0, reach=1.0)
    assert {tensor.device.type for tensor in grid.tensors if tensor is not None} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_float64_whatever_the_default_dtype(dtype):
    numbers = {"query_key_step": 0.02, "value_step": 0.0123, "gamma": 1.1, "delta": 0.37, "reach": 1.7}
    tensors = {name: torch.tensor([number], dtype=torch.float64) for name, number in numbers.items()}
    expected = IntegerGrid.of(**tensors, scale=0.125)
    torch.set_default_dtype(dtype)
    try:
        found = IntegerGrid.of(**numbers, scale=0.125)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.tensors._asdict().items():
        assert torch.equal(getattr(found, name), tensor), name


def test_grids_are_told_apart_by_what_they_are():
    one, other = (IntegerGrid.of(0.5, 0.5, torch.ones(3), 0.0, scale=1.0) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("function", [quantize_query_key, quantize_value])
@pytest.mark.parametrize(
    ("step", "got"),
    [
        (0.1, "float"),
        (torch.ones(3), r"torch.float32 of shape \(3,\)"),
        (torch.ones(()), r"torch.float32 of shape \(\)"),
        (torch.ones(4).double(), "torch.float64 of shape"),
        (torch.ones(4, device="meta"), "on meta"),
    ],
    ids=["number", "other heads", "no dimension", "float64", "another device"],
)
def test_a_step_that_does_not_fit_is_refused(function, step, got):
    with pytest.raises(
        OperatorError, match=rf"step: expected torch.float32 of shape \(4,\) or \(1,\) on cpu, got .*{got}"
    ):
        function(randn(2, 4, 5, 6), step)
    with pytest.raises(OperatorError, match="x: expected 4 dimensions"):
        function(randn(4, 5, 6), torch.ones(1))


@pytest.mark.parametrize("bits", [1, 9, 4.0, "8"])
def test_widths_that_are_none_are_refused(bits):
    with pytest.raises(OperatorError, match="bits: expected 2 to 8"):
        quantize_value(randn(1, 1, 2, 2), torch.ones(1), bits)


def test_integers_are_not_put_on_a_grid_twice():
    with pytest.raises(OperatorError, match=r"x: expected a floating-point tensor, got torch\.uint8"):
        quantize_query_key(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.ones(1))


# Signal to noise in dB, of the worst head, for normal data and steps that clip at four standard deviations: the grid's
# own noise is some 35 dB below a value. A wrong formula is at 20 dB or less.
LEAST_DB = {8: 30.0, 6: 18.0, 4: 5.0}
RULES = [
    {},
    {"center": False},
    {"signed": False},
    {"is_causal": True},
    {"mask": "bk"},
    {"mask": "bhqk"},
    {"reach": True},
]


def decibel(found: torch.Tensor, true: torch.Tensor) -> float:
    signal, noise = true.pow(2).sum((0, 2, 3)), (found - true).pow(2).sum((0, 2, 3))
    return float(10 * torch.log10(signal / noise).min())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bits", LEAST_DB)
def test_is_the_float_operator_within_the_grids_noise(bits, rule):
    case = Case(2, HEADS, 2, 40, 90, 64, 32, parameters="numbers", **rule)
    given, _ = arguments(case, torch.float32)
    given.options["delta"] = delta = 0.5 if case.center else -6.0  # or Z would leave next to nothing of the values
    most = 2 ** (bits - 1) - 1
    grid = IntegerGrid.of(
        4 / most, 8 / most, torch.full((HEADS,), 0.7), delta, scale=0.125, reach=given.options.get("reach")
    )
    options = {name: given.options[name] for name in ("attn_mask", "is_causal", "center", "signed", "enable_gqa")}
    shared = {name: given.options[name] for name in ("eta", "length_exponent")}
    query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
    steps = grid.query_key_step[:1], grid.value_step[:1]
    query, key = (quantize_query_key(x, steps[0], bits) for x in (query, key))
    value = quantize_value(value, steps[1], bits)
    true = given("reference")
    found = inhibitor_attention_int8(query, key, value, grid, **shared, **options, backend="reference")
    assert decibel(found, true) >= LEAST_DB[bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_floats_are_quantised_inside_as_they_are_outside(dtype):
    case = Case(2, HEADS, 2, 9, 20, 16, 8)
    given, _ = arguments(case, dtype)
    query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
    grid = grid_of(case)
    by_key = grid.query_key_step[::2], grid.value_step[::2]
    integers = (
        quantize_query_key(query, grid.query_key_step),
        quantize_query_key(key, by_key[0]),
        quantize_value(value, by_key[1]),
    )
    expected = integer_attention(*integers, grid, enable_gqa=True, backend="reference")
    assert torch.equal(integer_attention(query, key, value, grid, enable_gqa=True, backend="reference"), expected)
    found = inhibitor_attention_int8(query, key, value, grid, enable_gqa=True, backend="reference")
    assert found.dtype == dtype
    assert torch.equal(found, (expected * grid.value_step.view(-1, 1, 1)).to(dtype))
    assert inhibitor_attention_int8(*integers, grid, enable_gqa=True, backend="reference").dtype == torch.float32


def test_the_rescale_is_rounded_once():
    """Value step · η · n^(−ρ) in float64; the sum is a whole number that float32 holds."""
    case = Case(1, HEADS, HEADS, 5, 7, 4, 3, is_causal=True)
    query, key, value = codes(case)
    grid, eta, rho = grid_of(case), randn(HEADS), randn(HEADS, seed=1)
    total = integer_attention(query, key, value, grid, is_causal=True, backend="reference")
    found = inhibitor_attention_int8(
        query, key, value, grid, eta=eta, length_exponent=rho, is_causal=True, backend="reference"
    )
    count = torch.arange(1.0, 6.0).double().view(1, 5, 1)
    exact = (
        grid.value_step.double().view(-1, 1, 1) * eta.double().view(-1, 1, 1) * count ** -rho.double().view(-1, 1, 1)
    )
    assert torch.equal(found, total.float() * exact.float())


def test_the_rescale_by_what_is_heard_is_rounded_once():
    case = Case(2, HEADS, 2, 5, 7, 4, 3, reach=True)
    query, key, value = codes(case)
    grid, eta, rho = grid_of(case), randn(2, HEADS, 5), randn(HEADS, seed=1)
    assert grid.reach is not None
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "backend": "reference"}
    total = integer_attention(query, key, value, grid, **options)
    found = inhibitor_attention_int8(query, key, value, grid, eta=eta, length_exponent=rho, **options)
    heard = 0.5 + total[..., 3:].double() / grid.reach.view(-1, 1, 1)
    exact = grid.value_step.double().view(-1, 1, 1) * eta.double().unsqueeze(-1) * heard ** -rho.double().view(-1, 1, 1)
    assert torch.equal(found, total[..., :3].float() * exact.float())


@pytest.mark.parametrize("reach", [False, True])
def test_each_query_may_have_a_gain_of_its_own(reach):
    case = Case(2, HEADS, 2, 5, 7, 4, 3, reach=reach)
    query, key, value = codes(case)
    grid, eta = grid_of(case), randn(2, HEADS, 5).exp()
    options: dict[str, Any] = {"length_exponent": 0.5, "enable_gqa": True, "backend": "reference"}
    found = inhibitor_attention_int8(query, key, value, grid, eta=eta, **options)
    plain = inhibitor_attention_int8(query, key, value, grid, **options)
    torch.testing.assert_close(found, plain * eta.unsqueeze(-1))
    with pytest.raises(OperatorError, match=r"eta: expected .* \(2, 4, 5\) .*, got .* \(2, 4, 4\)"):
        inhibitor_attention_int8(query, key, value, grid, eta=eta[:, :, :4], **options)


@pytest.mark.parametrize("reach", [False, True])
def test_queries_that_see_nothing_and_empty_inputs_give_zeros(reach):
    for queries, keys in itertools.product((0, 1, 3), repeat=2):
        case = Case(2, HEADS, HEADS, queries, keys, 4, 3, reach=reach)
        query, key, value = codes(case)
        found = integer_attention(query, key, value, grid_of(case), backend="reference")
        assert found.shape == (2, HEADS, queries, 3 + reach)
        assert found.dtype == torch.int32
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        found = integer_attention(query, key, value, grid_of(case), attn_mask=hidden, backend="reference")
        assert not found.any()
        found = inhibitor_attention_int8(
            query, key, value, grid_of(case), length_exponent=0.7, attn_mask=hidden, backend="reference"
        )
        assert not found.any()
    query, key, value = codes(Case(0, HEADS, HEADS, 3, 4, 4, 3))
    found = integer_attention(query, key, value, grid_of(case), backend="reference")
    assert found.shape == (0, HEADS, 3, 3 + reach)


def test_rows_in_tiles_are_rows_at_once(monkeypatch):
    case = Case(2, HEADS, 2, 19, 30, 8, 6, mask="bhqk", is_causal=True, reach=True)
    query, key, value = codes(case)
    options: dict[str, Any] = {
        "attn_mask": mask(case, torch.Generator().manual_seed(0)),
        "is_causal": True,
        "enable_gqa": True,
    }
    expected = integer_attention(query, key, value, grid_of(case), **options, backend="reference")
    monkeypatch.setattr(integer_reference, "_TILE", 5 * 2 * HEADS * 30 * 6)
    assert torch.equal(integer_attention(query, key, value, grid_of(case), **options, backend="reference"), expected)


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    q, v = torch.zeros(2, 4, 5, 8, dtype=torch.uint8), torch.zeros(2, 4, 5, 8, dtype=torch.int8)
    f = torch.zeros(2, 4, 5, 8)
    one = IntegerGrid.of(0.1, 0.1, torch.ones(4), 0.0, scale=1.0)
    apart = IntegerGrid.of(torch.tensor([0.1, 0.2, 0.3, 0.3]), 0.1, 1.0, 0.0, scale=1.0)
    values_apart = IntegerGrid.of(0.1, torch.tensor([0.1, 0.2, 0.3, 0.3]), 1.0, 0.0, scale=1.0)
    wide = torch.zeros(2, 4, 5, 257, dtype=torch.uint8)
    long = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(2, 4, 2**17 + 1, 8)
    grouped: dict[str, Any] = {"key": q[:, :2], "value": v[:, :2], "enable_gqa": True}
    return {
        "no tensor": ({"query": [1]}, "query: expected a tensor"),
        "three dimensions": ({"key": q[0]}, "key: expected 4 dimensions"),
        "signed query": ({"query": v}, "query: expected torch.uint8, or all of floating point, got torch.int8"),
        "signed key": ({"key": v}, "key: expected torch.uint8, or all of floating point, got torch.int8"),
        "unsigned value": ({"value": q}, "value: expected torch.int8, or all of floating point, got torch.uint8"),
        "floats and integers": ({"query": f}, "key: expected torch.float32, got torch.uint8"),
        "two kinds of floats": ({"query": f, "key": f.half(), "value": f}, "key: expected torch.float32, got torch.fl"),
        "integers and a float": ({"value": f}, "value: expected torch.int8, or all of floating point, got torch.float"),
        "head_dim": ({"query": wide, "key": wide}, "query: expected 256 features at most, got 257"),
        "value_dim": ({"value": wide.view(torch.int8)}, "value: expected 256 features at most, got 257"),
        "keys": ({"key": long, "value": long.view(torch.int8)}, "key: expected 131072 keys at most, got 131073"),
        "other head_dim": ({"key": q[..., :4]}, "key: expected query's head_dim 8"),
        "other length": ({"value": v[:, :, :4]}, "value: expected one row for each of the 5 keys"),
        "groups": ({"key": q[:, :2], "value": v[:, :2]}, "key: expected query's 4 heads, or 1, got 2.*enable_gqa=True"),
        "no grid": ({"grid": 0.1}, "grid: expected an IntegerGrid, got float"),
        "another grid": ({"grid": IntegerGrid.of(0.1, 0.1, 1.0, 0.0, scale=1.0)}, "grid: expected query's 4 heads"),
        "a grid elsewhere": ({"grid": one.to("meta")}, "grid: expected query's device cpu, got meta"),
        "steps in a group": (grouped | {"grid": apart}, "grid.query_key_step: expected equal steps"),
        "value steps in a group": (grouped | {"grid": values_apart}, "grid.value_step: expected equal steps"),
        "additive mask": ({"attn_mask": torch.zeros(5, 5)}, "attn_mask: expected a boolean tensor"),
        "mask's shape": ({"attn_mask": torch.ones(5, 4, dtype=torch.bool)}, "attn_mask: expected a shape that"),
        "a flag": ({"is_causal": 1}, "is_causal: expected True or False"),
        "backend": ({"backend": "referense"}, "backend: expected one of auto, cpu, triton, reference.*'reference'"),
        "backend of floats": ({"backend": "torch"}, "backend: expected one of auto, cpu, triton, reference"),
    }


@pytest.mark.parametrize("function", [integer_attention, inhibitor_attention_int8])
@pytest.mark.parametrize("name", bad_calls())
def test_refuses_with_the_argument_and_a_remedy(name, function):
    wrong, match = bad_calls()[name]
    given: dict[str, Any] = {
        "query": torch.zeros(2, 4, 5, 8, dtype=torch.uint8),
        "key": torch.zeros(2, 4, 5, 8, dtype=torch.uint8),
        "value": torch.zeros(2, 4, 5, 8, dtype=torch.int8),
        "grid": IntegerGrid.of(0.1, 0.1, torch.ones(4), 0.0, scale=1.0),
    }
    with pytest.raises(OperatorError, match=match):
        function(**(given | wrong))


@pytest.mark.parametrize("name", ["eta", "length_exponent"])
def test_parameters_of_the_rescale_are_checked(name):
    q = torch.zeros(1, 2, 5, 8)
    grid = IntegerGrid.of(0.1, 0.1, torch.ones(2), 0.0, scale=1.0)
    wrong: dict[str, Any] = {name: torch.ones(3)}
    with pytest.raises(OperatorError, match=rf"{name}: expected a number or a floating-point tensor of shape \(2,\)"):
        inhibitor_attention_int8(q, q, q, grid, **wrong)


def test_there_is_no_gradient_and_it_says_so():
    q = randn(1, 2, 5, 8).requires_grad_()
    grid = IntegerGrid.of(0.1, 0.1, torch.ones(2), 0.0, scale=1.0)
    output = inhibitor_attention_int8(q, q, q, grid)
    with pytest.raises(OperatorError, match=r"expected a call without gradients.*fake quantisation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["query", "key", "value", "eta", "length_exponent"])
def test_there_is_no_forward_mode_and_it_says_so(name):
    given: dict[str, Any] = {tensor: randn(1, 2, 5, 8) for tensor in ("query", "key", "value")}
    given |= {"eta": torch.ones(2), "length_exponent": torch.ones(2)}
    grid = IntegerGrid.of(0.1, 0.1, torch.ones(2), 0.0, scale=1.0, reach=1.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(OperatorError, match=r"inhibitor_attention_int8: expected .*a tangent.*inhibitor_attention"):
            inhibitor_attention_int8(**(given | {name: dual}), grid=grid)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_unequal_steps_within_a_group_are_refused_in_a_graph_too(backend):
    grid = IntegerGrid.of(torch.tensor([0.02, 0.05, 0.02, 0.05]), 0.02, 1.0, 0.5, scale=0.25)

    def function(query, key):
        return inhibitor_attention_int8(query, key, key, grid, enable_gqa=True, backend=backend)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with pytest.raises(OperatorError, match="query_key_step: expected equal steps"):
        compiled(randn(1, 4, 5, 16), randn(1, 2, 5, 16))


def test_auto_says_what_it_takes_and_why():
    assert which_integer_backend(torch.zeros(1, 1, 1, 1, device="meta")).name == "reference"
    q, v = (torch.zeros(1, 1, 2, 2, dtype=dtype, device="meta") for dtype in (torch.uint8, torch.int8))
    grid = IntegerGrid.of(0.1, 0.1, 1.0, 0.0, scale=1.0).to("meta")
    with pytest.raises(OperatorError, match=r"backend: .*there is no native integer kernel for meta"):
        integer_attention(q, q, v, grid, backend="cpu")
