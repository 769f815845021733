"""From runs to results: which score belongs to which state of which student, and the tables that say so."""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inhibitor.report.records import AnyMetrics, Distill, Finetune, Folder, Runs, Scored, State
from inhibitor.report.tables import Table, number, per_cent, span
from inhibitor.runs import MODEL

TASKS = {
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
    "imdb": "IMDb",
}
STATES = {
    "converted": "converted",
    "calibrated": "calibrated",
    "layerwise": "after layer-wise",
    "full": "after full-layer",
    "given": "given",
}
_SEED = re.compile(r"seed-\d+")
_APART = re.compile(r"^(seed|model|output|teacher):.*(\n( .*)?)*", re.MULTILINE)  # a key with its indented lines


@dataclass
class Row:
    """One model, or one state of the student: its errors (one per seed), its scores as distilled and as fine-tuned."""

    label: str
    states: list[State] = field(default_factory=list)
    finetunings: dict[str, list[Folder[Finetune]]] = field(default_factory=dict)
    distilled: list[Scored] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Every task with a score, in the usual order."""
        return in_order({*self.finetunings, *(scored.task for scored in self.distilled)})

    def measured(self, task: str) -> list[Scored]:
        """What a distillation on this very task measured, or else the fine-tunings; one per run."""
        own = [scored for scored in self.distilled if scored.task == task]
        return own or [folder.metrics for folder in self.finetunings.get(task, [])]

    def parts(self, task: str) -> dict[tuple[str, int | None], None]:
        """The rows that its runs were measured on, name and number, each once."""
        return dict.fromkeys(scored.measured for scored in self.measured(task))

    def scores(self, task: str) -> list[float]:
        """Headline scores × 100, one per run; none where not all were measured on the same rows."""
        return [100 * scored.headline for scored in self.measured(task)] if len(self.parts(task)) == 1 else []


@dataclass
class Study:
    """What is compared: students with their teacher, in as many runs as there are seeds."""

    name: str
    distillations: list[Folder[Distill]]
    teacher: Row | None
    students: list[Row]

    @property
    def rows(self) -> list[Row]:
        """The teacher, where there is one, then the students."""
        return [self.teacher, *self.students] if self.teacher else self.students

    @property
    def taught_by(self) -> str:
        """The teacher's name, without the seed where there are several."""
        name = short(self.distillations[0].metrics.teacher)
        return name if len(self.distillations) == 1 else _seedless(name)

    def label(self, row: Row, among: Sequence["Study"]) -> str:
        """The row's label, with its study's name where there are several."""
        return f"{self.name}: {row.label}" if len(among) > 1 and self.distillations else row.label

    def error(self, row: Row, name: str) -> str:
        """Relative squared error ``name``, mean over layers; the teacher's own is 0."""
        if row is self.teacher and self.distillations:
            return "0"
        return number([statistics.fmean(errors) for state in row.states if (errors := getattr(state, name))])


def studies(runs: Runs) -> list[Study]:
    """Group runs: distillations that differ in the seed alone are one study, with the scores of their states.

    Fine-tuned models of none of these distillations are compared with each other in a last study.
    """
    groups: dict[tuple[object, ...], list[Folder[Distill]]] = {}
    for folder in runs.distillations:
        metrics = folder.metrics
        names = tuple(state.name for state in metrics.states)
        key = _seedless(metrics.teacher), metrics.task, tuple(metrics.student.layers), names, recipe(folder)
        groups.setdefault(key, []).append(folder)
    found = [
        _distilled(name, group, runs.finetunings)
        for name, group in zip(_names(groups.values()), groups.values(), strict=True)
    ]
    placed = {folder.path for study in found for row in study.rows for f in row.finetunings.values() for folder in f}
    rest = [folder for folder in runs.finetunings if folder.path not in placed]
    return [*found, _compared(rest)] if rest else found


