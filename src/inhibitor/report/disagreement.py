"""On which rows of a task a student errs where its teacher does not, and the other way round."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import TASKS as KNOWN
from inhibitor.data.tasks import Task
from inhibitor.errors import ConfigError, DataError, RunError
from inhibitor.evaluate.agreement import Agreement, Prediction, Row, compare, name, read_predictions, texts
from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.report.results import TASKS, Study, in_order, places
from inhibitor.report.tables import Table, number
from inhibitor.runs import CONFIG, MODEL, Run

EXAMPLES = 12  # rows of each task that are shown
LONGEST = 240  # characters of a row that are shown


@dataclass(frozen=True)
class Pair:
    """A student and the fine-tuned teacher that it is compared with.

    Args:
        task: The task.
        label: What the student is called.
        seed: Of both.
        teacher: The teacher's run.
        student: The student's.
    """

    task: str
    label: str
    seed: int
    teacher: Path
    student: Path


@dataclass(frozen=True)
class _Compared:
    pair: Pair
    teacher: Mapping[Row, Prediction]
    student: Mapping[Row, Prediction]
    agreement: Agreement


def pairs(found: Sequence[Study]) -> list[Pair]:
    """Fine-tuned students with the teacher's run of the same seed; students of E2 with the run that taught them."""
    matched = []
    for study in found:
        theirs = study.teacher.finetunings if study.teacher else {}
        for row in study.students:
            for task, folders in row.finetunings.items():
                teachers = {folder.metrics.seed: folder.path for folder in theirs.get(task, [])}
                matched += [
                    Pair(task, study.label(row, found), folder.metrics.seed, teachers[folder.metrics.seed], folder.path)
                    for folder in folders
                    if folder.metrics.seed in teachers
                ]
        for run in study.distillations:
            models = (place for place in places(run.metrics.teacher, run.path) if place.name == MODEL)
            teacher = next((model.parent for model in models if Run(model.parent).finished), None)
            if run.metrics.task is not None and teacher is not None:
                matched.append(Pair(run.metrics.task, study.name, run.metrics.seed, teacher, run.path))
    return matched


def disagreements(found: Iterable[Pair]) -> list[Table]:
    """For each task with predictions of both sides: how many rows, and the texts that most students lose.

    Raises:
        RunError: A file of predictions is damaged.
    """
    by_task: dict[str, list[_Compared]] = {}
    for pair in found:
        if pair.task not in KNOWN:
            continue
        teacher, student = (read_predictions(run, KNOWN[pair.task]) for run in (pair.teacher, pair.student))
        if teacher is None or student is None:
            continue
        try:
            agreement = compare(teacher, student)
        except RunError:  # measured on other rows
            continue
        by_task.setdefault(pair.task, []).append(_Compared(pair, teacher, student, agreement))
    tables = (
        table for task in in_order(by_task) for table in (_counts(by_task[task]), _examples(KNOWN[task], by_task[task]))
    )
    return [table for table in tables if table.rows]


def _counts(compared: Sequence[_Compared]) -> Table:
    task = compared[0].pair.task
    rows = [
        [
            entry.pair.label,
            str(entry.pair.seed),
            *(
                f"{count:,}"
                for count in (
                    entry.agreement.rows,
                    entry.agreement.both,
                    len(entry.agreement.lost),
                    len(entry.agreement.won),
                    entry.agreement.neither,
                )
            ),
            number(entry.agreement.p_value),
        ]
        for entry in compared
    ]
    columns = ["student", "seed", "rows", "both right", "teacher alone", "student alone", "neither", "McNemar's p"]
    notes = ["p: how probable so uneven a division of the rows that one alone has right is between equal models."]
    if KNOWN[task].regression:
        notes.append("Right: within one point of the label.")
    return Table(f"{TASKS.get(task, task)}: who is right", columns, rows, notes)


def _examples(task: Task, compared: Sequence[_Compared]) -> Table:
    """The rows that most students lose, of these the ones that they get most wrong."""
    losses = Counter(row for entry in compared for row in entry.agreement.lost)
    faults = {row: sum(entry.student[row].fault for entry in compared if row in entry.student) for row in losses}
    chosen = sorted(losses, key=lambda row: (-losses[row], -faults[row], row))[:EXAMPLES]
    told = _texts(task, compared[0])
    rows = []
    for row in chosen:
        loser = next(entry for entry in compared if row in entry.agreement.lost)
        rows.append(
            [
                " / ".join(map(_cut, told[row])) if row in told else f"{row[0]}, row {row[1] + 1}",
                *(name(task, said) for said in (loser.student[row].label, loser.student[row].said)),
                f"{losses[row]} of {len(compared)}",
            ]
        )
    notes = [f"{len(losses):,} rows are lost by one student or more; the first {len(rows)}, the worst errors first."]
    if not told.keys() >= set(chosen):
        notes.append("The texts are not where the teacher's run had them.")
    title = f"{TASKS.get(task.name, task.name)}: what students get wrong and their teachers right"
    return Table(title, ["text", "label", "a student says", "lost by"], rows, notes, labels=3)


def _texts(task: Task, compared: _Compared) -> dict[Row, tuple[str, ...]]:
    """The texts of the rows, from the data of the teacher's run; none where they are not there now."""
    try:
        config = FinetuneConfig.load(compared.pair.teacher / CONFIG)
        if config.data is None and task.repository:  # on the hub
            return {}
        splits = {} if config.held_out else {"splits": task.evaluation}
        labelled = load_task(task, config.data, on_bad_row=config.on_bad_row, held_out=config.held_out, **splits)
    except (ConfigError, DataError):
        return {}
    found = texts(labelled)
    labels = {
        (split.name, place): label
        for split in labelled.splits.values()
        for place, label in enumerate(split.rows["label"])
    }
    same = all(labels.get(row) == prediction.label for row, prediction in compared.teacher.items())
    return found if same else {}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
