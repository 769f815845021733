"""Keys and values of past tokens, kept as 8-bit codes in the layout that the native kernels read."""

import functools

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import checks, integer_operator, masks
from inhibitor.ops.integer import LARGEST_DIM, MOST_KEYS, check_backend, check_grid, heads_of, rescaled
from inhibitor.ops.integer_grid import IntegerGrid, check_groups
from inhibitor.ops.integer_reference import Scale

PANEL = 32  # keys that lie together, csrc/integer_pack.h


class IntegerCache:
    """Half the memory of a bfloat16 cache: one byte for each feature of a key and of a value.

    Args:
        batch: Rows of the batch.
        key_heads: Heads of key and value.
        head_dim: Features of a key, 256 at most; held in multiples of 8.
        value_dim: Features of a value, 256 at most; held in multiples of 16.
        grid: Of the query heads; the heads that share a key head have equal steps.

    Raises:
        OperatorError: Sizes or a grid that do not fit, or an installation without native kernels.

    Example:
        >>> grid = IntegerGrid.of(0.02, 0.02, torch.ones(4), 0.5, scale=0.125)
        >>> cache = IntegerCache(1, 4, 64, 64, grid)
        >>> for token in torch.randn(3, 1, 4, 1, 64):
        ...     cache.append(token, token)
        >>> cache.attend(torch.randn(1, 4, 1, 64)).shape, len(cache)
        (torch.Size([1, 4, 1, 64]), 3)
    """

    def __init__(self, batch: int, key_heads: int, head_dim: int, value_dim: int, grid: IntegerGrid) -> None:
        check_backend("cpu", torch.device("cpu"))
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
            if not isinstance(size, int) or not 1 <= size <= LARGEST_DIM:
                raise OperatorError(
                    name, expected=f"1 to {LARGEST_DIM}", got=repr(size), remedy="Check the head split."
                )
        if not isinstance(batch, int) or batch < 0:
            raise OperatorError("batch", expected="0 or more", got=repr(batch), remedy="Give the rows of the batch.")
        heads = heads_of(grid)
        if not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads:
            raise OperatorError(
                "key_heads",
                expected=f"a number that divides the grid's {heads} heads",
                got=repr(key_heads),
                remedy="Give IntegerGrid.of one number for each query head.",
            )
        check_grid(grid, torch.empty(batch, heads, 0, head_dim, device="cpu"))
        check_groups(grid.tensors, key_heads)
        self.grid, self.head_dim, self.value_dim = grid, head_dim, value_dim
        sizes = PANEL * 8 * -(-head_dim // 8), PANEL * 16 * -(-value_dim // 16)
        self._packed = tuple(torch.empty(batch, key_heads, 0, size, dtype=torch.uint8, device="cpu") for size in sizes)
        self._length = 0

    def __len__(self) -> int:
        """Tokens that are held."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes that are held, of panels not yet full too."""
        return sum(tensor.nbytes for tensor in self._packed)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        panels = -(-tokens // PANEL)
        if panels > self._packed[0].shape[2]:
            self._packed = tuple(_grown(tensor, panels) for tensor in self._packed)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Put the keys and values of further tokens behind those that are there.

        Args:
            key: (batch, key heads, tokens, head_dim), floating point or uint8 codes.
            value: (batch, key heads, tokens, value_dim), floating point or int8 codes.

        Raises:
            OperatorError: Tensors that do not fit the cache or need a gradient, or a NaN in one of them; the cache is
                then as it was.
        """
        batch, key_heads = self._packed[0].shape[:2]
        for name, tensor, features, code in (
            ("key", key, self.head_dim, torch.uint8),
            ("value", value, self.value_dim, torch.int8),
        ):
            checks.dense(name, tensor)
            expected = key.dtype if key.dtype in checks.FLOATS else code
            shape = (batch, key_heads, key.shape[2], features)
            if tensor.dtype != expected or tensor.shape != shape or tensor.device.type != "cpu":
                raise OperatorError(
                    name,
                    expected=f"{expected} of shape {shape} on the CPU",
                    got=f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}",
                    remedy="Pass what the cache was made for, both as floating point or both as codes.",
                )
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise integer_operator.no_gradient(name, "a tensor that needs one", "Call it under torch.no_grad().")
        checks.no_tangents("inhibitor_attention_int8", key, value)
        length = self._length + key.shape[2]
        if length > MOST_KEYS:
            raise OperatorError(
                "key",
                expected=f"{MOST_KEYS} tokens at most",
                got=f"{length}",
                remedy="A sum of more values could leave 24 bits: use inhibitor_attention.",
            )
        if length > self._packed[0].shape[2] * PANEL:
            self.reserve(max(length, self._length + self._length // 4))
        steps: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if key.is_floating_point():
            group = self.grid.shape[0] // key_heads
            steps = self.grid.query_key_step[::group], self.grid.value_step[::group]
        integer_operator.append(key, value, *steps, *self._packed, self._length)
        self._length = length

    def attend(
        self,
        query: Tensor,
        *,
        eta: float | Tensor = 1.0,
        length_exponent: float | Tensor = 0.0,
        attn_mask: Tensor | None = None,
        center: bool = True,
        signed: bool = True,
    ) -> Tensor:
        """``inhibitor_attention_int8`` of some queries and all tokens that are held.

        Args:
            query: (batch, heads, queries, head_dim), floating point or uint8 codes.
            eta: η, a number, (heads,) or (batch, heads, queries).
            length_exponent: ρ, a number or (heads,).
            attn_mask: Boolean, broadcastable to (batch, heads, queries, tokens), True = may attend.
            center: Whether the row's mean is subtracted from the distances.
            signed: False gives the unsigned form.

        Returns:
            (batch, heads, queries, value_dim) in query's dtype if that is floating point, else float32.

        Raises:
            OperatorError: A query, mask or parameter that does not fit, or a NaN in the query.
        """
        checks.choices(center=center, signed=signed, backend="cpu", backends=("cpu",))
        checks.dense("query", query)
        shape = (self._packed[0].shape[0], self.grid.shape[0], query.shape[2], self.head_dim)
        fits = query.dtype in (*checks.FLOATS, torch.uint8) and query.device.type == "cpu"
        if not fits or query.shape != shape:
            raise OperatorError(
                "query",
                expected=f"floating point or torch.uint8 of shape {shape} on the CPU",
                got=f"{query.dtype} of shape {tuple(query.shape)} on {query.device}",
                remedy="Pass the queries of the model that the cache was made for.",
            )
        mask = checks.mask(attn_mask, (*shape[:3], self._length), query.device)
        count = functools.partial(masks.count, mask, False, shape[2], self._length, query.device)

        def call(scale: Scale) -> Tensor:
            checks.no_tangents("inhibitor_attention_int8", query, *scale)
            tensors = (query, *self._packed, *self.grid.tensors, *scale, mask)
            result: Tensor = integer_operator.attend(*tensors, center, signed, self._length, self.value_dim)
            return result

        return rescaled(call, query, self.grid, eta, length_exponent, count)


def _grown(tensor: Tensor, panels: int) -> Tensor:
    """The same panels, and room for more."""
    larger = tensor.new_empty((*tensor.shape[:2], panels, tensor.shape[3]))
    larger[:, :, : tensor.shape[2]] = tensor
    return larger
