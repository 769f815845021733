"""What the operator is tested and measured on: shapes, option sets, data, and the tolerances with their reasons."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhibitor import inhibitor_attention
from inhibitor.ops import blocked, masks
from inhibitor.ops.masks import UNHEARD

LENGTHS = (0, 1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 257)
HEAD_DIMS = (1, 3, 32, 60, 64, 128)
# Beyond the kernels' blocks of rows (32, 48, 64) and of keys (16 to 128), and features that fill no vector or many.
MANY_ROWS = (1, 2, 5, 33, 49, 70, 130)
MANY_KEYS = (15, 49, 300, 700)
WIDE = (5, 16, 31, 33, 96, 200, 256)
HEADS = ((1, 1), (4, 4), (4, 1), (4, 2))  # query heads, key heads; the last is grouped-query attention
BATCHES = (0, 1, 3)
PARAMETERS = ("defaults", "numbers", "shared", "per head")
# Which dimensions of (batch, heads, queries, keys) a mask has in full; leading ones that it lacks are left out.
MASKS = (None, *("".join(kept) for size in (1, 2, 3, 4) for kept in itertools.combinations("bhqk", size)))

WORK = 1 << 20  # elements of the reference's largest tensor in a drawn case: milliseconds; four times that if wide
PIECES = (1, 3, 7, 20)

# name: largest error allowed, as a share of the largest element of the true result (``relative_error``).
TOLERANCES = {
    # One formula, two orders of summation: 4e-15 for the result and for query, key and value; the gradients of the
    # parameters are sums of 10⁶ terms with signs, which cancel: 4e-13 at worst.
    "float64": 1e-11,
    "ties": 1e-12,  # integers and quarters: exact but for the division by √head_dim and by the number of keys
    "loops": 1e-13,  # tiny shapes against Python loops
}
# In float32 and half precision, as a share of the sum of absolute terms (``sizes``): at most FACTOR times the error of
# the plain formula in that dtype (RELIABILITY A1), plus a rounding or two where that one is exact by luck.
FACTOR = 2.0
LUCK = 2 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """One call of the operator: shapes and options."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    mask: str | None = None
    is_causal: bool = False
    center: bool = True
    signed: bool = True
    parameters: str = "defaults"
    reach: bool = False
    pieces: int = 1  # into about how many tiles a test cuts the work

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.heads}/{self.key_heads}x{self.queries}x{self.keys}x{self.head_dim}/{self.value_dim}",
            f"mask={self.mask}" if self.mask else "",
            "causal" if self.is_causal else "",
            "" if self.center else "uncentred",
            "" if self.signed else "unsigned",
            self.parameters,
            "reach" if self.reach else "",
            f"tiles={self.pieces}",
        ]
        return "-".join(filter(None, words)).replace(" ", "_")

    @property
    def work(self) -> int:
        """Elements of the largest tensor of the reference."""
        return self.batch * self.heads * self.queries * self.keys * max(self.head_dim, self.value_dim)

    @property
    def tile(self) -> int:
        """A tile size that cuts the work into about ``pieces``, tails included."""
        return max(1, self.work // self.pieces)


def _draw(draw: random.Random, queries: int, keys: int, features: tuple[int, ...] = HEAD_DIMS) -> Case:
    while True:
        heads, key_heads = draw.choice(HEADS)
        case = Case(
            batch=draw.choices(BATCHES, weights=(1, 8, 8))[0],
            heads=heads,
            key_heads=key_heads,
            queries=queries,
            keys=keys,
            head_dim=draw.choice(features),
            value_dim=draw.choice(features),
            mask=draw.choice(MASKS),
            is_causal=draw.random() < 0.3,
            center=draw.random() < 0.7,
            signed=draw.random() < 0.7,
            parameters=draw.choice(PARAMETERS),
            reach=draw.random() < 0.5,
            pieces=draw.choice(PIECES),
        )
        if case.work <= WORK if features is HEAD_DIMS else 0 < case.work <= 4 * WORK:
            return case


def sweep() -> list[Case]:
    """Every pair of lengths thrice with drawn options, lengths beyond the kernels' blocks, the largest shapes once."""
    draw = random.Random(0)
    pairs = itertools.product(LENGTHS, LENGTHS)
    drawn = [_draw(draw, queries, keys) for queries, keys in pairs for _ in range(3)]
    pairs = itertools.product(MANY_ROWS, MANY_KEYS)
    drawn += [_draw(draw, queries, keys, WIDE) for queries, keys in pairs for _ in range(3)]
    return [
        *drawn,
        Case(1, 1, 1, 257, 257, 64, 64, mask="bk", parameters="numbers", pieces=20),
        Case(1, 1, 1, 129, 257, 128, 60, is_causal=True, parameters="per head", reach=True, pieces=7),
        Case(1, 4, 2, 65, 129, 60, 128, mask="bhqk", parameters="per head", pieces=3),
    ]


SWEEP = sweep()
# Half precision differs in what is read and written alone: each takes a half of the cases, with every pair of lengths.
BY_DTYPE = [
    (dtype, case)
    for dtype, cases in ((torch.float32, SWEEP), (torch.bfloat16, SWEEP[::2]), (torch.float16, SWEEP[1::2]))
    for case in cases
]


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, those that may need a gradient apart."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """The same numbers in another dtype."""
        return Arguments({name: tensor.to(dtype) for name, tensor in self.tensors.items()}, self.options)

    def __call__(self, backend: str = "torch", attend: Callable[..., Tensor] = inhibitor_attention) -> Tensor:
        return attend(**self.tensors, **self.options, backend=backend)

    def with_gradients(
        self, grad: Tensor, backend: str = "torch", attend: Callable[..., Tensor] = inhibitor_attention
    ) -> dict[str, Tensor]:
        """The result and, by the name of each tensor, its gradient for ``grad``."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()}
        output = Arguments(leaves, self.options)(backend, attend)
        gradients = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def arguments(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Arguments, Tensor]:
    """Random arguments of a case, and a gradient for its result; parameters are in at least float32."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "query": randn(case.batch, case.heads, case.queries, case.head_dim),
        "key": randn(case.batch, case.key_heads, case.keys, case.head_dim),
        "value": 2 * randn(case.batch, case.key_heads, case.keys, case.value_dim),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    grad = randn(case.batch, case.heads, case.queries, case.value_dim).to(dtype)
    numbers: dict[str, Any] = {"gamma": 0.7, "eta": 1.3, "delta": 0.5, "length_exponent": 0.5}
    numbers |= {"reach": 0.8} if case.reach else {}
    wide = blocked.accumulation_dtype(dtype)
    if case.parameters == "shared":
        shapes: tuple[tuple[int, ...], ...] = ((1,), (), (), (1,), (1,))
        tensors |= {name: torch.full(shape, n, dtype=wide) for (name, n), shape in zip(numbers.items(), shapes)}  # noqa: B905
    elif case.parameters == "per head":
        tensors |= {name: (n + randn(case.heads)).to(wide) for name, n in numbers.items()}
        tensors["delta"][0] = -0.3
        tensors["eta"][1:2] = 0.0
        tensors["length_exponent"] = torch.rand(case.heads, generator=generator, dtype=wide)
        if case.reach:
            tensors["reach"] = 0.2 + torch.rand(case.heads, generator=generator, dtype=wide)
    options: dict[str, Any] = dict(numbers) if case.parameters == "numbers" else {}
    if case.reach and case.parameters == "defaults":
        options |= {"reach": 0.8, "length_exponent": 1.0}
    options |= {
        "attn_mask": mask(case, generator),
        "is_causal": case.is_causal,
        "center": case.center,
        "signed": case.signed,
        "enable_gqa": case.key_heads not in (1, case.heads),
    }
    return Arguments(tensors, options), grad


def mask(case: Case, generator: torch.Generator) -> Tensor | None:
    """A random mask of the kind that the case names: two of three keys allowed."""
    if case.mask is None:
        return None
    full = zip("bhqk", (case.batch, case.heads, case.queries, case.keys), strict=True)
    shape = [size if letter in case.mask else 1 for letter, size in full]
    shape = shape["bhqk".index(case.mask[0]) :]
    return torch.rand(shape, generator=generator) < 2 / 3


@dataclass(frozen=True)
class Parts:
    """What the formula compares, in float64; i queries, j keys, l value features."""

    weight: Tensor  # n^−ρ, (batch, heads, queries, 1)
    spread: Tensor  # how much larger its absolute terms are: 1 + ρ · those of n ÷ n, or 1
    exponent: Tensor  # ρ, (heads, 1, 1)
    count: Tensor  # the keys in sight, (batch, heads, queries, 1)
    length: Tensor  # n: the same, or those heard
    reach: Tensor | None  # τ, (heads, 1, 1)
    distance: Tensor  # scale · Σ|q − k|, (batch, heads, i, j)
    slope: Tensor  # γ, (heads, 1, 1)
    eta: Tensor  # η, (heads, 1, 1)
    score: Tensor  # S − mean + δ, (batch, heads, i, j)
    excess: Tensor  # |V| − Z, or V − Z in the unsigned form, (batch, heads, i, j, l)
    terms: Tensor  # the absolute terms that excess is made of, as large
    allowed: Tensor  # (batch, heads, i, j)


def parts(case: Case, given: Arguments) -> Parts:
    """The formula's parts for these arguments."""
    options: dict[str, Any] = {"gamma": 1.0, "eta": 1.0, "delta": 0.0, "length_exponent": 0.0, "reach": None}
    options = options | given.options | given.tensors
    names = ("gamma", "eta", "delta", "length_exponent")
    gamma, eta, delta, exponent = (torch.as_tensor(options[name]).double().view(-1, 1, 1) for name in names)
    groups = case.heads // case.key_heads
    query, key, value = (given.tensors[name].double() for name in ("query", "key", "value"))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    allowed = masks.dense(options["attn_mask"], case.is_causal, case.queries, case.keys, query.device)
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    distance = case.head_dim**-0.5 * torch.cdist(query, key, p=1.0) * allowed
    score = gamma * distance
    mean = score.sum(-1, keepdim=True) / count if case.center else torch.zeros(())
    terms = value.abs().unsqueeze(2) + (score.abs() + mean.abs() + delta.abs()).unsqueeze(-1)
    score = score - mean + delta
    excess = (value.abs() if case.signed else value).unsqueeze(2) - score.relu().unsqueeze(-1)
    allowed = allowed.expand(score.shape)
    reach, length, spread = None, count, torch.ones(())
    if options["reach"] is not None:
        reach = torch.as_tensor(options["reach"]).double().view(-1, 1, 1)
        heard = (score.relu() < reach) & allowed
        length = ((reach - score.relu()) * heard).sum(-1, keepdim=True) / reach + UNHEARD
        sizes = (gamma.abs() * distance + mean.abs() + delta.abs() + reach) * heard
        spread = 1 + exponent.abs() * sizes.sum(-1, keepdim=True) / (reach * length)
    weight = length**-exponent
    return Parts(weight, spread, exponent, count, length, reach, distance, gamma, eta, score, excess, terms, allowed)


def by_key_head(case: Case, tensor: Tensor) -> Tensor:
    """The heads in the second dimension as key heads × the query heads of each."""
    return tensor.view(case.batch, case.key_heads, case.heads // case.key_heads, *tensor.shape[2:])


def separate(case: Case, given: Arguments, seed: int = 1) -> Arguments:
    """Draw anew what lies so near a kink that float32 and float64 would choose differently.

    The gradient jumps where |V| = Z and where S − mean + δ = 0. Away from there rounding moves it only a little, and an
    error can be told from a jump.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
    query, value = tensors["query"], tensors["value"]
    separated = Arguments(tensors, given.options)
    for _ in range(50 if case.work else 0):
        found = parts(case, separated)
        margin = 1e-5 * (1 + float((found.slope * found.distance).abs().max()))
        near = (found.score != 0) & (found.score.abs() < margin)
        if found.reach is not None:
            near |= (found.score - found.reach).abs() < margin
        near = (near & found.allowed).any(-1)
        close = ((found.excess.abs() < margin) & found.allowed.unsqueeze(-1)).any(2)
        close = by_key_head(case, close).any(2)
        if not (near.any() or close.any()):
            return separated
        query[near] = torch.randn(query[near].shape, generator=generator, dtype=torch.float64).to(query.dtype)
        value[close] = 2 * torch.randn(value[close].shape, generator=generator, dtype=torch.float64).to(value.dtype)
    if case.work:
        raise RuntimeError(f"{case} stays near a kink")
    return separated


def sizes(case: Case, given: Arguments, grad: Tensor) -> dict[str, float]:
    """For the result and each gradient: the largest sum of absolute terms, which rounding errors are a share of.

    The value itself is no measure: it is a sum with signs, and may vanish while its terms do not.
    """
    found = parts(case, given)
    grad = grad.double().abs()
    weight = found.weight * found.spread
    scaled = grad * weight * found.eta.abs()
    passes = ((found.excess > 0) & found.allowed.unsqueeze(-1)).double()
    summed = (found.terms * passes).sum(3)
    by_inhibition = torch.einsum("bhil,bhijl->bhij", scaled, passes)
    by_reach = torch.zeros(())
    if found.reach is not None:
        heard = ((found.score < found.reach) & found.allowed).double()
        by_length = (scaled * summed).sum(-1, keepdim=True) * found.exponent.abs() / found.length
        by_inhibition = by_inhibition + by_length / found.reach * heard
        by_reach = (by_length / found.reach * (heard.sum(-1, keepdim=True) + found.length)).sum((0, 2, 3))
    by_score = by_inhibition * (found.score > 0)
    if case.center:
        by_score = (by_score + by_score.sum(-1, keepdim=True) / found.count) * found.allowed
    by_distance = by_score * found.slope.abs() * case.head_dim**-0.5
    terms = {
        "output": summed * weight * found.eta.abs(),
        "query": by_distance.sum(3),
        "key": by_key_head(case, by_distance.sum(2)).sum(2),
        "value": by_key_head(case, torch.einsum("bhil,bhijl->bhjl", scaled, passes)).sum(2),
        "gamma": (by_score * found.distance).sum((0, 2, 3)),
        "eta": (grad * weight * summed).sum((0, 2, 3)),
        "delta": by_score.sum((0, 2, 3)),
        "length_exponent": (scaled * summed * found.length.log().abs()).sum((0, 2, 3)),
        "reach": by_reach,
    }
    shared = case.parameters == "shared"
    whole = {"gamma", "eta", "delta", "length_exponent", "reach"} if shared else set()
    return {
        name: float(term.sum() if name in whole else term.max()) if term.numel() else 0.0
        for name, term in terms.items()
    }


def relative_error(got: Tensor, truth: Tensor, size: float | None = None) -> float:
    """The largest difference as a share of ``size``, or else of the largest true element.

    The elements of our random cases are of order 1. Where all cancel to less than 1/1000, that is the measure.
    """
    if not truth.numel():
        return 0.0
    size = max(float(truth.abs().max()), 1e-3) if size is None else size
    return float((got.double() - truth).abs().max()) / (size or 1.0)
