"""A compact suite for a build of the native kernels: for mutants and for sanitizers, run in a process of its own.

    python -m tests.ops.compact library.so [library.so ...]

prints a line for each: its path and the first check that it fails, or "survives".
"""

import functools
import sys
from dataclasses import replace
from unittest import mock

import torch

from inhibitor.ops import blocked, cpu
from tests.ops.cases import FACTOR, LUCK, SWEEP, Arguments, Case, arguments, relative_error, separate, sizes
from tests.ops.layouts import LAYOUTS, different, step_two
from tests.ops.suite import Suite

NAN, INF = float("nan"), float("inf")
VALUES = [
    Case(2, 4, 2, 5, 4, 3, 2, parameters="per head"),
    Case(1, 2, 1, 67, 70, 20, 9, mask="hk", parameters="per head", reach=True),
    Case(2, 4, 4, 70, 150, 17, 40, mask="bhqk", parameters="per head", reach=True),
    Case(1, 2, 2, 130, 131, 24, 36, is_causal=True, parameters="per head"),
    Case(1, 2, 2, 130, 131, 24, 36, is_causal=True, signed=False, center=False, parameters="per head"),
    Case(2, 2, 2, 9, 300, 33, 20, signed=False, parameters="per head"),
    Case(1, 1, 1, 12, 7, 257 - 1, 5, parameters="per head"),
    Case(2, 4, 1, 40, 140, 16, 16, mask="bk", is_causal=True, parameters="per head"),
    Case(1, 4, 2, 2, 1100, 20, 9, mask="bhqk", is_causal=False, parameters="per head", reach=True),  # few queries
    Case(2, 2, 2, 3, 5, 20, 9, is_causal=True, signed=False, center=False, parameters="per head"),
    Case(2, 2, 2, 1, 40, 16, 12, parameters="per head"),
]
SMALL = Case(3, 4, 2, 17, 13, 5, 6, mask="bhqk", is_causal=True, parameters="per head", reach=True)
FEW = Case(3, 4, 2, 2, 13, 5, 6, mask="bhqk", is_causal=True, parameters="per head")
LONG = Case(1, 2, 2, 260, 270, 20, 12, mask="k", is_causal=True, parameters="per head")
HALVES = (VALUES[1], VALUES[8])
THREADED = [
    LONG,
    Case(2, 8, 2, 70, 150, 20, 12, parameters="per head"),
    Case(1, 1, 1, 128, 90, 64, 64, is_causal=True, signed=False),
    Case(1, 2, 2, 2, 3000, 64, 64),
]

Tensors = dict[str, torch.Tensor]


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[Arguments, torch.Tensor, Tensors, dict[str, float]]:
    """Arguments, a gradient of the result, what is true in float64, and the largest error allowed."""
    given, grad = arguments(case, dtype)
    given = separate(case, given)
    size = sizes(case, given, grad)
    plain = given.to(torch.float32).with_gradients(grad, "reference")
    truth = given.to(torch.float64).with_gradients(grad, "reference")
    allowed = {}
    for name, true in truth.items():
        rounded = plain[name].to(dtype if true.dim() == 4 else torch.float32)
        allowed[name] = size[name] * (FACTOR * relative_error(rounded, true, size[name]) + LUCK)
    return given, grad, truth, allowed


def exact(case: Case, dtype: torch.dtype) -> None:
    given, grad, truth, allowed = expected(case, dtype)
    found = given.with_gradients(grad, "cpu")
    for name, true in truth.items():
        assert found[name].shape == true.shape
        error = float((found[name].double() - true).abs().max()) if true.numel() else 0.0
        assert error <= allowed[name], (str(case), name)


def values() -> None:
    for case in VALUES:
        exact(case, torch.float32)


def half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for case in HALVES:
            exact(case, dtype)
            given, grad, _, _ = expected(case, dtype)
            given = Arguments({name: given.tensors[name] for name in ("query", "key", "value")}, given.options)
            wide, found = given.to(torch.float32), given.with_gradients(grad, "cpu")
            for name, tensor in wide.with_gradients(grad, "cpu").items():  # rounded once, and to nearest
                assert torch.equal(found[name], tensor.to(dtype)), name


