"""The reference against the equations of METHOD written as Python loops, and against results worked out by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from inhibitor import inhibitor_attention
from inhibitor.ops import reference
from tests.ops.cases import TOLERANCES, Arguments, Case, arguments, separate

TINY = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 1, 1, 3, 4, 3, 2, parameters="numbers"),
    Case(1, 4, 4, 2, 3, 2, 3, parameters="per head"),
    Case(2, 4, 2, 3, 3, 2, 2, mask="bhqk", parameters="per head"),
    Case(2, 4, 2, 3, 4, 2, 2, mask="bhqk", parameters="per head", reach=True),
    Case(1, 2, 2, 4, 3, 3, 2, is_causal=True, signed=False, parameters="numbers", reach=True),
    Case(2, 4, 1, 3, 5, 2, 2, mask="bk", is_causal=True, parameters="per head"),
    Case(1, 2, 2, 4, 3, 3, 2, is_causal=True, parameters="shared"),
    Case(2, 2, 2, 3, 4, 3, 2, mask="qk", center=False, parameters="numbers"),
    Case(2, 2, 1, 3, 4, 3, 2, mask="hk", signed=False, parameters="per head"),
    Case(1, 2, 2, 3, 4, 3, 2, center=False, signed=False, is_causal=True, parameters="per head"),
    Case(2, 2, 2, 3, 0, 3, 2, parameters="numbers"),
    Case(2, 2, 2, 0, 3, 3, 2, parameters="numbers"),
    Case(0, 2, 2, 3, 3, 3, 2, parameters="numbers"),
]


def looped(given: Arguments) -> np.ndarray:
    """METHOD's S, Z and H, one number at a time."""
    query, key, value = (given.tensors[name].numpy() for name in ("query", "key", "value"))
    options: dict[str, Any] = {"gamma": 1.0, "eta": 1.0, "delta": 0.0, "length_exponent": 0.0, "reach": np.inf}
    options = options | given.options | given.tensors
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = value.shape[2:]
    group = heads // key.shape[1]
    mask = options["attn_mask"]
    mask = np.broadcast_to(True if mask is None else mask.numpy(), (batch, heads, queries, keys))
    parameter = {
        name: np.broadcast_to(np.asarray(options[name]), (heads,))
        for name in ("gamma", "eta", "delta", "length_exponent", "reach")
    }
    result = np.zeros((batch, heads, queries, value_dim))
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        allowed = [j for j in range(keys) if mask[b, h, i, j] and (j <= i or not options["is_causal"])]
        score = {}
        for j in allowed:
            distance = sum(abs(query[b, h, i, k] - key[b, h // group, j, k]) for k in range(head_dim))
            score[j] = parameter["gamma"][h] / head_dim**0.5 * distance
        mean = sum(score.values()) / len(allowed) if allowed and options["center"] else 0.0
        inhibition = {j: max(score[j] - mean + parameter["delta"][h], 0.0) for j in allowed}
        for j, feature in itertools.product(allowed, range(value_dim)):
            z = inhibition[j]
            v = value[b, h // group, j, feature]
            if options["signed"]:
                result[b, h, i, feature] += max(max(v, 0.0) - z, 0.0) + min(min(v, 0.0) + z, 0.0)
            else:
                result[b, h, i, feature] += max(v - z, 0.0)
        if allowed:
            length, reach = float(len(allowed)), parameter["reach"][h]
            if np.isfinite(reach):
                length = 0.5 + sum(max(1 - z / reach, 0.0) for z in inhibition.values())
            result[b, h, i] *= parameter["eta"][h] * length ** -parameter["length_exponent"][h]
    return result


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_equations_in_loops(case, backend):
    given, _ = arguments(case)
    np.testing.assert_allclose(given(backend).numpy(), looped(given), rtol=0, atol=TOLERANCES["loops"])


# One query, two keys, one score feature: q = 1, k = (0, 3), so |q − k| = (1, 2) and the mean is 1.5.
BY_HAND = [
    ("plain", {}, [2.0 + (-1.0 + 0.5)]),  # Z = (0, 0.5)
    ("shifted", {"delta": 1.0}, [(2.0 - 0.5) + 0.0]),  # Z = (0.5, 1.5): −1 is inhibited whole
    ("negative shift", {"delta": -0.25}, [2.0 + (-1.0 + 0.25)]),  # Z = (0, 0.25)
    ("uncentred", {"center": False}, [(2.0 - 1.0) + 0.0]),  # Z = (1, 2)
    ("slope", {"gamma": 0.5}, [2.0 + (-1.0 + 0.25)]),  # Z = (0, 0.25)
    ("negative slope", {"gamma": -1.0}, [(2.0 - 0.5) - 1.0]),  # S = (−1, −2): Z = (0.5, 0)
    ("scale", {"scale": 2.0}, [2.0 + 0.0]),  # Z = (0, 1)
    ("eta", {"eta": -3.0}, [-3 * 1.5]),
    ("mean over keys", {"length_exponent": 1.0}, [1.5 / 2]),
    ("mean over keys heard", {"length_exponent": 1.0, "reach": 2.0}, [1.5 / (0.5 + 1 + 0.75)]),  # Z = (0, 0.5)
    ("one key heard", {"length_exponent": 1.0, "reach": 0.5}, [1.5 / (0.5 + 1)]),  # Z = τ is not
    ("a sum has no length", {"reach": 2.0}, [1.5]),
    ("a gain for each query", {"eta": torch.tensor([[[2.0]]]).double()}, [2 * 1.5]),
    ("unsigned", {"signed": False}, [2.0 + 0.0]),  # −1 − 0.5 < 0
    ("masked", {"attn_mask": torch.tensor([False, True])}, [-1.0]),  # the mean is of one key: Z = 0
    ("causal", {"is_causal": True}, [2.0]),
    ("masked, mean over keys", {"attn_mask": torch.tensor([False, True]), "length_exponent": 1.0}, [-1.0]),
]


@pytest.mark.parametrize(("options", "expected"), [row[1:] for row in BY_HAND], ids=[row[0] for row in BY_HAND])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_query_two_keys_by_hand(options, expected, backend):
    query, key, value = (torch.tensor(rows).double().view(1, 1, -1, 1) for rows in ([1.0], [0.0, 3.0], [2.0, -1.0]))
    result = inhibitor_attention(query, key, value, backend=backend, **options)
    assert result.flatten().tolist() == expected


def test_gradients_of_one_query_two_keys_by_hand():
    rows = ([1.0], [0.0, 3.0], [2.0, -1.0])
    query, key, value = (torch.tensor(row).double().view(1, 1, -1, 1).requires_grad_() for row in rows)
    gamma, delta = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (1.0, 0.0))
    for backend in ("reference", "torch"):
        result = inhibitor_attention(query, key, value, gamma=gamma, delta=delta, backend=backend)
        found = torch.autograd.grad(result.sum(), (query, key, value, gamma, delta))
        # H = 2 + (−1 + Z₂), Z₂ = γ (|q − k₂| − (|q − k₁| + |q − k₂|) / 2) + δ = γ (|q − k₂| − |q − k₁|) / 2 + δ
        assert [gradient.flatten().tolist() for gradient in found] == [[-1.0], [0.5, 0.5], [1.0, 1.0], [0.5], [1.0]]


def test_inhibition_is_the_soft_threshold():
    """(V⁺ − Z)⁺ + (V⁻ + Z)⁻ = V − clamp(V, −Z, Z) for Z ≥ 0."""
    given, _ = arguments(Case(2, 2, 2, 5, 7, 3, 4, mask="bhqk", is_causal=True), seed=3)
    query, key, value = (given.tensors[name] for name in ("query", "key", "value"))
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    z = reference.inhibition(query, key, one, zero, given.options["attn_mask"], True, True, 3**-0.5)
    assert z.isinf().any()
    assert (z == 0).any()
    value, z = value.unsqueeze(2), z.unsqueeze(-1)
    expected = (value - value.clamp(-z, z)).sum(-2)
    torch.testing.assert_close(given("reference"), expected, rtol=0, atol=1e-5)  # Z for looking at is in float32


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_mean_does_not_run_over_padding(backend):
    given, _ = arguments(Case(1, 2, 2, 4, 5, 3, 4, parameters="numbers"))
    pad = torch.full((1, 2, 3, 4), 1e3, dtype=torch.float64)
    padded = Arguments(
        {
            "query": given.tensors["query"],
            "key": torch.cat([given.tensors["key"], pad[..., :3]], 2),
            "value": torch.cat([given.tensors["value"], pad], 2),
        },
        given.options | {"attn_mask": torch.arange(8) < 5},
    )
    torch.testing.assert_close(padded(backend), given(backend), rtol=0, atol=TOLERANCES["loops"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_accumulated_in_float32_and_rounded_once(dtype):
    case = Case(2, 4, 2, 9, 70, 16, 8, mask="bk", parameters="per head", reach=True)
    given, grad = arguments(case, dtype)
    wide = given.to(torch.float32).with_gradients(grad.float(), "reference")
    for name, found in given.with_gradients(grad, "reference").items():
        if name == "output":
            assert torch.equal(found, wide[name].to(dtype))
        else:
            torch.testing.assert_close(found, wide[name].to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_half_precision_are_not_rounded_once_more(dtype):
    """γ times the scale: head_dim is no power of four, so that the product has more digits than γ."""
    given, _ = arguments(Case(2, 4, 2, 5, 7, 32, 8, mask="bk", parameters="per head"), torch.float32)
    half = {name: given.tensors[name].to(dtype) for name in ("gamma", "delta")}
    narrow, wide = (
        Arguments(given.tensors | parameters, given.options)
        for parameters in (half, {name: tensor.float() for name, tensor in half.items()})
    )
    assert torch.equal(narrow("reference"), wide("reference"))
    shown, expected = (
        reference.inhibition(given.tensors["query"], given.tensors["key"], gamma, delta, None, False, True, 32**-0.5)
        for gamma, delta in (half.values(), [tensor.float() for tensor in half.values()])
    )
    assert torch.equal(shown, expected)


def test_half_precision_distances_do_not_overflow():
    far = torch.full((1, 1, 2, 256), 300.0, dtype=torch.float16)
    value = torch.ones(1, 1, 2, 4, dtype=torch.float16)
    assert inhibitor_attention(far, -far, value, backend="reference").flatten().tolist() == [2.0] * 8


def test_can_be_differentiated_twice():
    case = Case(2, 2, 1, 2, 3, 2, 2, mask="bhqk", parameters="per head")
    given = separate(case, arguments(case, seed=1)[0])
    names = list(given.tensors)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return Arguments(dict(zip(names, tensors, strict=True)), given.options)("reference") ** 2

    assert torch.autograd.gradgradcheck(call, [tensor.requires_grad_() for tensor in given.tensors.values()])


def test_inhibition_of_grouped_heads_equals_that_of_repeated_keys():
    given, _ = arguments(Case(2, 4, 2, 3, 5, 3, 2))
    query, key = given.tensors["query"], given.tensors["key"]
    one, half = torch.ones(4), torch.full((4,), 0.5)
    grouped = reference.inhibition(query, key, one, half, None, True, False, 1.0)
    repeated = reference.inhibition(query, key.repeat_interleave(2, 1), one, half, None, True, False, 1.0)
    assert torch.equal(grouped, repeated)
    assert grouped.shape == (2, 4, 3, 5)
