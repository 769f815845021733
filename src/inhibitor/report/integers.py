"""What integers cost and gain: score, size and time beside the float model's, part by part and layer by layer."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from inhibitor.report.look import COLOURS, INK, labelled, style
from inhibitor.report.records import Folder, Latency, Quantize
from inhibitor.report.results import TASKS, apart, recipe, short
from inhibitor.report.tables import Table, number, per_cent, plain, span

KINDS = {"embeddings": COLOURS[0], "attention": COLOURS[2], "linear": COLOURS[1]}

Group = list[Folder[Quantize]]


def quantized(folders: Sequence[Folder[Quantize]]) -> list[Group]:
    """Group runs: those that differ in the seed alone, which draws the rows that steps are found on, are one."""
    groups: dict[tuple[str, str], Group] = {}
    for folder in folders:
        groups.setdefault((folder.metrics.model, recipe(folder)), []).append(folder)
    return list(groups.values())


def integers_table(groups: Sequence[Group]) -> Table:
    """One row for each quantised model: score before and after, retention, size and time."""
    batches = sorted({latency.batch for group in groups for folder in group for latency in folder.metrics.latency})
    names = apart(group[0].metrics.model for group in groups)
    rows = []
    for group in groups:
        every = [folder.metrics for folder in group]
        first = every[0]
        ratios = [
            [100 * latency.ratio for metrics in every for latency in metrics.latency if latency.batch == batch]
            for batch in batches
        ]
        rows.append(
            [
                names[first.model],
                _parts(first),
                TASKS.get(first.task, first.task),
                number([100 * metrics.headline_before for metrics in every], 1),
                number([100 * metrics.headline for metrics in every], 1),
                number([kept for metrics in every if (kept := _kept(metrics)) is not None], 1),
                number([metrics.bytes.after / 1e6 for metrics in every]),
                *map(number, ratios),
            ]
        )
    columns = ["model", "bits", "task", "score before", "score after", "retention %", "MB"]
    columns += [f"time % batch {batch}" for batch in batches]
    notes = [
        "Before: all in float. Bits of attention; linear layers and embeddings have 8. Scores are × 100, MB the"
        " integers' weights, time in per cent of the float model's."
    ]
    if counts := [len(group) for group in groups if len(group) > 1]:
        notes.append(f"Mean ± standard deviation of {span(counts)} runs.")
    return Table("Models in integers", columns, rows, notes, labels=3)


def tables(metrics: Quantize) -> list[Table]:
    """All about one quantised model; a table for which nothing was measured is left out."""
    found = [cost_table(metrics), parts_table(metrics), clipped_table(metrics)]
    return [table for table in found if table.rows]


def cost_table(metrics: Quantize) -> Table:
    """Every score, the size and the time of a call, before and after."""
    rows = []
    for split, scores in metrics.scores.items():
        for name, after in scores.items():
            before = metrics.scores_before[split][name]
            kept = per_cent(100 * after / before if before > 0 else None)
            rows.append([f"{name}, {split}, × 100", number(100 * before, 2), number(100 * after, 2), kept])
    size = metrics.bytes
    sizes = [number(side / 1e6) for side in (size.before, size.after)]
    rows.append(["weights, MB", *sizes, number(100 * size.after / size.before)])
    for latency in metrics.latency:
        times = [
            f"{number(1e3 * side.median)} ({number(1e3 * side.spread)})" for side in (latency.before, latency.after)
        ]
        rows.append([f"{_call(latency)}, ms", *times, number(100 * latency.ratio)])
    machine, threads = metrics.machine, "thread" if metrics.machine.threads == 1 else "threads"
    measured = [str(metrics.rows[split]) for split in metrics.scores if split in metrics.rows]
    notes = [
        *([f"Scores on {' and '.join(measured)} rows."] if measured else []),
        f"The change of the logits lies {number(metrics.sqnr, 1)} dB below them.",
        f"Times: batch × tokens, median (interquartile range) on {machine.threads} {threads} of {machine.cpu}, taken"
        " in turn; the ratio is the median of the rounds' ratios.",
    ]
    return Table(f"{_name(metrics)}, in integers", ["", "before", "after", "ratio %"], rows, notes)


def parts_table(metrics: Quantize) -> Table:
    """Each part alone in integers."""
    rows = [
        [part.part, number(100 * part.score, 2), _points(_change(metrics, part.score)), number(part.sqnr, 1)]
        for part in metrics.parts
    ]
    note = "SQNR: the power of the logits over that of their change."
    return Table("Each part alone in integers", ["", "score × 100", "change", "SQNR dB"], rows, [note])


def clipped_table(metrics: Quantize) -> Table:
    """The share of attention's codes that clipping changed, layer by layer."""
    rows = [
        [str(layer.layer), *(number(100 * share, 3) for share in (layer.query_key, layer.value))]
        for layer in metrics.clipped
    ]
    note = "Numbers beyond their grid, on the rows that steps were found on."
    return Table("Attention's clipped codes", ["layer", "query/key %", "value %"], rows, [note])


