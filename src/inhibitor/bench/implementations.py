"""What is compared: our kernels, the PyTorch backend, the dense form of the paper's authors, and softmax attention."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, scaled_dot_product_attention

from inhibitor.bench.results import Direction, Family, Mask
from inhibitor.bench.shapes import Shape
from inhibitor.models.config import InhibitorConfig
from inhibitor.ops import cpu, inhibitor_attention
from inhibitor.ops.backends import Backend

BASELINE = "SDPA float32"
MODEL = InhibitorConfig().model_dump(include={"delta", "reach", "length_exponent"})  # of a model just converted


@dataclass(frozen=True)
class Sight:
    """Which keys the queries may see, in the forms that implementations take; made before the time is taken."""

    mask: Mask
    attn_mask: Tensor | None = None  # True = may attend
    is_causal: bool = False
    forbidden: Tensor | None = None  # True = may not, the whole rule

    @classmethod
    def of(cls, mask: Mask, shape: Shape) -> "Sight":
        """No mask; the second half of every row's keys padding; or causal."""
        if mask == "padding":
            allowed = torch.arange(shape.keys) < max(1, shape.keys // 2)
            allowed = allowed.expand(shape.batch, 1, 1, shape.keys)
            return cls(mask, attn_mask=allowed, forbidden=~allowed)
        if mask == "causal":
            forbidden = torch.ones(shape.queries, shape.keys, dtype=torch.bool).triu(1)
            return cls(mask, is_causal=True, forbidden=forbidden)
        return cls(mask)

    def rows(self, rows: Tensor) -> Tensor | None:
        """What the queries ``rows`` may see, broadcastable to (rows, keys): the same in every row of the batch."""
        if self.forbidden is None:
            return None
        return ~(self.forbidden[rows] if self.is_causal else self.forbidden[0, 0])


@dataclass(frozen=True)
class Dense:
    """The dense tensors an implementation holds at its peak."""

    per_feature: bool  # queries × keys × head_dim, not queries × keys
    forward: int
    backward: int


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention."""

    name: str
    family: Family
    attend: Callable[[Tensor, Tensor, Tensor, Sight], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)  # of ``inhibitor_attention``
    dtype: torch.dtype = torch.float32
    instruction_set: str | None = None
    dense: Dense | None = None
    takes_masks: bool = True

    @property
    def delta(self) -> float:
        """δ of the inhibitor family."""
        return float(self.options.get("delta", 0.0))

    def setting(self) -> AbstractContextManager[None]:
        """What it runs in."""
        return cpu.using(self.instruction_set) if self.instruction_set else nullcontext()

    def memory(self, shape: Shape, direction: Direction) -> int:
        """Bytes of the dense tensors it holds at once."""
        if self.dense is None:
            return 0
        copies = self.dense.forward if direction == "forward" else self.dense.backward
        return copies * (shape.elements if self.dense.per_feature else shape.pairs) * self.dtype.itemsize

    def truth(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """What it should give, in the dtype of the arguments."""
        if self.family == "softmax":
            forbidden = None if allowed is None else ~allowed
            return softmax_attention(query, key, value, Sight("none", forbidden=forbidden))
        return inhibitor_attention(query, key, value, attn_mask=allowed, backend="reference", **self.options)


def implementations() -> list[Implementation]:
    """Everything that is compared; the kernels are those of this build and this processor."""
    found = [
        Implementation(f"kernel {name}", "inhibitor", _ours("cpu", {}), instruction_set=name)
        for name in cpu.instruction_sets()
    ]
    if found:  # as a model has it
        best = found[0].instruction_set
        name = f"kernel {best}, δ={MODEL['delta']:g}, τ={MODEL['reach']:g}"
        found.insert(1, Implementation(name, "inhibitor", _ours("cpu", MODEL), MODEL, instruction_set=best))
    return [
        *found,
        Implementation("PyTorch backend", "inhibitor", _ours("torch", {})),
        Implementation(
            "dense cdist form", "inhibitor", _cdist_form, dense=Dense(True, forward=3, backward=4), takes_masks=False
        ),
        Implementation(BASELINE, "softmax", _sdpa),
        Implementation("SDPA bfloat16", "softmax", _sdpa, dtype=torch.bfloat16),
        Implementation("softmax, eager", "softmax", softmax_attention, dense=Dense(False, forward=2, backward=3)),
    ]


def _ours(backend: Backend, options: Mapping[str, Any]) -> Callable[[Tensor, Tensor, Tensor, Sight], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        mask, causal = sight.attn_mask, sight.is_causal
        return inhibitor_attention(query, key, value, attn_mask=mask, is_causal=causal, backend=backend, **options)

    return attend


def _cdist_form(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """The form of the paper's authors: the signed inhibition as dense tensors of queries × keys × features."""
    score = torch.cdist(query, key, p=1.0) * query.shape[-1] ** -0.5
    inhibition = relu(score - score.mean(-1, keepdim=True)).unsqueeze(-1)
    value = value.unsqueeze(-3)
    return (relu(relu(value) - inhibition) - relu(relu(-value) - inhibition)).sum(-2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=sight.attn_mask, is_causal=sight.is_causal)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """Softmax attention in three steps: product, softmax, product."""
    score = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
    if sight.forbidden is not None:
        score = score.masked_fill(sight.forbidden, -torch.inf)
    return torch.matmul(torch.softmax(score, -1), value)
