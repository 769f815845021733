"""What a benchmark of the attention operator found, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Family = Literal["inhibitor", "softmax"]
Mask = Literal["none", "padding", "causal"]
Direction = Literal["forward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward + backward")


@dataclass(frozen=True)
class Measurement:
    """One implementation on one shape: its times, its ratio to the baseline, the error of what was timed."""

    shape: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    mask: Mask
    direction: Direction
    implementation: str
    family: Family
    instruction_set: str | None
    delta: float | None
    positive_share: float | None  # of the pairs in sight: those with Z > 0
    dtype: str
    error: float  # the largest of the checked tensors: ‖found − true‖ / ‖true‖
    rounds: int
    calls_per_sample: int
    median_ms: float
    spread_ms: float  # interquartile range, as every spread
    ratio: float | None  # median over rounds of this time ÷ the baseline's with the same mask
    ratio_spread: float | None
    difference_us: float | None  # median over rounds of this time − the baseline's
    to_unmasked: float | None  # median over rounds of this time ÷ that without mask
    giga_elements_per_s: float  # batch · heads · queries · keys · head_dim, whatever the mask
    share_of_limit: float | None


@dataclass(frozen=True)
class Skipped:
    """What was not timed, and why."""

    shape: str
    mask: Mask
    direction: Direction
    implementation: str
    reason: str


@dataclass
class Results:
    """Everything that one benchmark found."""

    machine: dict[str, str | int]
    instruction_sets: tuple[str, ...]
    settings: dict[str, Any]
    baseline: str
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)
