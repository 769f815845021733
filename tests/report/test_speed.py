"""Tables and picture of a speed benchmark."""

from dataclasses import replace

from inhibitor.bench.results import Measurement, Results, Skipped
from inhibitor.report.plots import speed_figure, to_png
from inhibitor.report.speed import speed_tables

ONE = Measurement(
    shape="1x12x128x64",
    batch=1,
    heads=12,
    queries=128,
    keys=128,
    head_dim=64,
    mask="none",
    direction="forward",
    implementation="kernel avx512",
    family="inhibitor",
    instruction_set="avx512",
    delta=0.0,
    positive_share=0.5,
    dtype="float32",
    error=1e-6,
    rounds=30,
    calls_per_sample=1,
    median_ms=2.0,
    spread_ms=0.1,
    ratio=2.0,
    ratio_spread=0.1,
    difference_us=1000.0,
    to_unmasked=None,
    giga_elements_per_s=6.3,
    share_of_limit=None,
)
SDPA = replace(
    ONE,
    implementation="SDPA float32",
    family="softmax",
    instruction_set=None,
    delta=None,
    positive_share=None,
    ratio=1.0,
)


def results(*measurements: Measurement, skipped: tuple[Skipped, ...] = ()) -> Results:
    return Results({}, ("avx512",), {}, "SDPA float32", list(measurements), list(skipped))


def test_one_table_for_each_direction_and_the_shape_named_once() -> None:
    both = replace(ONE, direction="forward + backward", ratio=None, positive_share=0.48)
    forward, backward = speed_tables(results(ONE, SDPA, both))
    assert (forward.title, backward.title) == ("forward", "forward + backward")
    assert [row[:2] for row in forward.rows] == [("1x12x128x64", "kernel avx512"), ("", "SDPA float32")]
    assert forward.rows[0][2:] == ("2.00", "0.100", "2.00", "6.30")
    assert backward.rows[0][4] == "-"
    assert "Pairs with Z > 0: 50 % at δ=0." in " ".join(forward.notes)
    (table,) = speed_tables(
        results(ONE, replace(ONE, positive_share=0.45), replace(ONE, delta=0.5, positive_share=0.7))
    )
    assert "Pairs with Z > 0: 45 to 50 % at δ=0, 70 % at δ=0.5." in " ".join(table.notes)


def test_the_share_of_the_limit_has_a_column_where_there_is_one() -> None:
    (table,) = speed_tables(results(replace(ONE, share_of_limit=0.63), SDPA))
    assert table.columns[-1] == "% of limit"
    assert [row[-1] for row in table.rows] == ["63", "-"]


def test_masks_and_short_calls_have_tables_of_their_own() -> None:
    masked = replace(ONE, mask="causal", to_unmasked=0.55)
    short = replace(ONE, shape="1x1x8x32", heads=1, queries=8, keys=8, head_dim=32, median_ms=0.01, difference_us=4.25)
    forward, masks, calls = speed_tables(results(short, ONE, masked))
    assert len(forward.rows) == 2
    assert masks.rows == (("1x12x128x64", "kernel avx512", "forward", "causal", "2.00", "0.550", "2.00"),)
    assert calls.rows == (("1x1x8x32", "kernel avx512", "forward", "10.0", "+4.2"),)


def test_what_was_skipped_is_named_below() -> None:
    skipped = tuple(Skipped(shape, "none", "forward", "dense cdist form", "too large") for shape in ("a", "b"))
    (table,) = speed_tables(results(ONE, skipped=skipped))
    assert "Skipped: dense cdist form at a, b (the file says why)." in table.notes


def test_the_picture_shows_the_longest_series() -> None:
    lengths = [replace(m, queries=n, keys=n, median_ms=n / 64) for m in (ONE, SDPA) for n in (256, 128, 512)]
    aside = [
        replace(ONE, head_dim=32),
        replace(ONE, mask="causal"),
        replace(ONE, direction="forward + backward"),
        replace(ONE, queries=1),
        replace(ONE, implementation="kernel avx512, δ=0.5", delta=0.5),
    ]
    figure = speed_figure([*aside, *lengths])
    assert figure is not None
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["kernel avx512", "SDPA float32"]
    assert [list(map(float, line.get_xdata())) for line in axis.lines] == [[128, 256, 512]] * 2  # type: ignore[arg-type]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert "head_dim 64" in axis.get_title(loc="left")
    assert to_png(figure).startswith(b"\x89PNG")


def test_without_lengths_there_is_no_picture() -> None:
    assert speed_figure([]) is None
    assert speed_figure([replace(ONE, queries=1)]) is None
