"""The speed of the attention operator beside softmax attention: the same inputs, one process, times taken in turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator

from inhibitor.bench.check import Inputs, Sample
from inhibitor.bench.implementations import BASELINE, Implementation, Sight, implementations
from inhibitor.bench.machine import machine
from inhibitor.bench.results import Direction, Mask, Measurement, Results, Skipped
from inhibitor.bench.shapes import FULL, QUICK, Shape
from inhibitor.bench.timing import Contestant, calls_for, in_turn, median_and_spread, pairs
from inhibitor.config import Config
from inhibitor.errors import ConfigError
from inhibitor.ops import cpu

OVERHEAD = 1 << 20  # elements below which a call's time says nothing about larger shapes
SETTLED = 0.1  # seconds from which on it does not matter what ran before a call
LIMITED = "avx512"  # the instruction set that the arithmetic limit is about
Advance = Callable[[str, float], None]  # what is being done, and how many steps further that is
_Name = tuple[str, Mask]
_Times = dict[_Name, dict[int, float]]  # seconds by round


class AttentionBench(Config):
    """What is timed, and for how long."""

    output: Path = Path("runs/bench/attention.json")
    shapes: tuple[str, ...] = ()
    quick: bool = False
    threads: int | None = Field(default=None, ge=1)
    time_limit: float = Field(default=20.0, gt=0)  # seconds of one call
    memory_limit: float = Field(default=8.0, gt=0)  # GiB of dense tensors: of queries × keys and more
    limit: float | None = Field(default=None, gt=0)  # 10⁹ elements per second of the forward pass

    @field_validator("output")
    @classmethod
    def _a_json_file(cls, output: Path) -> Path:
        if output.suffix != ".json" or output.is_dir():
            raise ConfigError(
                "--output", expected="a file name that ends in .json", got=repr(str(output)), remedy="Choose another."
            )
        return output

    @field_validator("shapes")
    @classmethod
    def _shapes_are_shapes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        for shape in shapes:
            Shape.parse(shape)
        return shapes

    @property
    def plan(self) -> list[Shape]:
        """The shapes to time, smaller ones first: they tell what a larger one would cost."""
        names = self.shapes or (QUICK if self.quick else FULL)
        return sorted(dict.fromkeys(map(Shape.parse, names)), key=lambda shape: shape.elements)

    @property
    def steps(self) -> int:
        """How many steps ``run`` advances by."""
        return sum(len(shape.directions) for shape in self.plan)

    def rounds(self, seconds: float) -> int:
        """In how many rounds a call of so many seconds takes part."""
        fewest, most, budget = (2, 5, 0.3) if self.quick else (3, 30, 3.0)
        return min(max(int(budget / seconds), fewest), most)


@dataclass(frozen=True)
class _Entry:
    """An implementation with a mask, checked and ready to be timed."""

    implementation: Implementation
    sight: Sight
    call: Callable[[], object]
    seconds: float
    error: float


def run(config: AttentionBench, advance: Advance = lambda what, steps: None) -> Results:
    """Check and time everything on every shape.

    Args:
        config: What to time.
        advance: Called on the way, ``config.steps`` in all.

    Raises:
        BenchmarkError: A result is wrong.
    """
    with _threads(config.threads):
        bench = _Bench(config, advance)
        for shape in config.plan:
            inputs, sample = Inputs.random(shape), Sample(shape)
            for direction in shape.directions:
                bench.measure(shape, direction, inputs, sample)
    return bench.results


class _Bench:
    """A benchmark on its way."""

    def __init__(self, config: AttentionBench, advance: Advance) -> None:
        self.config, self.advance = config, advance
        settings = config.model_dump(mode="json", exclude={"output"}) | {"shapes": list(map(str, config.plan))}
        self.results = Results(machine(), cpu.instruction_sets(), settings, BASELINE)
        # The last shape that an implementation was called on, and one call's seconds.
        self.known: dict[tuple[str, Direction], tuple[Shape, float]] = {}

    def measure(self, shape: Shape, direction: Direction, inputs: Inputs, sample: Sample) -> None:
        """Everything on one shape in one direction."""
        entries: list[_Entry] = []
        everything = implementations()
        for implementation in everything:
            self.advance(f"{shape}, {direction}: checking {implementation.name}", 0.5 / len(everything))
            entries += self._checked(implementation, shape, direction, inputs, sample)
        contestants = _contestants(self.config, entries)
        times = in_turn(contestants, lambda rounds: self.advance(f"{shape}, {direction}: timing", 0.5 / rounds))
        for entry, contestant in zip(entries, contestants, strict=True):
            share = None
            if entry.implementation.family == "inhibitor":
                share = sample.positive_share(inputs, entry.sight, entry.implementation.delta)
            found = self._measurement(entry, contestant.calls, share, shape, direction, times)
            self.results.measurements.append(found)

    def _checked(
        self, implementation: Implementation, shape: Shape, direction: Direction, inputs: Inputs, sample: Sample
    ) -> list[_Entry]:
        """The calls, one for each mask, each checked; empty where the implementation is skipped."""
        reason = self._why_not(implementation, shape, direction)
        entries: list[_Entry] = []
        inputs = inputs.to(implementation.dtype)
        for mask in shape.masks:
            if not reason and mask != "none" and not implementation.takes_masks:
                self._skip(shape, mask, direction, implementation, "this form has no mask")
                continue
            if not reason:
                sight = Sight.of(mask, shape)
                seconds, error = sample.check(implementation, inputs, sight, direction)
                call = inputs.call(implementation, sight, direction)
                for _ in range(2 if seconds < 0.2 else 0):  # the first call paid for what is set up once
                    seconds = min(seconds, Contestant("", call, implementation.setting, rounds=1, calls=1).sample())
                if mask == "none" and shape.queries > 1 and shape.elements >= OVERHEAD:
                    self.known[implementation.name, direction] = (shape, seconds)
                if seconds > self.config.time_limit:
                    reason = f"one call took {seconds:.3g} s, more than the limit of {self.config.time_limit:g} s"
            if reason:
                self._skip(shape, mask, direction, implementation, reason)
            else:
                entries.append(_Entry(implementation, sight, call, seconds, error))
        return entries

    def _why_not(self, implementation: Implementation, shape: Shape, direction: Direction) -> str:
        """Why an implementation is not even called; empty if it is."""
        memory, most = implementation.memory(shape, direction) / 2**30, self.config.memory_limit
        if memory > most:
            return f"its dense tensors would take {memory:.3g} GiB, more than the limit of {most:g} GiB"
        smaller, seconds = self.known.get((implementation.name, direction), (shape, 0.0))
        estimate, longest = seconds * shape.elements / smaller.elements, self.config.time_limit
        if estimate > longest:
            return f"one call is estimated to take {estimate:.3g} s ({seconds:.3g} s at {smaller}), limit {longest:g} s"
        return ""

    def _skip(self, shape: Shape, mask: Mask, direction: Direction, skipped: Implementation, reason: str) -> None:
        self.results.skipped.append(Skipped(str(shape), mask, direction, skipped.name, reason))

    def _measurement(
        self, entry: _Entry, calls: int, share: float | None, shape: Shape, direction: Direction, times: _Times
    ) -> Measurement:
        implementation, mask = entry.implementation, entry.sight.mask
        seconds = times[implementation.name, mask]
        median, spread = median_and_spread(list(seconds.values()))
        beside = pairs(seconds, times.get((BASELINE, mask), {}))
        ratio, ratio_spread = median_and_spread([own / other for own, other in beside]) if beside else (None, None)
        unmasked = pairs(seconds, times[implementation.name, "none"]) if mask != "none" else []
        speed, limit = shape.elements / median / 1e9, self.config.limit
        if implementation.instruction_set != LIMITED or direction != "forward" or mask != "none":
            limit = None
        return Measurement(
            shape=str(shape),
            batch=shape.batch,
            heads=shape.heads,
            queries=shape.queries,
            keys=shape.keys,
            head_dim=shape.head_dim,
            mask=mask,
            direction=direction,
            implementation=implementation.name,
            family=implementation.family,
            instruction_set=implementation.instruction_set,
            delta=None if share is None else implementation.delta,
            positive_share=share,
            dtype=str(implementation.dtype).removeprefix("torch."),
            error=entry.error,
            rounds=len(seconds),
            calls_per_sample=calls,
            median_ms=median * 1e3,
            spread_ms=spread * 1e3,
            ratio=ratio,
            ratio_spread=ratio_spread,
            difference_us=median_and_spread([own - other for own, other in beside])[0] * 1e6 if beside else None,
            to_unmasked=median_and_spread([own / other for own, other in unmasked])[0] if unmasked else None,
            giga_elements_per_s=speed,
            share_of_limit=speed / limit if limit else None,
        )


def _contestants(config: AttentionBench, entries: list[_Entry]) -> list[Contestant[_Name]]:
    """Who runs how often: slow ones in fewer rounds, all masks of one in the same, none in more than the baseline."""
    calls = [calls_for(entry.seconds) for entry in entries]
    rounds: dict[str, int] = {}
    for entry, repeated in zip(entries, calls, strict=True):
        name = entry.implementation.name
        own = config.rounds(entry.seconds * repeated)
        rounds[name] = min(own, rounds.get(name, own))
    most = rounds.get(BASELINE, max(rounds.values(), default=0))
    return [
        Contestant(
            (entry.implementation.name, entry.sight.mask),
            entry.call,
            entry.implementation.setting,
            min(rounds[entry.implementation.name], most),
            repeated,
            warm_up=entry.seconds < SETTLED,
        )
        for entry, repeated in zip(entries, calls, strict=True)
    ]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with so many of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
