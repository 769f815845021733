"""``accuracy.jsonl``: one line for each finished run, from which every table is made."""

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inhibitor import __version__
from inhibitor.config import Config
from inhibitor.data.tasks import get_task
from inhibitor.distill.states import PROGRESS
from inhibitor.errors import ConfigError, RunError
from inhibitor.reproduce.recipe import Experiment
from inhibitor.runs import METRICS, MODEL, Run, read_json, write_text

Key = tuple[str, str, int]


class Record(Config):
    """One finished run. Scores are fractions.

    Args:
        experiment: e0, e1, e2 or e1e2.
        model: What was trained: the teacher, or the student of E1.
        task: The task.
        seed: The run's.
        trained: The rows it was trained on, and how many. A part of a split has the part's name.
        measured: The rows it was measured on.
        metric: What ``score`` is.
        scores: Every metric on every split.
        score: The headline: the task's first metric on its first split.
        teacher_score: The score of the e0 run of the same task, seed and rows; None until there is one.
        learning_rate: The chosen one.
        epochs: The chosen ones.
        distillation_tokens: Real tokens that the student was distilled on, E1 and E2 together; None where E1's run
            is not at hand.
        recipe: The file that was run.
        commit: Of the repository, or the package's version outside of one.
    """

    experiment: Experiment
    model: str
    task: str
    seed: int
    trained: dict[str, int]
    measured: dict[str, int]
    metric: str
    scores: dict[str, dict[str, float]]
    score: float
    teacher_score: float | None = None
    learning_rate: float
    epochs: int
    distillation_tokens: int | None
    recipe: str
    commit: str

    @property
    def key(self) -> Key:
        """What there is one of."""
        return self.experiment, self.task, self.seed


def rows_and_scores(task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metrics.json`` of a fine-tuning or a distillation on a task says, in the fields of a ``Record``.

    Raises:
        RunError: It does not say that.
    """
    try:
        rows, scores = metrics["rows"], metrics["scores"]
        return {
            "task": task,
            "trained": {name: count for name, count in rows.items() if name not in scores},
            "measured": {name: rows[name] for name in scores},
            "metric": get_task(task).metrics[0],
            "scores": scores,
            "score": float(metrics["headline"]),
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged("headline, rows and scores of a run on a task", error) from error


def _damaged(expected: str, error: Exception) -> RunError:
    got = f"{type(error).__name__}: {error}"[:200]
    return RunError(METRICS, expected=expected, got=got, remedy="Delete that file, and run the same command again.")


def stage_tokens(metrics: Mapping[str, Any]) -> int:
    """Real tokens that a distillation's stages trained on; 0 for a fine-tuning.

    Raises:
        RunError: A stage does not say that.
    """
    try:
        return sum(int(stage["tokens"]) for stage in metrics.get("stages", []))
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged("tokens of each stage", error) from error


def tokens(student: str) -> int | None:
    """Those of the run whose ``model/`` or whose state in ``stages/`` a student is, or None where it is no run's.

    Raises:
        RunError: What that run says of itself is damaged.
    """
    folder = Path(student)
    if (folder / PROGRESS).is_file():
        return stage_tokens(read_json(folder / PROGRESS))
    run = Run(folder.parent)
    return stage_tokens(run.metrics()) if folder.name == MODEL and run.finished else None


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file.

    Raises:
        RunError: A line is no record.
    """
    found = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Record.parse(json.loads(line), source=f"{path}, line {number}"))
        except (ConfigError, ValueError) as error:
            raise RunError(
                f"{path}, line {number}",
                expected="a record of a finished run",
                got=" ".join(str(error).split())[:200],
                remedy="Delete that line: the grid writes it anew from the run's folder.",
            ) from None
    return found


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records, each with the score of its teacher."""
    text = (json.dumps(record.model_dump(mode="json"), ensure_ascii=False) + "\n" for record in with_teachers(records))
    write_text(path, "".join(text))


def with_teachers(records: Iterable[Record]) -> list[Record]:
    """The records, each with the score of the e0 run of its task, seed and rows."""
    records = list(records)
    teachers = {(record.task, record.seed): record for record in records if record.experiment == "e0"}
    return [
        record.model_copy(update={"teacher_score": _score(teachers.get((record.task, record.seed)), record)})
        for record in records
    ]


def _score(teacher: Record | None, record: Record) -> float | None:
    same = teacher is not None and (teacher.trained, teacher.measured) == (record.trained, record.measured)
    return teacher.score if same and teacher is not None else None


def commit() -> str:
    """The commit of the repository that this package runs from, ``-dirty`` if changed; outside of one, its version."""
    git, package = shutil.which("git"), Path(__file__).parent.parent
    if git is not None:
        tracked = _output(git, package, "ls-files", "--error-unmatch", "__init__.py")
        found = _output(git, package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        if tracked and found:
            return found
    return f"inhibitor {__version__}"


def _output(git: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - git, without a shell
        [git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
