"""How retention moves with the text a student of E1 was distilled on: one point for each student."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inhibitor.data.tasks import TASKS as ORDER
from inhibitor.errors import ConfigError
from inhibitor.report.results import TASKS
from inhibitor.report.tables import Table
from inhibitor.reproduce.accuracy import Record, read
from inhibitor.reproduce.tables import columns, overall, per_cent


@dataclass(frozen=True)
class Point:
    """One student.

    Args:
        tokens: Of text that it was distilled on.
        scores: For each task the student's and the teacher's mean score.
    """

    tokens: int
    scores: Mapping[str, tuple[float, float]]

    def over(self, tasks: Sequence[str]) -> float | None:
        """Retention in per cent over several tasks: of the sums of their scores; None where one is missing."""
        return overall([self.scores[task] for task in tasks]) if set(tasks) <= self.scores.keys() else None


def read_others(paths: Iterable[Path]) -> list[list[Record]]:
    """The records of other grids.

    Raises:
        ConfigError: One has none.
    """
    found = []
    for path in paths:
        found.append(read(path))
        if not found[-1]:
            raise ConfigError(
                f"curve: {path}",
                expected="the accuracy.jsonl of another grid",
                got="no record" if path.is_file() else "no such file",
                remedy="Run that grid first, or leave it out.",
            )
    return found


def points(grids: Iterable[Sequence[Record]]) -> list[Point]:
    """One point for each student of a grid whose tokens are known, by tokens; of tasks on the benchmark's own rows."""
    found = []
    for records in grids:
        for tokens in {record.distillation_tokens for record in records if record.experiment == "e1"} - {None}:
            own = [record for record in records if record.experiment == "e0" or record.distillation_tokens == tokens]
            pairs = {column.task: column.of_teacher("e1") for column in columns(own) if column.official}
            scores = {task: pair for task, pair in pairs.items() if pair is not None}
            if scores:
                found.append(Point(tokens or 0, scores))
    return sorted(found, key=lambda point: point.tokens)


def curve_table(found: Sequence[Point]) -> Table:
    """One row for each student."""
    tasks, shared = _tasks(found)
    rows = [
        [
            f"{point.tokens:,}",
            *(per_cent(point.over([task])) for task in tasks),
            *([per_cent(point.over(shared))] if len(shared) > 1 else []),
        ]
        for point in found
    ]
    names = [*(TASKS.get(task, task) for task in tasks), *([f"these {len(shared)}"] if len(shared) > 1 else [])]
    notes = ["E1's retention in per cent. The last column is over the tasks that every student was measured on."]
    return Table("Retention against tokens of text", ["tokens", *names], rows, notes if len(shared) > 1 else ())


def curve_lines(found: Sequence[Point]) -> dict[str, list[tuple[int, float]]]:
    """(tokens, retention) by the name of a task, and under "together" over those that every student has."""
    tasks, shared = _tasks(found)
    groups = {TASKS.get(task, task): [task] for task in tasks} | ({"together": shared} if len(shared) > 1 else {})
    return {
        name: [(point.tokens, kept) for point in found if (kept := point.over(group)) is not None]
        for name, group in groups.items()
    }


def _tasks(found: Sequence[Point]) -> tuple[list[str], list[str]]:
    """Every task in the usual order, and those that every point has."""
    tasks = [task for task in ORDER if any(task in point.scores for point in found)]
    return tasks, [task for task in tasks if all(task in point.scores for point in found)]
