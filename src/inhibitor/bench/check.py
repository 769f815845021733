"""No time without a check: what is timed is compared with float64 first, on a sample of heads and queries.

A query's result and its gradient depend on no other query, so a few queries of a call in full size suffice. The
gradients of key and value are sums over all queries: where the sample leaves some out, they are checked in a second
call, on a gradient that is 0 for those.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inhibitor.bench.implementations import Implementation, Sight
from inhibitor.bench.results import Direction
from inhibitor.bench.shapes import Shape
from inhibitor.errors import BenchmarkError
from inhibitor.ops import reference

WORK = 1 << 22  # elements of the reference's largest tensor: 32 MiB
# ‖found − true‖ / ‖true‖ of results, and of the middle one of a gradient's rows.
TOLERANCES = {torch.float32: (1e-4, 5e-3), torch.bfloat16: (2e-2, 2e-2)}
# The same of a whole gradient. Float32 decides a comparison |V| > Z or Z > 0 the other way once in about 10⁶. That
# leaves the result where it is but moves a gradient by whole terms: a few rows by much, all together by up to 2 %.
FLIPS = 5e-2
_Found = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor  # of the result

    @classmethod
    def random(cls, shape: Shape) -> "Inputs":
        """Standard normal, the same at every call."""
        generator = torch.Generator().manual_seed(0)

        def randn(length: int) -> Tensor:
            return torch.randn(shape.batch, shape.heads, length, shape.head_dim, generator=generator)

        return cls(randn(shape.queries), randn(shape.keys), randn(shape.keys), randn(shape.queries))

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        return Inputs(*(tensor.to(dtype) for tensor in (self.query, self.key, self.value, self.grad)))

    def call(self, implementation: Implementation, sight: Sight, direction: Direction) -> Callable[[], _Found]:
        """What is timed: the result, or the result and the gradients of query, key and value."""
        attend = implementation.attend
        if direction == "forward":
            return lambda: {"result": attend(self.query, self.key, self.value, sight)}
        query, key, value = (x.detach().clone().requires_grad_() for x in (self.query, self.key, self.value))

        def both() -> _Found:
            result = attend(query, key, value, sight)
            gradients = torch.autograd.grad(result, (query, key, value), self.grad)
            return {"result": result, **dict(zip(("query", "key", "value"), gradients, strict=True))}

        return both


def errors(found: Tensor, true: Tensor) -> tuple[float, float]:
    """‖found − true‖ / ‖true‖ of the whole and of the middle one of the rows that are not 0."""
    miss, size = (found - true).norm(dim=-1).flatten(), true.norm(dim=-1).flatten()
    rows = (miss / size)[size > 0]
    return float(miss.norm() / size.norm().clamp_min(1e-30)), float(rows.median()) if len(rows) else 0.0


class Sample:
    """Some heads and queries of a shape, and the truth about them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.heads = sorted({(0, 0), (shape.batch - 1, shape.heads - 1)})
        count = WORK // (shape.keys * shape.head_dim * len(self.heads))
        count = min(max(count, 4), shape.queries)
        self.rows = torch.arange(count) * (shape.queries - 1) // max(count - 1, 1)
        self.whole = count == shape.queries
        self._truths: dict[tuple[object, ...], _Found] = {}

    def check(
        self, implementation: Implementation, inputs: Inputs, sight: Sight, direction: Direction
    ) -> tuple[float, float]:
        """Call once in full size and compare.

        Returns:
            The seconds that the call took and the largest error.

        Raises:
            BenchmarkError: The result is wrong.
        """
        truth = self._truth(implementation, inputs, sight)
        with implementation.setting():
            call = inputs.call(implementation, sight, direction)
            start = time.perf_counter()
            found = call()
            seconds = time.perf_counter() - start
            if not self.whole and direction != "forward":
                grad = torch.zeros_like(inputs.grad)
                grad[:, :, self.rows] = inputs.grad[:, :, self.rows]
                few = Inputs(inputs.query, inputs.key, inputs.value, grad).call(implementation, sight, direction)()
                found |= {"key": few["key"], "value": few["value"]}
        largest = 0.0
        for name, tensor in found.items():
            part = self._select(tensor.detach(), by_query=name in ("result", "query")).double()
            whole, middle = errors(part, truth[name])
            exact, near = TOLERANCES[implementation.dtype]
            limits = (exact, exact) if name == "result" else (FLIPS, near)
            if not (whole <= limits[0] and middle <= limits[1]):  # NaN is an error too
                what = "result" if name == "result" else f"gradient of {name}"
                raise BenchmarkError(
                    f"{implementation.name} at {self.shape}, {direction}, mask {sight.mask}",
                    expected=f"a {what} within {limits[0]:g} of float64, and within {limits[1]:g} in most rows",
                    got=f"errors of {whole:.2g} and {middle:.2g}",
                    remedy="It was not timed: report this with the output of `inhibitor info`.",
                )
            largest = max(largest, whole)
        return seconds, largest

    def positive_share(self, inputs: Inputs, sight: Sight, delta: float) -> float:
        """The share of the pairs in sight with Z > 0."""
        heads = len(self.heads)
        query, key = self._select(inputs.query, by_query=True), self._select(inputs.key, by_query=False)
        gamma, shift = torch.ones(heads), torch.full((heads,), delta)
        scale = self.shape.head_dim**-0.5
        z = reference.inhibition(query, key, gamma, shift, sight.rows(self.rows), False, True, scale)
        return float((z[z < torch.inf] > 0).double().mean())

    def _truth(self, implementation: Implementation, inputs: Inputs, sight: Sight) -> _Found:
        name = (implementation.family, *implementation.options.values(), implementation.dtype, sight.mask)
        if name not in self._truths:
            tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
            leaves = {
                part: self._select(tensor, by_query=part == "query").double().requires_grad_()
                for part, tensor in tensors.items()
            }
            result = implementation.truth(**leaves, allowed=sight.rows(self.rows))
            grad = self._select(inputs.grad, by_query=True).double()
            gradients = torch.autograd.grad(result, list(leaves.values()), grad)
            self._truths[name] = {"result": result.detach(), **dict(zip(leaves, gradients, strict=True))}
        return self._truths[name]

    def _select(self, tensor: Tensor, *, by_query: bool) -> Tensor:
        """The heads of the sample, and its queries where the tensor has queries: (1, heads, length, features)."""
        batch, head = zip(*self.heads, strict=True)
        chosen = tensor[list(batch), list(head)]
        return (chosen[:, self.rows] if by_query else chosen).unsqueeze(0)
