"""Defects that the operator could have, and a compact suite that finds each one.

A mutant is the source of a module with one text replaced, run as a fresh module and registered under a name of its own.
A text that is no longer in the source is an error: the catalogue follows the code.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from inhibitor.errors import OperatorError
from inhibitor.ops import attention, backends, blocked, checks, masks, operator
from tests.mutants import mutated
from tests.ops.cases import LUCK, TOLERANCES, Arguments, Case, arguments, relative_error

LOOP = "        for tile in _tiles(query, key, value, gamma, delta, reach, options):\n"
NO_AUTOCAST = "    with torch.autocast(query.device.type, enabled=False):\n" + LOOP
AS_IT_IS = "    if True:\n" + LOOP
FLATTENED = "query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)\n"
RETURN = "return output.view("
FORWARD = "            _, inhibition, forbidden"
BACKWARD = "            distance, inhibition, forbidden"

# module, defect, text, what stands there instead
CATALOGUE = [
    (blocked, "wrong sign of the key's gradient", "grad_key[tile.heads] += ", "grad_key[tile.heads] -= "),
    (blocked, "query's gradient too small", "_grad_distance(grad_score, left", "_grad_distance(0.9 * grad_score, left"),
    (blocked, "key's gradient of the last tile only", "grad_key[tile.heads] += ", "grad_key[tile.heads] = "),
    (blocked, "value's gradient of the last tile only", "grad_value[tile.heads] += ", "grad_value[tile.heads] = "),
    (blocked, "gamma's gradient of the last tile only", "grad_gamma[tile.heads] += ", "grad_gamma[tile.heads] = "),
    (blocked, "gamma's gradient without the scale", ".mul_(options.scale)", ""),
    (blocked, "gradients of query and key without gamma", ".mul_(tile.slope)", ".mul_(options.scale)"),
    (blocked, "delta's gradient of the first batch", "grad_delta.view(batch, heads).sum(0)", "grad_delta[:heads]"),
    (blocked, "the mean is a constant to the gradient", "grad_score.sub_(share)", "pass"),
    (blocked, "the value's sign forgotten in the gradient", "passes.mul_(tile.sign.unsqueeze(2))", "pass"),
    (blocked, "a score of zero passes its gradient", "inhibition == 0", "inhibition < 0"),
    (blocked, "a value equal to Z passes its gradient", "torch.gt(", "torch.ge("),
    (blocked, "the gradient of one of a group's heads", ".sum(2).to(key.dtype)", "[:, :, 0].to(key.dtype)"),
    (blocked, "forward under autocast", NO_AUTOCAST + FORWARD, AS_IT_IS + FORWARD),
    (blocked, "backward under autocast", NO_AUTOCAST + BACKWARD, AS_IT_IS + BACKWARD),
    (blocked, "tail of the rows dropped", "queries, rows_per_tile)", "queries - rows_per_tile + 1, rows_per_tile)"),
    (blocked, "tail of the heads dropped", "total, heads_per_tile)", "total - heads_per_tile + 1, heads_per_tile)"),
    (
        blocked,
        "rounds to half precision twice",
        "inhibited.transpose(1, 2)",
        "inhibited.transpose(1, 2).to(query.dtype)",
    ),
    (blocked, "result not initialised", "torch.zeros(batch * heads, queries", "torch.empty(batch * heads, queries"),
    (blocked, "crashes on empty inputs", "not (total and queries and keys)", "not total"),
    (blocked, "changes an input by 1e-7 at its end", RETURN, "value.mul_(1 + 1e-7)\n    " + RETURN),
    (
        blocked,
        "ignores strides",
        FLATTENED,
        "value = value.as_strided(value.shape, value.to('meta').contiguous().stride())\n    " + FLATTENED,
    ),
    (
        blocked,
        "centred over padding",
        "forbidden.shape[-1] - forbidden.sum(-1, keepdim=True)",
        "forbidden.sum(-1, keepdim=True).fill_(forbidden.shape[-1])",
    ),
    (
        blocked,
        "hides NaN",
        "torch.cdist(self.query, self.key, p=1.0)",
        "torch.cdist(self.query, self.key, p=1.0).nan_to_num()",
    ),
    (blocked, "NaN in a masked value leaks", "if poisoned and ", "if not poisoned and "),
    (blocked, "infinity in a masked value leaks", "not bool(torch.isfinite(value).all())", "bool(value.isnan().any())"),
    (
        blocked,
        "NaN in a masked key leaks",
        "distance.masked_fill_(self.forbidden, 0)",
        "distance.mul_(~self.forbidden)",
    ),
    (blocked, "a masked key takes part", "score.masked_fill_(self.forbidden, torch.inf)", "pass"),
    (blocked, "no shift", "score.add_(self.delta)", "score"),
    (blocked, "negative inhibition", "score.add_(self.delta).clamp_min_(0)", "score.add_(self.delta)"),
    (blocked, "never centred", "        if self.center:", "        if False:"),
    (blocked, "always signed", "if options.signed:", "if True:"),
    (blocked, "the sign of the values lost", "tile.sign.unsqueeze(-1)", "tile.sign.abs().unsqueeze(-1)"),
    (blocked, "every batch masked as the first", "if mask.shape[0] > 1", "if mask.shape[0] > 9"),
    (blocked, "every head masked as the first", "if mask.shape[1] > 1", "if mask.shape[1] > 9"),
    (blocked, "every tile masked as the first", "mask[:, :, rows]", "mask[:, :, : rows.stop - rows.start]"),
    (blocked, "causal from the tile on", "(rows.start, rows.stop, device", "(0, rows.stop - rows.start, device"),
    (blocked, "causal without the diagonal", "> row.unsqueeze(-1)", ">= row.unsqueeze(-1)"),
    (blocked, "causal forgets the mask", "forbidden | future", "future"),
    (blocked, "heads grouped the other way", 'torch.div(index, groups, rounding_mode="floor")', "index % key.shape[0]"),
    (
        operator,
        "fake result of query's shape",
        "(*query.shape[:3], value.shape[3] + (reach is not None))",
        "query.shape",
    ),
    (operator, "fake result of query's dtype", "dtype=blocked.accumulation_dtype(query.dtype)", "dtype=query.dtype"),
    (
        operator,
        "fake gradients in float32",
        "(tensor.new_empty(tensor.shape) for tensor in inputs[:3])",
        "(tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in inputs[:3])",
    ),
    (
        operator,
        "no autograd",
        'torch.library.register_autograd("inhibitor::attention", _backward, setup_context=_setup_context)\n',
        "",
    ),
    (
        operator,
        "no word on second derivatives",
        'torch.library.register_autograd("inhibitor::attention_backward", _no_double_backward)',
        "",
    ),
    (
        attention,
        "eta of a tensor forgotten",
        "None if isinstance(eta, int | float) and eta == 1.0 else",
        "None if isinstance(eta, Tensor) or eta == 1.0 else",
    ),
    (attention, "a length of 0 where nothing is heard", "+ masks.UNHEARD", "+ 0.0"),
    (attention, "what is left of τ, not how many keys", "total[..., -1:] / depth.view(-1, 1, 1)", "total[..., -1:]"),
    (blocked, "the reach of the first head", "heard[chosen]", "heard[:1]"),
    (
        blocked,
        "another value's gradient for the reach's",
        "grad_value[..., :-1], grad_value[..., -1]",
        "grad_value[..., 1:], grad_value[..., 0]",
    ),
    (attention, "padding counted", "masks.count(attn_mask, is_causal", "masks.count(None, is_causal"),
    (attention, "the inverse of the length exponent", "-exponent.to(wide)", "exponent.to(wide)"),
    (attention, "scaled by 1/head_dim", "query.shape[3] ** -0.5", "query.shape[3] ** -1.0"),
    (attention, "half precision comes back in float32", "total * factor).to(query.dtype)", "total * factor)"),
    (backends, "a backend asked for by name is replaced", 'if backend == "auto":', 'if backend != "torch":'),
    (
        checks,
        "one batch of mask for all",
        "padded.expand(-1, -1, -1, shape[3])",
        "padded[:1].expand(-1, -1, -1, shape[3])",
    ),
    (
        masks,
        "the diagonal not counted",
        "queries + 1, device=device).clamp(max=keys).view",
        "queries + 1, device=device).sub(1).view",
    ),
    (masks, "keys counted beyond the last", ".clamp(max=keys).view(", ".view("),
    (
        masks,
        "padding counted as if not causal",
        "    if not is_causal:\n        return attn_mask",
        "    if True:\n        return attn_mask",
    ),
    (masks, "running count one short", "(1, 0))\n", "(2, 0))\n"),
]


@dataclass(frozen=True)
class Mutant:
    """The whole operator with one text replaced in one module."""

    attend: Callable[..., torch.Tensor]
    operator: ModuleType


numbers = itertools.count()
MODULES = (blocked, operator, masks, checks, backends, attention)


def build(changed: ModuleType | None = None, old: str = "", new: str = "") -> Mutant:
    namespace = f"mutant{next(numbers)}"

    def fresh(module: ModuleType) -> ModuleType:
        source = mutated(module, old, new) if module is changed else inspect.getsource(module)
        source = source.replace("inhibitor::", f"{namespace}::").replace(
            "torch.ops.inhibitor", f"torch.ops.{namespace}"
        )
        copy = ModuleType(f"{namespace}.{module.__name__}")
        exec(compile(source, f"{namespace}/{module.__name__}", "exec"), copy.__dict__)  # noqa: S102
        return copy

    parts = {module.__name__.rpartition(".")[2]: fresh(module) for module in MODULES}
    parts["blocked"].CPU_TILE = 60  # type: ignore[attr-defined]
    parts["operator"].blocked = parts["blocked"]  # type: ignore[attr-defined]
    parts["operator"].BACKENDS["torch"] = parts["blocked"]
    for name in ("operator", "masks", "checks", "backends"):
        setattr(parts["attention"], name, parts[name])
    return Mutant(parts["attention"].inhibitor_attention, parts["operator"])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


VALUES = [
    Case(2, 4, 2, 5, 4, 3, 2, parameters="per head"),
    Case(3, 2, 2, 7, 3, 2, 4, mask="bhqk", parameters="per head"),
    Case(2, 4, 2, 5, 4, 3, 2, mask="bk", parameters="per head", reach=True),
    Case(2, 4, 1, 5, 4, 3, 2, mask="bk", is_causal=True, parameters="shared"),
    Case(1, 2, 2, 6, 4, 3, 2, is_causal=True, signed=False, center=False, parameters="per head"),
    Case(3, 2, 2, 1, 5, 3, 2),  # six heads in tiles of four
    Case(1, 2, 1, 3, 70, 4, 3, mask="hk", parameters="numbers"),
]


@functools.cache
def expected(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Arguments, torch.Tensor, dict[str, torch.Tensor]]:
    """Arguments, a gradient of the result, and what the reference makes of them in at least float32."""
    call, grad = arguments(case, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return call, grad, call.to(wide).with_gradients(grad.to(wide), "reference")


def values(mutant: Mutant) -> None:
    for case in VALUES:
        call, grad, truth = expected(case)
        found = call.with_gradients(grad, attend=mutant.attend)
        for name, tensor in truth.items():
            assert relative_error(found[name], tensor) <= TOLERANCES["float64"], (name, str(case))


def ties(mutant: Mutant) -> None:
    tensors = {name: torch.arange(24.0).double().view(1, 2, 6, 2).mul(5).remainder(3) - 1 for name in ("query", "key")}
    tensors["value"] = tensors["key"].flip(2) - 1
    call = Arguments(tensors, {"scale": 1.0, "center": False})
    grad = torch.arange(24.0).double().view(1, 2, 6, 2)
    found, truth = (call.with_gradients(grad, name, attend=mutant.attend) for name in ("torch", "reference"))
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def half_precision(mutant: Mutant) -> None:
    call, _, truth = expected(Case(1, 2, 2, 3, 70, 8, 4), torch.bfloat16)
    query, key, value = call.tensors.values()
    total = mutant.operator.attention(
        query, key, value, torch.ones(2), torch.zeros(2), None, None, False, True, True, 8**-0.5, "torch"
    )
    assert relative_error(total, truth["output"].double()) <= 20 * LUCK
    assert call(attend=mutant.attend).dtype == torch.bfloat16


def autocast(mutant: Mutant) -> None:
    call, grad, _ = expected(VALUES[0], torch.float32)
    plain = call.with_gradients(grad, attend=mutant.attend)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.with_gradients(grad, attend=mutant.attend)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def masked(mutant: Mutant) -> None:
    allowed = torch.tensor([True, False, True, False]).expand(2, 1, 1, 4)
    for garbage in (float("nan"), float("inf")):
        call, grad, _ = expected(VALUES[0])
        tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
        results = []
        for number in (0.0, garbage):
            tensors["key"][:, :, 1], tensors["value"][:, :, 3], tensors["value"][:, :, 1] = number, number, number
            results.append(
                Arguments(tensors, call.options | {"attn_mask": allowed}).with_gradients(grad, attend=mutant.attend)
            )
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def seen(mutant: Mutant) -> None:
    for name in ("query", "key", "value"):
        call, _, _ = expected(VALUES[0])
        tensors = {key: tensor.clone() for key, tensor in call.tensors.items()}
        tensors[name][0, 0, 1] = float("nan")
        assert Arguments(tensors, call.options)(attend=mutant.attend)[0, 0].isnan().any()


def inputs_unchanged(mutant: Mutant) -> None:
    call, _, _ = expected(VALUES[0])
    tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
    Arguments(tensors, call.options)(attend=mutant.attend)
    assert all(torch.equal(call.tensors[name], tensors[name]) for name in tensors)


def strides(mutant: Mutant) -> None:
    call, _, _ = expected(VALUES[0])
    strided = {name: t.mT.contiguous().mT if t.dim() == 4 else t for name, t in call.tensors.items()}
    assert torch.equal(Arguments(strided, call.options)(attend=mutant.attend), call(attend=mutant.attend))


def empty(mutant: Mutant) -> None:
    real = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **options: real(*args, **options).fill_(float("nan")))
        for shape in ((0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
            call, grad, truth = expected(Case(shape[0], 2, 2, shape[2], shape[3], 3, 5))
            found = call.with_gradients(grad, attend=mutant.attend)
            assert all(torch.equal(found[name], truth[name]) for name in truth)


def fake(mutant: Mutant) -> None:
    call, _, _ = expected(Case(2, 2, 2, 3, 4, 5, 6), torch.bfloat16)
    query, key, value = (tensor.to("meta") for tensor in call.tensors.values())
    numbers = (torch.ones(2, device="meta"), torch.ones(2, device="meta"), None, None, False, True, True, 1.0, "torch")
    total = mutant.operator.attention(query, key, value, *numbers)
    assert (total.shape, total.dtype) == ((2, 2, 3, 6), torch.float32)
    gradients = mutant.operator.attention_backward(total, query, key, value, *numbers)
    assert [(g.shape, g.dtype) for g in gradients[:3]] == [(t.shape, t.dtype) for t in (query, key, value)]


def twice(mutant: Mutant) -> None:
    call, _, _ = expected(VALUES[0])
    query = call.tensors["query"].clone().requires_grad_()
    output = Arguments(call.tensors | {"query": query}, call.options)(attend=mutant.attend)
    (first,) = torch.autograd.grad(output.pow(2).sum(), query, create_graph=True)
    with pytest.raises(OperatorError):
        torch.autograd.grad(first.sum(), query)


def asked(mutant: Mutant) -> None:
    call, _, _ = expected(VALUES[0])  # in float64
    try:
        call("cpu", attend=mutant.attend)
    except OperatorError:
        return
    raise AssertionError


CHECKS = [values, inputs_unchanged, ties, half_precision, autocast, masked, seen, strides, empty, fake, twice, asked]


def killer(mutant: Mutant) -> str | None:
    """The first check that the mutant fails, by a wrong result or by an error; None if it survives."""
    for check in CHECKS:
        try:
            check(mutant)
        except Exception:
            return check.__name__
    return None


def test_the_operator_itself_survives():
    mutant = build()
    for check in CHECKS:
        check(mutant)


@pytest.mark.parametrize(("module", "defect", "old", "new"), CATALOGUE, ids=[row[1] for row in CATALOGUE])
def test_the_defect_is_found(module, defect, old, new, record_property):
    found_by = killer(build(module, old, new))
    assert found_by is not None, f"{defect}: survives"
    record_property("found by", found_by)


def test_a_text_that_left_the_source_is_an_error():
    with pytest.raises(LookupError, match=r"stands 0 times in inhibitor\.ops\.blocked"):
        build(blocked, "no such text", "")


def test_every_check_is_needed():
    """Each check alone finds a defect that no check before it finds."""
    assert {killer(build(module, old, new)) for module, _, old, new in CATALOGUE} == {c.__name__ for c in CHECKS}