def recipe(folder: Folder[AnyMetrics]) -> str:
    """The configuration without what tells repetitions apart, however many lines it takes."""
    return re.sub(r"/seed-\d+\b", "", _APART.sub("", folder.config)).strip()


def _names(groups: Iterable[Sequence[Folder[Distill]]]) -> list[str]:
    """Each group's name, after its first run; without the seed where it has several, if that keeps names apart."""
    runs = {str(group[0].path.resolve()): len(group) for group in groups}
    named = apart(runs)
    bare = {run: name if runs[run] == 1 else _seedless(name) for run, name in named.items()}
    return [name if list(bare.values()).count(name) == 1 else named[run] for run, name in bare.items()]


def _distilled(name: str, group: list[Folder[Distill]], finetunings: Iterable[Folder[Finetune]]) -> Study:
    every = [folder.metrics for folder in group]
    rows = {}
    for index, first in enumerate(every[0].states):
        states = [metrics.states[index] for metrics in every]
        own = [scored for metrics in every for scored in metrics.scored(metrics.states[index].scores)]
        rows[first.name] = Row(STATES.get(first.name, f"after {first.name}"), states, distilled=own)
    teacher = Row("teacher", distilled=[one for metrics in every for one in metrics.scored(metrics.teacher_scores)])
    for finetuning in finetunings:
        state = next(filter(None, (_state(finetuning, folder) for folder in group)), None)
        if state == "teacher" or state in rows:
            row = rows.get(state, teacher)
            row.finetunings.setdefault(finetuning.metrics.task, []).append(finetuning)
    return Study(name, group, teacher, list(rows.values()))


def _state(finetuning: Folder[Finetune], distillation: Folder[Distill]) -> str | None:
    """The state of ``distillation`` that was fine-tuned, from where the model lay; the run that taught it."""
    model, run = finetuning.metrics.model, distillation.path.resolve()
    if Path(model).resolve() == Path(distillation.metrics.teacher).resolve():
        return "teacher" if finetuning.metrics.attention == "softmax" else "converted"
    if finetuning.path.resolve() / MODEL in places(distillation.metrics.teacher, distillation.path):
        return "teacher"
    for place in places(model, finetuning.path):
        if place.is_relative_to(run):
            match place.relative_to(run).parts:
                case ("stages", stage, *_):
                    return stage
                case (name, *_) if name == MODEL:
                    return distillation.metrics.states[-1].name
    return None


def places(path: str, run: Path) -> Iterator[Path]:
    """Where a path that a run names may lie: it counts from the working folder, or from a folder above the run.

    So runs may move together.
    """
    return ((base / path).resolve() for base in (Path.cwd(), *run.resolve().parents))


def _compared(finetunings: Sequence[Folder[Finetune]]) -> Study:
    names = apart(folder.metrics.model for folder in finetunings)
    rows: dict[tuple[str, str], Row] = {}
    for folder in sorted(finetunings, key=lambda folder: folder.metrics.attention == "inhibitor"):
        model, attention = folder.metrics.model, folder.metrics.attention
        row = rows.setdefault((attention, model), Row(f"{names[model]} ({attention})"))
        row.finetunings.setdefault(folder.metrics.task, []).append(folder)
    softmax = [row for (attention, _), row in rows.items() if attention == "softmax"]
    teacher = softmax[0] if len(softmax) == 1 < len(rows) else None
    return Study("fine-tuned", [], teacher, [row for row in rows.values() if row is not teacher])


