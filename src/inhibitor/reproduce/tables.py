"""From records to tables in the shape of the paper's: tasks are columns, experiments rows, its numbers beside ours."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inhibitor.report.results import TASKS, in_order, short
from inhibitor.report.tables import MISSING, Table, number, per_cent, span
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.published import GLUE, OFFICIAL_ROWS, PUBLISHED
from inhibitor.reproduce.recipe import EXPERIMENTS

LABELS = {"e0": "E0", "e1": "E1", "e2": "E2", "e1e2": "E1+E2"}
PAPER = "arXiv 2503.15983, Tables 1 and 2: DistilBERT, means of three runs; of MRPC and QQP, F1 or accuracy"


@dataclass(frozen=True)
class Column:
    """The runs on one task that were trained and measured on the same rows, by experiment."""

    task: str
    trained: Mapping[str, int]
    measured: Mapping[str, int]
    records: Mapping[str, Sequence[Record]]

    @property
    def name(self) -> str:
        """The task's usual name."""
        return TASKS.get(self.task, self.task)

    @property
    def official(self) -> bool:
        """Whether the rows are the benchmark's own, all of them."""
        return {**self.trained, **self.measured} == OFFICIAL_ROWS.get(self.task)

    def scores(self, experiment: str) -> list[float]:
        """Scores × 100, one for each seed."""
        return [100 * record.score for record in self.records.get(experiment, ())]

    def of_teacher(self, experiment: str) -> tuple[float, float] | None:
        """The mean score × 100 of the runs whose teacher is known, and their teachers'."""
        paired = [
            (record.score, record.teacher_score)
            for record in self.records.get(experiment, ())
            if record.teacher_score is not None
        ]
        if experiment == "e0" or not paired:
            return None
        ours, theirs = (100 * statistics.fmean(side) for side in zip(*paired, strict=True))
        return ours, theirs


def columns(records: Iterable[Record]) -> list[Column]:
    """The columns of the tables, in the paper's order."""
    found: dict[tuple[Any, ...], Column] = {}
    for record in sorted(records, key=lambda record: record.key):
        rows = (tuple(record.trained.items()), tuple(record.measured.items()))
        column = found.setdefault((record.task, *rows), Column(record.task, record.trained, record.measured, {}))
        column.records.setdefault(record.experiment, []).append(record)  # type: ignore[attr-defined]
    order = in_order({column.task for column in found.values()})
    return sorted(found.values(), key=lambda column: order.index(column.task))


def tables(records: Sequence[Record], cautions: Sequence[str] = ()) -> list[Table]:
    """Scores, retention, what stands apart, and what was measured; without those that would be empty.

    Args:
        records: The grid's.
        cautions: What else to say of the rows.
    """
    every = columns(records)
    official, apart = [c for c in every if c.official], [c for c in every if not c.official]
    found = [
        _scores("Scores", official, records, published=True),
        _retention("Retention", official, published=True),
        _scores("Apart: scores on other rows than the benchmark's", apart, records, published=False),
        _retention("Apart: retention on other rows than the benchmark's", apart, published=False),
        _measured(every, cautions),
    ]
    return [table for table in found if table.rows]


def as_json(records: Sequence[Record]) -> dict[str, Any]:
    """What the tables show, as data: a list of columns, each with its experiments."""
    return {
        "columns": [
            {
                "task": column.task,
                "official": column.official,
                "trained": dict(column.trained),
                "measured": dict(column.measured),
                "experiments": {experiment: _cell(column, experiment) for experiment in column.records},
                "published": {key: scores[column.task] for key, scores in PUBLISHED.items() if column.task in scores},
            }
            for column in columns(records)
        ],
        "source_of_published": PAPER,
    }


def _cell(column: Column, experiment: str) -> dict[str, Any]:
    scores, records = column.scores(experiment), column.records[experiment]
    return {
        "metric": records[0].metric,
        "seeds": [record.seed for record in records],
        "scores": scores,
        "mean": statistics.fmean(scores),
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "retention": _ratio(column.of_teacher(experiment)),
        "chosen": sorted({(record.learning_rate, record.epochs) for record in records}),
        "distillation_tokens": [record.distillation_tokens for record in records],
    }


def _ratio(pair: tuple[float, float] | None) -> float | None:
    """The first in per cent of the second."""
    return None if pair is None or pair[1] <= 0 else 100 * pair[0] / pair[1]


def _shown(columns: Sequence[Column]) -> list[str]:
    return [experiment for experiment in EXPERIMENTS if any(experiment in column.records for column in columns)]


