"""From runs to results: which score belongs to which state of which student, and the tables that say so."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inhibitor.report.records import AnyMetrics, Distill, Finetune, Folder, Runs, State
from inhibitor.report.tables import MISSING, Table, number
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


@dataclass
class Row:
    """One model, or one state of the student: its errors (one per seed) and its fine-tuned scores by task."""

    label: str
    states: list[State] = field(default_factory=list)
    finetunings: dict[str, list[Folder[Finetune]]] = field(default_factory=dict)

    def scores(self, task: str) -> list[float]:
        """Headline scores × 100, one per run."""
        return [100 * folder.metrics.headline for folder in self.finetunings.get(task, [])]


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
        groups.setdefault((metrics.teacher, tuple(metrics.student.layers), names, recipe(folder)), []).append(folder)
    found = [_distilled(group, runs.finetunings) for group in groups.values()]
    taken = [study.name for study in found]
    for study in found:
        if taken.count(study.name) > 1:
            study.name = "/".join(study.distillations[0].path.resolve().parts[-2:])
    placed = {folder.path for study in found for row in study.rows for f in row.finetunings.values() for folder in f}
    rest = [folder for folder in runs.finetunings if folder.path not in placed]
    return [*found, _compared(rest)] if rest else found


def recipe(folder: Folder[AnyMetrics]) -> str:
    """The configuration without what tells repetitions apart."""
    lines = folder.config.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("seed:", "model:", "output:")))


def _distilled(group: list[Folder[Distill]], finetunings: Iterable[Folder[Finetune]]) -> Study:
    states = [state.name for state in group[0].metrics.states]
    rows = {
        name: Row(STATES.get(name, f"after {name}"), [folder.metrics.states[index] for folder in group])
        for index, name in enumerate(states)
    }
    teacher = Row("teacher")
    for finetuning in finetunings:
        name = next(filter(None, (_state(finetuning, folder) for folder in group)), None)
        if name == "teacher" or name in rows:
            row = rows.get(name, teacher)
            row.finetunings.setdefault(finetuning.metrics.task, []).append(finetuning)
    return Study(group[0].name, group, teacher, list(rows.values()))


def _state(finetuning: Folder[Finetune], distillation: Folder[Distill]) -> str | None:
    """The state of ``distillation`` that was fine-tuned, from where the model lay.

    A relative path counts from the working folder or from a folder above the run, so that runs may move together.
    """
    model, run = finetuning.metrics.model, distillation.path.resolve()
    if Path(model).resolve() == Path(distillation.metrics.teacher).resolve():
        return "teacher" if finetuning.metrics.attention == "softmax" else "converted"
    for base in (Path.cwd(), *finetuning.path.resolve().parents):
        place = (base / model).resolve()
        if place.is_relative_to(run):
            match place.relative_to(run).parts:
                case ("stages", stage, *_):
                    return stage
                case (name, *_) if name == MODEL:
                    return distillation.metrics.states[-1].name
    return None


def _compared(finetunings: Sequence[Folder[Finetune]]) -> Study:
    rows: dict[tuple[str, str], Row] = {}
    for folder in sorted(finetunings, key=lambda folder: folder.metrics.attention == "inhibitor"):
        model, attention = folder.metrics.model, folder.metrics.attention
        row = rows.setdefault((attention, model), Row(f"{short(model)} ({attention})"))
        row.finetunings.setdefault(folder.metrics.task, []).append(folder)
    softmax = [row for (attention, _), row in rows.items() if attention == "softmax"]
    teacher = softmax[0] if len(softmax) == 1 < len(rows) else None
    return Study("fine-tuned", [], teacher, [row for row in rows.values() if row is not teacher])


def short(model: str) -> str:
    """A model's name without the path to it.

    Example:
        >>> short("sentence-transformers/all-MiniLM-L6-v2"), short("/data/e1/stages/full"), short("/data/e1/model")
        ('sentence-transformers/all-MiniLM-L6-v2', 'e1/full', 'e1')
    """
    match Path(model).parts:
        case (_,) | (_, _) if not Path(model).is_absolute():
            return model
        case (*_, run, "stages", stage):
            return f"{run}/{stage}"
        case (*_, run, last) if last == MODEL:
            return run
        case (*_, last):
            return last
    return model


def tasks(found: Iterable[Study]) -> list[str]:
    """Every task with a score, in the usual order."""
    names = {task for study in found for row in study.rows for task in row.finetunings}
    order = list(TASKS)
    return sorted(names, key=lambda task: (order.index(task) if task in order else len(order), task))


def retention(row: Row, teacher: Row | None, among: Iterable[str]) -> float | None:
    """Student's mean score in per cent of the teacher's over the tasks that both have, or None."""
    both = [task for task in among if row.finetunings.get(task) and teacher and teacher.finetunings.get(task)]
    if not teacher or not both:
        return None
    of_teacher = sum(statistics.fmean(teacher.scores(task)) for task in both)
    return 100 * sum(statistics.fmean(row.scores(task)) for task in both) / of_teacher if of_teacher > 0 else None


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
            kept = [_per_cent(retention(row, study.teacher, names))] if paired else []
            rows.append([label, *errors, *scores, *kept])
    teachers = {folder.metrics.teacher for study in found for folder in study.distillations}
    title = "Inhibitor attention" if distilled else "Fine-tuning results"
    return Table(
        title=f"{title} in {short(teachers.pop()).split('/')[-1]}" if len(teachers) == 1 else title,
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
    """One row per task and fine-tuned model: metric, rows measured, teacher's score, own score, retention."""
    rows = []
    for task in tasks(found):
        scored = [(study, row) for study in found for row in study.rows if row.scores(task)]
        students = [(study, row) for study, row in scored if row is not study.teacher]
        for study, row in students or scored[:1]:
            metrics = row.finetunings[task][0].metrics
            measured, teacher = metrics.rows_measured(), None if row is study.teacher else study.teacher
            rows.append(
                [
                    TASKS.get(task, task),
                    study.label(row, found),
                    metrics.headline_metric(),
                    MISSING if measured is None else str(measured),
                    number(teacher.scores(task) if teacher else [], 1),
                    number(row.scores(task), 1),
                    _per_cent(retention(row, teacher, [task])),
                ]
            )
    columns = ["task", "model", "metric", "rows measured", "teacher's score", "score", "retention %"]
    return Table("Scores by task", columns, rows, labels=3)


def _per_cent(value: float | None) -> str:
    return MISSING if value is None else number(value, 1)


def _notes(found: Sequence[Study], names: Sequence[str], distilled: bool) -> list[str]:
    notes = []
    if distilled:
        notes.append("Errors: squared error relative to the teacher, mean over layers; 0 is the teacher itself.")
    if names:
        notes.append("Task scores are × 100, after fine-tuning.")
    if any(retention(row, study.teacher, names) for study in found for row in study.students):
        of = "the teacher's" if distilled else "that of the softmax model"
        notes.append(f"Retention: the mean score in per cent of {of}, over the tasks that both have.")
    cells = [(task, row, runs) for study in found for row in study.rows for task, runs in row.finetunings.items()]
    repeated = {len(runs) for _, _, runs in cells} | {len(study.distillations) for study in found}
    counts = sorted(count for count in repeated if count > 1)
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        notes.append(f"Mean ± standard deviation of {span} runs.")
    mixed = [f"{TASKS.get(task, task)}, {row.label}" for task, row, runs in cells if len(set(map(recipe, runs))) > 1]
    if mixed:
        notes.append(f"More than the seed differs between the runs of: {'; '.join(mixed)}.")
    return notes