def rounding() -> None:
    options = blocked.Options(None, False, True, True, 1.0)
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        query = torch.zeros(256, 1, 8, 4, dtype=dtype)
        found = cpu.forward(query, query[:, :, :1], numbers.view(256, 1, 1, 256), one, zero, None, options)
        torch.testing.assert_close(
            found, numbers.float().view(256, 1, 1, 256).expand_as(found), rtol=0, atol=0, equal_nan=True
        )
        exact = numbers.float()
        between = (exact[:-1].double() + exact[1:].double()).div(2).float()
        grad = torch.cat([exact, between, between[:1]]).view(-1, 1, 1, 256)
        query, value = torch.zeros(len(grad), 1, 1, 4, dtype=dtype), torch.ones(grad.shape, dtype=dtype)
        found = cpu.backward(grad, query, query, value, one, zero, None, options)[2]
        torch.testing.assert_close(found, grad.to(dtype), rtol=0, atol=0, equal_nan=True)


@functools.cache
def tied(center: bool, signed: bool) -> tuple[Arguments, torch.Tensor, Tensors]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 70, 3), (1, 2, 8, 3), (1, 2, 8, 4), (1, 2, 70, 4))
    query, key, value, grad = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    tensors = {"query": query, "key": key, "value": value, "gamma": torch.ones(2), "delta": torch.tensor([0.0, 1.0])}
    given = Arguments(tensors, {"scale": 1.0, "center": center, "signed": signed})
    return given, grad, given.with_gradients(grad, "reference")


def ties() -> None:
    for center in (True, False):
        for signed in (True, False):
            given, grad, truth = tied(center, signed)
            found = given.with_gradients(grad, "cpu")
            for name, true in truth.items():
                assert relative_error(found[name], true.double()) <= 4 * LUCK, (center, signed, name)


def equal_to(found: Tensors, true: Tensors) -> None:
    assert not different(found, true)


