"""Times taken in turn: a round runs every contestant once, so that what disturbs one disturbs its rivals too."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

SAMPLE = 1e-3  # seconds that a sample takes at least: a shorter call is repeated
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Contestant(Generic[Name]):
    """One call to be timed, in a number of the rounds."""

    name: Name
    call: Callable[[], object]
    setting: Callable[[], AbstractContextManager[object]]  # what the call runs in; not timed
    rounds: int
    calls: int  # in one sample
    warm_up: bool = False  # one call before, not timed: what ran before has filled the caches, and always the same one

    def sample(self) -> float:
        """Seconds per call."""
        with self.setting():
            if self.warm_up:
                self.call()
            start = time.perf_counter()
            for _ in range(self.calls):
                self.call()
            return (time.perf_counter() - start) / self.calls


def calls_for(seconds: float) -> int:
    """How often a call of so many seconds is repeated in one sample."""
    return max(1, math.ceil(SAMPLE / max(seconds, 1e-9)))


def in_turn(
    contestants: Sequence[Contestant[Name]], after_round: Callable[[int], None]
) -> dict[Name, dict[int, float]]:
    """Seconds per call by contestant and round; who has fewer rounds than others sits out evenly.

    Args:
        contestants: With different names.
        after_round: Called with the number of all rounds after each.
    """
    times: dict[Name, dict[int, float]] = {contestant.name: {} for contestant in contestants}
    total = max((contestant.rounds for contestant in contestants), default=0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever runs
    try:
        for turn in range(total):
            first = turn % len(contestants)  # nobody is always the first
            for contestant in (*contestants[first:], *contestants[:first]):
                if (turn + 1) * contestant.rounds // total > turn * contestant.rounds // total:
                    times[contestant.name][turn] = contestant.sample()
            after_round(total)
    finally:
        if collecting:
            gc.enable()
    return times


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median and the interquartile range.

    Example:
        >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0])
        (3.0, 2.0)
    """
    if len(values) == 1:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def pairs(times: dict[int, float], others: dict[int, float]) -> list[tuple[float, float]]:
    """The two times of each round that both ran in."""
    return [(times[turn], others[turn]) for turn in sorted(times.keys() & others.keys())]
