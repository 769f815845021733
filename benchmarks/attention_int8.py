"""int8 attention beside softmax attention: the same inputs, one process, times taken in turn.

    python benchmarks/attention_int8.py [--threads 2] [--limit 135]

Every result is first compared with the reference, bit by bit, on some heads and queries. Writes
results/attention_int8.json and a picture beside it, and prints a table.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inhibitor import IntegerGrid, inhibitor_attention, inhibitor_attention_int8
from inhibitor.bench.implementations import MODEL
from inhibitor.bench.machine import machine
from inhibitor.bench.shapes import Shape
from inhibitor.bench.timing import Contestant, calls_for, in_turn, median_and_spread, pairs
from inhibitor.errors import BenchmarkError
from inhibitor.ops import IntegerCache, integer_cpu
from inhibitor.report.look import COLOURS, style, to_png
from inhibitor.report.tables import number
from inhibitor.runs import write_bytes, write_text

ROOT = Path(__file__).resolve().parents[1]
RIVALS = ("SDPA float32", "SDPA bfloat16")
# Shape: the largest ratio to each rival that is aimed at.
SHAPES: dict[str, tuple[float | None, float | None]] = {
    "8x12x128x64": (0.38, None),
    "1x12x512x64": (None, None),
    "1x12x2048x64": (0.28, 0.30),
    "1x12x8192x64": (0.28, 0.30),
    "1x12x1:8192x64": (0.35, None),
}
BUDGET, FEWEST, MOST = 4.0, 5, 40  # seconds a contestant may take on a shape, and rounds
ROWS = 8  # queries that are checked
EXPONENT = MODEL["length_exponent"]
Call = Callable[[], Tensor]


def grid_for(heads: int) -> IntegerGrid:
    """Of normal data, clipped at four standard deviations; γ, δ, τ and the scale of a converted model."""
    return IntegerGrid.of(4 / 127, 4 / 127, torch.ones(heads), MODEL["delta"], scale=0.125, reach=MODEL["reach"])


def inputs(shape: Shape) -> list[Tensor]:
    """Query, key and value as projections leave them, (batch, heads, length, head_dim) with heads side by side."""
    generator = torch.Generator().manual_seed(0)
    lengths = (shape.queries, shape.keys, shape.keys)
    sizes = [(shape.batch, length, shape.heads, shape.head_dim) for length in lengths]
    return [torch.randn(size, generator=generator).transpose(1, 2) for size in sizes]


def integer_call(shape: Shape, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """Quantising included; one query attends to a cache that holds the keys and values."""
    grid = grid_for(shape.heads)
    if shape.queries > 1:
        return lambda: inhibitor_attention_int8(query, key, value, grid, length_exponent=EXPONENT, backend="cpu")
    cache = IntegerCache(shape.batch, shape.heads, shape.head_dim, shape.head_dim, grid)
    cache.append(key, value)
    return lambda: cache.attend(query, length_exponent=EXPONENT)


def check(shape: Shape, call: Call, query: Tensor, key: Tensor, value: Tensor) -> None:
    """The first and the last head's result in some rows, against the reference."""
    found = call()
    rows = torch.arange(min(ROWS, shape.queries)) * (shape.queries - 1) // max(min(ROWS, shape.queries) - 1, 1)
    for batch, head in {(0, 0), (shape.batch - 1, shape.heads - 1)}:
        q, k, v = (x[batch : batch + 1, head : head + 1] for x in (query[:, :, rows], key, value))
        true = inhibitor_attention_int8(q, k, v, grid_for(1), length_exponent=EXPONENT, backend="reference")
        if not torch.equal(found[batch : batch + 1, head : head + 1, rows], true):
            raise BenchmarkError(
                str(shape), expected="the reference's bits", got="others", remedy="Run tests/ops/test_integer_cpu.py."
            )


def contestants(shape: Shape) -> dict[str, tuple[Call, Callable[[], AbstractContextManager[None]]]]:
    """What is timed, and what each runs in; the integer kernels checked."""
    query, key, value = inputs(shape)
    q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
    found: dict[str, tuple[Call, Callable[[], AbstractContextManager[None]]]] = {
        RIVALS[0]: (lambda: scaled_dot_product_attention(query, key, value), nullcontext),
        RIVALS[1]: (lambda: scaled_dot_product_attention(q, k, v), nullcontext),
        "inhibitor float32": (lambda: inhibitor_attention(query, key, value, backend="cpu", **MODEL), nullcontext),
    }
    for name in integer_cpu.instruction_sets():
        if name == "portable" and shape.elements > 2**30:
            continue  # half a minute a call
        with integer_cpu.using(name):
            call = integer_call(shape, query, key, value)
            check(shape, call, query, key, value)
        found[f"inhibitor int8, {name}"] = (call, lambda name=name: integer_cpu.using(name))  # type: ignore[misc]
    return found