def masked() -> None:
    """What lies in hidden keys, some hidden from all rows and some from most, changes nothing."""
    for case in (SMALL, FEW, LONG):
        given, grad, _, _ = expected(case, torch.float32)
        allowed = torch.rand(case.batch, 1, case.queries, case.keys, generator=torch.Generator().manual_seed(1)) < 0.7
        allowed[..., 3] = allowed[..., case.keys // 2] = False
        allowed[:, :, 1] = False  # sees nothing
        for mask in (allowed, allowed[:, :, :1]):
            hidden = ~mask.any(2).any(0)[0]
            results = []
            for garbage in (0.0, NAN, INF):
                tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
                tensors["key"][:, :, hidden] = tensors["value"][:, :, hidden] = garbage
                call = Arguments(tensors, given.options | {"attn_mask": mask})
                results.append(call.with_gradients(grad, "cpu"))
                assert all(tensor.isfinite().all() for tensor in results[-1].values())
                for name in ("key", "value"):
                    assert not results[-1][name][:, :, hidden].any()
            equal_to(results[1], results[0])
            equal_to(results[2], results[0])
            if mask is allowed:
                assert not results[0]["output"][:, :, 1].any()
                assert not results[0]["query"][:, :, 1].any()


def hidden_from_some() -> None:
    """A NaN reaches the rows that see it and no other."""
    for case in (Case(2, 2, 2, 17, 13, 5, 6, mask="bhqk"), Case(2, 2, 2, 2, 13, 5, 6, mask="bhqk")):
        given, _, _, _ = expected(case, torch.float32)
        mask = given.options["attn_mask"]
        for name in ("query", "key", "value"):
            for garbage in (NAN, INF, -INF):
                tensors = given.tensors | {name: given.tensors[name].clone()}
                tensors[name][0, 1, 1, 2] = garbage
                reached = torch.zeros(case.batch, case.heads, case.queries, case.value_dim, dtype=torch.bool)
                if name == "query":
                    reached[0, 1, 1] = mask[0, 1, 1].any()
                else:
                    features = slice(None) if name == "key" else slice(2, 3)
                    reached[0, 1, :, features] = mask[0, 1, :, 1, None]
                found = Arguments(tensors, given.options)("cpu")
                assert torch.equal(~found.isfinite(), reached), (name, garbage)


def far() -> None:
    """Without centring, an infinitely far key is inhibited whole and not heard."""
    for queries in (2, 9):
        given, _, _, _ = expected(Case(1, 2, 2, queries, 13, 5, 6, center=False, reach=True), torch.float32)
        key = given.tensors["key"].clone()
        key[:, :, 2, 0] = INF
        found = Arguments(given.tensors | {"key": key}, given.options)("cpu")
        without = Arguments(given.tensors, given.options | {"attn_mask": torch.arange(13) != 2})("cpu")
        assert relative_error(found, without.double()) <= 20 * LUCK


def blind() -> None:
    """What is hidden from a row changes no bit of it, whoever else sees it and however large it is."""
    many = Case(2, 2, 2, 40, 40, 5, 6, mask="bhqk")
    for case in (replace(many, mask=None, is_causal=True), many, replace(many, queries=2)):
        for offset in (0.0, 30.0):
            given, _, _, _ = expected(case, torch.float32)
            mask = given.options["attn_mask"]
            allowed = torch.ones(case.queries, case.keys, dtype=torch.bool).tril() if mask is None else mask
            blind = ~allowed.expand(case.batch, case.heads, case.queries, case.keys)[..., 20]
            tensors = {name: t + offset if name != "value" else t for name, t in given.tensors.items()}
            clean = Arguments(tensors, given.options)("cpu")
            for garbage in (NAN, INF, 1e30):
                changed = {name: tensor.clone() for name, tensor in tensors.items()}
                changed["key"][:, :, 20] = changed["value"][:, :, 20] = garbage
                assert torch.equal(Arguments(changed, given.options)("cpu")[blind], clean[blind])


def shared() -> None:
    """What all queries and keys share costs no digits."""
    for is_causal in (False, True):
        case = Case(1, 2, 2, 40, 40, 20, 9, is_causal=is_causal)
        given, grad = arguments(case, torch.float32)
        tensors = {name: t + 30.0 if name != "value" else t for name, t in given.tensors.items()}
        moved = Arguments(tensors, given.options)
        truth, size = moved.to(torch.float64)("reference"), sizes(case, moved, grad)["output"]
        allowed = FACTOR * relative_error(moved("reference"), truth, size) + LUCK
        assert relative_error(moved("cpu"), truth, size) <= allowed


def strides() -> None:
    for case in (SMALL, FEW):
        given, grad, _, _ = expected(case, torch.float32)
        for layout in LAYOUTS:
            mask = given.options["attn_mask"]
            mask = mask if layout is step_two else layout(mask)
            leaves = {name: layout(t) if t.dim() == 4 else t for name, t in given.tensors.items()}
            before = {name: tensor.clone() for name, tensor in leaves.items()}
            inputs = {name: t.contiguous() for name, t in leaves.items()}
            dense = Arguments(inputs, given.options | {"attn_mask": mask.contiguous()})
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
            output = Arguments(leaves, given.options | {"attn_mask": mask})("cpu")
            names = [name for name in leaves if name not in ("eta", "length_exponent", "reach")]
            gradients = torch.autograd.grad(output, [leaves[name] for name in names], layout(grad))
            true = dense.with_gradients(layout(grad).contiguous(), "cpu")
            equal_to(
                {"output": output.detach(), **dict(zip(names, gradients, strict=True))},
                {name: true[name] for name in ("output", *names)},
            )
            equal_to({name: tensor.detach() for name, tensor in leaves.items()}, before)


def uninitialised() -> None:
    real = torch.empty
    for case in (SMALL, FEW, LONG):
        given, grad, _, _ = expected(case, torch.float32)
        true = given.with_gradients(grad, "cpu")
        for poison in (NAN, 1e30):
            other = Arguments({name: torch.full_like(t, poison) for name, t in given.tensors.items()}, given.options)
            with mock.patch.object(torch, "empty", lambda *a, **o: real(*a, **o).fill_(poison)):  # noqa: B023
                other.with_gradients(grad, "cpu")
                equal_to(given.with_gradients(grad, "cpu"), true)


def threads() -> None:
    """Two threads make of several parts what one makes of one."""
    for case in THREADED:
        exact(case, torch.float32)
        given, _, _, _ = expected(case, torch.float32)
        alone = given("cpu")
        torch.set_num_threads(2)
        try:
            for _ in range(3):
                exact(case, torch.float32)
                assert torch.equal(given("cpu"), alone)
        finally:
            torch.set_num_threads(1)


def sweep() -> None:
    """A tenth of the sweep, in all three dtypes."""
    for number, case in enumerate(SWEEP[::10]):
        exact(case, (torch.float32, torch.bfloat16, torch.float16)[number % 3])


CHECKS = [
    values,
    ties,
    masked,
    hidden_from_some,
    far,
    blind,
    shared,
    half_precision,
    rounding,
    strides,
    uninitialised,
    threads,
]


def prepare() -> None:
    for case in dict.fromkeys([*VALUES, SMALL, FEW, *THREADED]):
        expected(case, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        for case in HALVES:
            expected(case, dtype)


if __name__ == "__main__":
    Suite((cpu,), CHECKS, sweep, prepare).main(sys.argv[1:])