def _scores(title: str, shown: Sequence[Column], records: Sequence[Record], *, published: bool) -> Table:
    """Mean ± standard deviation; GLUE's average only where all nine tasks are there, whole."""
    whole = published and {column.task for column in shown} >= set(GLUE)
    rows = []
    for experiment in _shown(shown):
        cells = {column.task: column.scores(experiment) for column in shown}
        means = [statistics.fmean(cells[task]) for task in GLUE if cells.get(task)]
        rows.append(
            [
                LABELS[experiment],
                *(number(column.scores(experiment), 1) for column in shown),
                *([number(statistics.fmean(means) if len(means) == len(GLUE) else [], 1)] if whole else []),
            ]
        )
    for experiment, scores in PUBLISHED.items() if published and rows else ():
        average = [statistics.fmean(scores[task] for task in GLUE)]
        rows.append(
            [
                f"{LABELS[experiment]}, published",
                *(number(scores.get(column.task, []), 1) for column in shown),
                *([number(average, 1)] if whole else []),
            ]
        )
    names = [*(column.name for column in shown), *(["GLUE"] if whole else [])]
    return Table(title, ["", *names], rows, _notes(shown, records, published=published))


def _notes(shown: Sequence[Column], records: Sequence[Record], *, published: bool) -> list[str]:
    teachers = dict.fromkeys(short(record.model) for record in records if record.experiment == "e0")
    students = dict.fromkeys(short(record.model) for record in records if record.experiment in ("e1", "e1e2"))
    seen = {record.distillation_tokens for record in records if record.experiment == "e1"} - {None}
    on = f"{', '.join(f'{count:,}' for count in sorted(filter(None, seen)))} tokens of text" if any(seen) else "text"
    what = {
        "e0": f"E0: {', '.join(teachers)}, fine-tuned.",
        "e1": f"E1: its student {', '.join(students)}, distilled on {on}, then fine-tuned.",
        "e2": "E2: the E0 model of the same seed, converted and distilled on the task.",
        "e1e2": "E1+E2: E1's student, distilled on the task from the E0 model of the same seed.",
    }
    counts = {len(runs) for column in shown for runs in column.records.values()}
    over = "one seed" if counts == {1} else f"mean ± standard deviation over {span(counts)} seeds"
    notes = [" ".join(what[experiment] for experiment in _shown(shown)), f"Scores × 100, {over}."]
    if published:
        notes.append(f"Published: {PAPER}.")
    if any(column.task == "wnli" for column in shown):
        notes.append("WNLI: 56.3 is the share of the larger class.")
    return notes


def _retention(title: str, shown: Sequence[Column], *, published: bool) -> Table:
    """Student ÷ teacher in per cent; over several tasks, of the sums of their scores."""
    glue = [column for column in shown if column.task in GLUE]
    average = published and len(glue) > 1
    rows = []
    for experiment in _shown(shown)[1:] if "e0" in _shown(shown) else []:
        pairs = [column.of_teacher(experiment) for column in shown]
        known = [pair for column in glue if (pair := column.of_teacher(experiment)) is not None]
        complete = len(known) == len(glue)
        rows.append(
            [
                LABELS[experiment],
                *(per_cent(_ratio(pair)) for pair in pairs),
                *([per_cent(overall(known) if complete else None)] if average else []),
            ]
        )
    teacher = PUBLISHED["e0"]
    for experiment, scores in PUBLISHED.items() if published and rows else ():
        if experiment == "e0":
            continue
        kept = {task: (scores[task], teacher[task]) for task in scores}
        rows.append(
            [
                f"{LABELS[experiment]}, published",
                *(per_cent(_ratio(kept.get(column.task))) for column in shown),
                *([per_cent(overall([kept[column.task] for column in glue]))] if average else []),
            ]
        )
    notes = ["Student ÷ teacher in per cent, of the mean scores over the seeds that both have."]
    if average:
        notes.append(f"Over the {len(glue)} tasks of GLUE here: of the sums of their scores.")
    return Table(
        title, ["", *(column.name for column in shown), *([f"{len(glue)} of GLUE"] if average else [])], rows, notes
    )


def overall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Retention in per cent over several tasks: of the sums of their scores."""
    return _ratio((sum(ours for ours, _ in pairs), sum(theirs for _, theirs in pairs)))


def _measured(shown: Sequence[Column], cautions: Sequence[str]) -> Table:
    """The rows behind every score, and what was chosen on rows held out from train."""
    experiments = _shown(shown)
    rows = [
        [
            column.name,
            next(iter(column.records.values()))[0].metric,
            _rows(column.trained),
            _rows(column.measured),
            *(_chosen(column.records.get(experiment, ())) for experiment in experiments),
        ]
        for column in shown
    ]
    names = ["task", "metric", "trained on", "measured on", *(LABELS[experiment] for experiment in experiments)]
    note = "Under each experiment: learning rate × epochs, chosen on rows held out from train where there was a choice."
    return Table("Rows and choices", names, rows, [note, *cautions], labels=4)


def _rows(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _chosen(records: Sequence[Record]) -> str:
    found = dict.fromkeys(f"{record.learning_rate:g} × {record.epochs}" for record in records)
    return "; ".join(found) or MISSING
