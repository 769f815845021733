"""The tables of a speed benchmark: times by shape, work that follows the mask, the cost of a call."""

from collections.abc import Sequence

from inhibitor.bench.results import DIRECTIONS, Direction, Measurement, Results
from inhibitor.report.tables import MISSING, Table, number, span

SMALL = 1 << 14  # batch · heads · queries · keys · head_dim: below, the time is that of the call itself


def speed_tables(results: Results) -> list[Table]:
    """What there is to show; a table for which nothing was measured is left out."""
    found = [_times(results, direction) for direction in DIRECTIONS] + [_masks(results), _calls(results)]
    return [table for table in found if table.rows]


def _times(results: Results, direction: Direction) -> Table:
    """Time, ratio and throughput without mask; the limit is about the forward pass only."""
    limited = direction == "forward" and any(m.share_of_limit is not None for m in results.measurements)
    shown = [m for m in results.measurements if m.direction == direction and m.mask == "none"]
    rows = [
        (
            m.implementation,
            number(m.median_ms),
            number(m.spread_ms),
            _or_missing(m.ratio),
            number(m.giga_elements_per_s),
            *([MISSING if m.share_of_limit is None else f"{100 * m.share_of_limit:.0f}"] if limited else []),
        )
        for m in shown
    ]
    columns = ["shape", "implementation", "median ms", "spread ms", f"÷ {results.baseline}", "10⁹ elements/s"]
    notes = [
        "Shapes are batch x heads x length (or queries:keys) x head_dim; elements: batch · heads · queries · keys · "
        "head_dim. Spread: interquartile range. Ratio: median over rounds.",
        *_positive(shown),
        *_skipped(results, direction),
    ]
    return Table(
        direction,
        columns + ["% of limit"] * limited,
        _by_shape(shown, rows),
        notes,
        labels=2,
    )


def _masks(results: Results) -> Table:
    shown = [m for m in results.measurements if m.to_unmasked is not None]
    rows = [
        (m.implementation, m.direction, m.mask, number(m.median_ms), _or_missing(m.to_unmasked), _or_missing(m.ratio))
        for m in shown
    ]
    columns = ["shape", "implementation", "direction", "mask", "median ms", "÷ unmasked", f"÷ {results.baseline}"]
    note = (
        "Half of every row's keys are padding; causal hides about half of the pairs. Both ratios are medians over "
        f"rounds: to the same implementation without mask, and to {results.baseline} with the same mask."
    )
    return Table("work under a mask", columns, _by_shape(shown, rows), [note], labels=4)


def _calls(results: Results) -> Table:
    shown = [m for m in results.measurements if m.batch * m.heads * m.queries * m.keys * m.head_dim <= SMALL]
    shown = [m for m in shown if m.mask == "none"]
    rows = [
        (
            m.implementation,
            m.direction,
            number(m.median_ms * 1e3),
            MISSING if m.difference_us is None else f"{m.difference_us:+.1f}",
        )
        for m in shown
    ]
    columns = ["shape", "implementation", "direction", "median µs", f"− {results.baseline}, µs"]
    return Table("the cost of a call", columns, _by_shape(shown, rows), labels=3)


def _by_shape(shown: Sequence[Measurement], rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows with their shape in front, named once."""
    before = ["", *(m.shape for m in shown)]
    return [("" if m.shape == last else m.shape, *row) for m, last, row in zip(shown, before[:-1], rows, strict=True)]


def _positive(shown: Sequence[Measurement]) -> list[str]:
    """How many pairs inhibit: those with Z = 0 cost the kernels nothing in the loop over values."""
    shares: dict[float, list[float]] = {}
    for m in shown:
        if m.delta is not None and m.positive_share is not None:
            shares.setdefault(m.delta, []).append(100 * m.positive_share)
    spans = [f"{span(map(round, found))} % at δ={delta:g}" for delta, found in sorted(shares.items())]
    return [f"Pairs with Z > 0: {', '.join(spans)}. δ=0 where none is named."] if spans else []


def _skipped(results: Results, direction: Direction) -> list[str]:
    shapes: dict[str, list[str]] = {}
    for skipped in results.skipped:
        if skipped.direction == direction and skipped.mask == "none":
            shapes.setdefault(skipped.implementation, []).append(skipped.shape)
    return [f"Skipped: {name} at {', '.join(found)} (the file says why)." for name, found in shapes.items()]


def _or_missing(value: float | None) -> str:
    return MISSING if value is None else number(value)