def measure(shape: Shape, aims: tuple[float | None, float | None], limit: float | None) -> list[dict[str, Any]]:
    """A record for every contestant: median time, and medians of the ratios to both rivals in the same round."""
    made = contestants(shape)
    runners = []
    for name, (call, setting) in made.items():
        seconds = min(Contestant(name, call, setting, rounds=1, calls=1).sample() for _ in range(3))
        rounds = min(max(int(BUDGET / max(seconds, 1e-3)), FEWEST), MOST)
        runners.append(Contestant(name, call, setting, rounds, calls_for(seconds), warm_up=seconds < 0.1))
    most = max(runner.rounds for runner in runners if runner.name in RIVALS)
    runners = [Contestant(r.name, r.call, r.setting, min(r.rounds, most), r.calls, r.warm_up) for r in runners]
    times = in_turn(runners, lambda rounds: None)
    records = []
    for name, seconds_by_round in times.items():
        median, spread = median_and_spread(list(seconds_by_round.values()))
        record: dict[str, Any] = {
            "shape": str(shape),
            "implementation": name,
            "median_ms": median * 1e3,
            "spread_ms": spread * 1e3,
            "giga_elements_per_s": shape.elements / median / 1e9,
        }
        for rival, aim in zip(RIVALS, aims, strict=True):
            ratios = [own / other for own, other in pairs(seconds_by_round, times[rival])]
            record[f"ratio to {rival}"] = median_and_spread(ratios)[0]
            record[f"aim to {rival}"] = aim if "int8" in name else None
        if limit is not None and "int8, avx512" in name:
            record["share_of_limit"] = record["giga_elements_per_s"] / limit
        records.append(record)
    return records


def figure(records: list[dict[str, Any]]) -> bytes:
    """Ratios to SDPA in float32, by shape, of the best integer kernel and of SDPA in bfloat16; the aims as lines."""
    from matplotlib.figure import Figure

    best = f"inhibitor int8, {integer_cpu.instruction_sets()[0]}"
    names = (best, RIVALS[1], "inhibitor float32")
    with style():
        picture = Figure(figsize=(7.5, 3.2))
        axes = picture.subplots()
        for place, (name, colour) in enumerate(zip(names, COLOURS[1:], strict=False)):
            ratios = [r[f"ratio to {RIVALS[0]}"] for r in records if r["implementation"] == name]
            axes.bar([i + 0.27 * (place - 1) for i in range(len(SHAPES))], ratios, 0.25, label=name, color=colour)
        for i, (aim, _) in enumerate(SHAPES.values()):
            if aim is not None:
                axes.plot([i - 0.42, i - 0.12], [aim, aim], color="black", label="aim" if i == 0 else None)
        axes.set_xticks(range(len(SHAPES)), list(SHAPES))
        axes.set_ylabel(f"time ÷ {RIVALS[0]}")
        axes.set_title(f"int8 attention, {torch.get_num_threads()} threads")
        picture.legend(loc="outside lower center", ncols=4)
        return to_png(picture)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, help="10⁹ elements a second that the arithmetic of all threads allows")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "attention_int8.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(machine(), indent=2), flush=True)
    records = []
    columns = ("shape", "implementation", "median ms", "÷ float32", "÷ bfloat16", "aims", "10⁹ el/s", "of limit")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, aims in SHAPES.items():
        for r in measure(Shape.parse(name), aims, arguments.limit):
            records.append(r)
            wanted = [f"≤ {r[f'aim to {x}']:g}" if r[f"aim to {x}"] else "–" for x in RIVALS]
            share = f"{100 * r['share_of_limit']:.0f} %" if "share_of_limit" in r else ""
            ratios = [number(r[f"ratio to {rival}"]) for rival in RIVALS]
            cells = (r["shape"], r["implementation"], number(r["median_ms"]), *ratios, ", ".join(wanted))
            print("| " + " | ".join((*cells, number(r["giga_elements_per_s"]), share)) + " |", flush=True)
    results = {"machine": machine(), "limit": arguments.limit, "measurements": records}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_bytes(arguments.output.with_suffix(".png"), figure(records))


if __name__ == "__main__":
    main()