def short(path: str, more: int = 0) -> str:
    """The name of a model or a run: without the path to it, but for the two parts before "seed-0" and ``more`` parts.

    Example:
        >>> short("sentence-transformers/all-MiniLM-L6-v2"), short("/data/e1/stages/full"), short("/data/e1/model")
        ('sentence-transformers/all-MiniLM-L6-v2', 'e1/full', 'e1')
        >>> short("grid/e2/wnli/seed-0/model"), short("/data/e1/model", more=1)
        ('e2/wnli/seed-0', 'data/e1')
    """
    place = Path(path)
    parts, last = place.parts[place.is_absolute() :], place.parts[:0]
    if len(parts) <= 2 and not place.is_absolute():
        return path
    if len(parts) > 2 and parts[-2] == "stages":
        parts, last = parts[:-2], parts[-1:]
    elif len(parts) > 1 and parts[-1] == MODEL:
        parts = parts[:-1]
    kept = more + (3 if parts and _SEED.fullmatch(parts[-1]) else 1)
    return "/".join((*parts[-kept:], *last)) if parts and (not more or kept <= len(parts)) else path


def apart(paths: Iterable[str]) -> dict[str, str]:
    """A short name for each path; those that would share one keep more of their paths, until they differ."""
    named, more = {path: short(path) for path in paths}, 0
    while same := [path for path, name in named.items() if list(named.values()).count(name) > 1]:
        more += 1
        named |= {path: short(path, more) for path in same}
    return named


def called(folder: Folder[AnyMetrics]) -> str:
    """A run's name, after its folder."""
    return short(str(folder.path.resolve()))


def _seedless(path: str) -> str:
    """The path without "seed-0", which tells repetitions apart."""
    return Path(*(part for part in Path(path).parts if not _SEED.fullmatch(part))).as_posix()


def in_order(names: Iterable[str]) -> list[str]:
    """Tasks in the usual order; those that it lacks come last, by name."""
    order = list(TASKS)
    return sorted(names, key=lambda task: (order.index(task) if task in order else len(order), task))


def tasks(found: Iterable[Study]) -> list[str]:
    """Every task with a score, in the usual order."""
    return in_order({task for study in found for row in study.rows for task in row.tasks})


def retention(row: Row, teacher: Row | None, among: Iterable[str]) -> float | None:
    """Student's mean score in per cent of the teacher's over the tasks that both have, on the same rows, or None."""
    if teacher is None:
        return None
    both = [task for task in among if row.scores(task) and row.parts(task) == teacher.parts(task)]
    if not both:
        return None
    of_teacher = sum(statistics.fmean(teacher.scores(task)) for task in both)
    return 100 * sum(statistics.fmean(row.scores(task)) for task in both) / of_teacher if of_teacher > 0 else None


def cautions(scored: Scored) -> list[str]:
    """What to know of the rows behind a score: how many are cut, how many are in train too, and what part train was."""
    learned = [rows_of(split, count) for split, count in scored.rows.items() if split.startswith("train_")]
    found = [f"trained on {rows}." for rows in learned[:1]]
    for what, counts in {"longer than max_length, and cut": scored.truncated, "in train too": scored.overlap}.items():
        shares = [
            f"{count:,} of {scored.rows[split]:,} rows of {split}"
            for split, count in counts.items()
            if count and split in scored.rows
        ]
        found += [f"{what}: {', '.join(shares)}."] if shares else []
    return found


def rows_of(split: str, count: int | None) -> str:
    """So many rows of a split."""
    return f"rows of {split}" if count is None else f"{count:,} rows of {split}"


def results_table(found: Sequence[Study]) -> Table:
    """One row per state of every student: errors against the teacher, fine-tuned scores, retention."""
    names, distilled = tasks(found), any(study.distillations for study in found)
    paired = bool(names) and any(study.teacher and study.students for study in found)
    rows = []
    for study in found:
        for row in study.rows:
            label = study.label(row, found)
            errors = [study.error(row, name) for name in ("context_error", "hidden_error")] if distilled else []
            scores = [number(row.scores(task), 1) for task in names]
            kept = [per_cent(retention(row, study.teacher, names))] if paired else []
            rows.append([label, *errors, *scores, *kept])
    teachers = {study.taught_by for study in found if study.distillations}
    title = "Inhibitor attention" if distilled else "Fine-tuning results"
    return Table(
        title=f"{title} in {teachers.pop()}" if len(teachers) == 1 else title,
        columns=[
            "state" if distilled else "model",
            *(["context error", "hidden error"] if distilled else []),
            *(TASKS.get(task, task) for task in names),
            *(["retention %"] if paired else []),
        ],
        rows=rows,
        notes=_notes(found, names, distilled),
    )