def verdict(metrics: Quantize) -> str:
    """What integers keep of the score, and what they save, in two sentences."""
    kept, scores = _kept(metrics), [number(100 * score, 1) for score in (metrics.headline_before, metrics.headline)]
    score = f"the score on {TASKS.get(metrics.task, metrics.task)} ({' → '.join(scores)})"
    size = number(100 * metrics.bytes.after / metrics.bytes.before)
    times = ", ".join(f"{number(100 * latency.ratio)} % at {_call(latency)}" for latency in metrics.latency)
    return (
        f"In integers, {short(metrics.model)} {'changes' if kept is None else f'keeps {number(kept, 1)} % of'} {score}."
        f" It takes {size} % of the bytes{f' and, of the time, {times}' if times else ''}."
    )


def worst(metrics: Quantize) -> str:
    """The parts that cost most, in two sentences."""
    loudest, lowest = min(metrics.parts, key=lambda part: part.sqnr), min(part.score for part in metrics.parts)
    text = f"Alone in integers, “{loudest.part}” changes the logits most: {number(loudest.sqnr, 1)} dB below them."
    change = _change(metrics, lowest)
    if change >= 0:
        return f"{text} No part alone lowers the score."
    equal = [part for part in metrics.parts if part.score == lowest]
    named, others = loudest if loudest in equal else equal[0], len(equal) - 1
    more = f" and {others} other{'s' * (others > 1)}" if others else ""
    return f"{text} The score falls most, by {number(-change, 2)} points, with “{named.part}”{more}."


def parts_figure(metrics: Quantize) -> Figure | None:
    """A bar for each part quantised alone: what it does to the logits and to the score; None without parts."""
    if not metrics.parts:
        return None
    score = f"{plain(metrics.metric)} × 100"
    changes = [_change(metrics, part.score) for part in metrics.parts]
    panels: tuple[tuple[str, str, list[float], float, Callable[[float], str]], ...] = (
        ("SQNR of the logits", "dB", [part.sqnr for part in metrics.parts], metrics.sqnr, "{:.1f}".format),
        ("change of the score", score, changes, _change(metrics, metrics.headline), _points),
    )
    names = [plain(part.part) for part in metrics.parts]
    colours = [KINDS.get(name.rpartition(", ")[2], INK) for name in names]
    with style():
        figure = Figure(figsize=(9, 1.6 + 0.24 * len(names)))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, unit, values, together, form) in zip(axes, panels, strict=True):
            bars = axis.barh(range(len(names)), values, color=colours, height=0.7)
            axis.bar_label(bars, fmt=form, padding=3, fontsize=7, color=INK)
            axis.axvline(0, color=INK, lw=0.8)
            axis.axvline(together, color=INK, lw=1, ls=":", label="all parts together")
            axis.margins(x=0.15, y=0.02)
            axis.grid(visible=False, axis="y")
            labelled(axis, title, unit, "")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        axes[1].tick_params(axis="y", length=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def _name(metrics: Quantize) -> str:
    return f"{short(metrics.model)} on {TASKS.get(metrics.task, metrics.task)}"


def _parts(metrics: Quantize) -> str:
    others = {"linear": metrics.int8.linear, "embeddings": metrics.int8.embeddings}
    named = [f"{name} {form}" for name, form in others.items() if form != "int8"]
    if metrics.int8.weights != 8 and metrics.int8.linear != "float":
        named.append(f"weights of {metrics.int8.weights} bits")
    return ", ".join([str(metrics.int8.attention), *named])


def _kept(metrics: Quantize) -> float | None:
    before = metrics.headline_before
    return 100 * metrics.headline / before if before > 0 else None


def _change(metrics: Quantize, score: float) -> float:
    return 100 * (score - metrics.headline_before)


def _points(change: float) -> str:
    text = f"{change:+.2f}"
    return text if float(text) else "0"


def _call(latency: Latency) -> str:
    return f"{latency.batch} × {latency.length} tokens"
