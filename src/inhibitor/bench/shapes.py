"""The shapes that are timed, and how they are written."""

import re
from dataclasses import dataclass

from inhibitor.bench.results import DIRECTIONS, Direction, Mask
from inhibitor.errors import ConfigError

_SHAPE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,9})(?::([0-9]{1,9}))?x([0-9]{1,6})(\+masks)?")
FULL = (
    "1x1x8x32",  # the cost of a call
    "1x12x1:8192x64",  # decoding: one query
    *(f"1x12x{length}x64" for length in (128, 256, 512, 1024, 2048, 4096, 8192)),  # the picture
    "8x12x128x32",
    "8x12x128x64",
    "8x12x128x128",
    "1x12x2048x32",
    "1x12x2048x128",
    "8x12x512x64+masks",  # whether the work follows the mask
)
QUICK = ("1x1x8x32", "1x12x1:1024x64", "1x12x64x64", "1x12x128x64", "1x12x256x64+masks")


@dataclass(frozen=True)
class Shape:
    """One shape of a call, and the masks it is timed with."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    masks: tuple[Mask, ...] = ("none",)

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``BATCHxHEADSxLENGTHxHEAD_DIM``, ``…xQUERIES:KEYSx…``, with ``+masks`` to time masks as well.

        Example:
            >>> Shape.parse("1x12x1:8192x64").keys
            8192
        """
        found = _SHAPE.fullmatch(text)
        sizes = [int(size) for size in found.groups()[:5] if size] if found else [0]
        if found is None or 0 in sizes:
            raise ConfigError(
                f"shape {text!r}",
                expected="BATCHxHEADSxLENGTHxHEAD_DIM of positive numbers",
                got=repr(text),
                remedy="For example 1x12x512x64, 1x12x1:8192x64 for one query, 8x12x512x64+masks for masks.",
            )
        batch, heads, queries, *keys, head_dim = sizes
        masks: tuple[Mask, ...] = ("none", "padding", "causal") if found[6] else ("none",)
        return cls(batch, heads, queries, keys[0] if keys else queries, head_dim, masks)

    def __str__(self) -> str:
        length = f"{self.queries}" if self.queries == self.keys else f"{self.queries}:{self.keys}"
        return f"{self.batch}x{self.heads}x{length}x{self.head_dim}" + ("+masks" if len(self.masks) > 1 else "")

    @property
    def pairs(self) -> int:
        """Queries × keys of all heads."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def elements(self) -> int:
        """Pairs × features: what the forward pass compares."""
        return self.pairs * self.head_dim

    @property
    def directions(self) -> tuple[Direction, ...]:
        """What is timed; nobody trains on one query."""
        return DIRECTIONS if self.queries > 1 else DIRECTIONS[:1]