def task_table(found: Sequence[Study]) -> Table:
    """One row per task and model: metric, what it was measured on, teacher's score, own score, retention."""
    rows, notes = [], []
    for task in tasks(found):
        scored = [(study, row) for study in found for row in study.rows if row.measured(task)]
        students = [(study, row) for study, row in scored if row is not study.teacher]
        for study, row in students or scored[:1]:
            metric, teacher = row.measured(task)[0].metric, None if row is study.teacher else study.teacher
            rows.append(
                [
                    TASKS.get(task, task),
                    study.label(row, found),
                    metric,
                    " and ".join(rows_of(*part) for part in row.parts(task)),
                    number(teacher.scores(task) if teacher else [], 1),
                    number(row.scores(task), 1),
                    per_cent(retention(row, teacher, [task])),
                ]
            )
        notes += _cautions(task, {study.label(row, found): row for study, row in scored})
    columns = ["task", "model", "metric", "measured on", "teacher's score", "score", "retention %"]
    return Table("Scores by task", columns, rows, notes, labels=3)


def _cautions(task: str, rows: Mapping[str, Row]) -> list[str]:
    """What to know of a task's rows, and of which models where it is not true of all."""
    told: dict[str, list[str]] = {}
    for label, row in rows.items():
        every = [*row.measured(task), *(folder.metrics for folder in row.finetunings.get(task, []))]
        for caution in dict.fromkeys(caution for scored in every for caution in cautions(scored)):
            told.setdefault(caution, []).append(label)
    name = TASKS.get(task, task)
    whom = {caution: "" if len(labels) == len(rows) else f", {', '.join(labels)}" for caution, labels in told.items()}
    return [f"{name}{labels}: {caution}" for caution, labels in whom.items()]


def _notes(found: Sequence[Study], names: Sequence[str], distilled: bool) -> list[str]:
    notes = []
    if distilled:
        notes.append("Errors: squared error relative to the teacher, mean over layers; 0 is the teacher itself.")
    if names:
        own = any(row.distilled for study in found for row in study.rows)
        as_it_is = "; in a distillation on the task, of each state as it is" if own else ""
        notes.append(f"Task scores are × 100, after fine-tuning{as_it_is}.")
    if any(retention(row, study.teacher, names) for study in found for row in study.students):
        of = "the teacher's" if distilled else "that of the softmax model"
        notes.append(f"Retention: the mean score in per cent of {of}, over the tasks that both have.")
    for study, task in ((study, task) for study in found for task in names):
        parts = {study.label(row, found): row.parts(task) for row in study.rows if row.measured(task)}
        if len({part for each in parts.values() for part in each}) > 1:
            where = "; ".join(
                f"{label} on {' and '.join(rows_of(*part) for part in each)}" for label, each in parts.items()
            )
            notes.append(f"{TASKS.get(task, task)} was not measured on the same rows, and is not compared: {where}.")
    cells = [(task, row, runs) for study in found for row in study.rows for task, runs in row.finetunings.items()]
    repeated = {len(runs) for _, _, runs in cells} | {len(study.distillations) for study in found}
    if counts := [count for count in repeated if count > 1]:
        notes.append(f"Mean ± standard deviation of {span(counts)} runs.")
    mixed = [f"{TASKS.get(task, task)}, {row.label}" for task, row, runs in cells if len(set(map(recipe, runs))) > 1]
    if mixed:
        notes.append(f"More than the seed differs between the runs of: {'; '.join(mixed)}.")
    return notes
