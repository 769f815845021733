"""The grid at work: runs in the order of the plan, as many at a time as the pool takes; a failed one stops no other."""

import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from inhibitor.data import corpus
from inhibitor.data.labelled import find_task
from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import InhibitorError, Interrupted, RunError
from inhibitor.evaluate.finetune import FinetuneConfig
from inhibitor.models.loading import load_pretrained
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.plan import Job, configuration, e1_recipe, plan, student
from inhibitor.reproduce.pools import Child, Ended, Pool, open_pool
from inhibitor.reproduce.recipe import ReproduceConfig
from inhibitor.reproduce.submission import submit
from inhibitor.runs import ACCURACY, CONFIG, MODEL, VERSIONS, Run, versions, write_text

STAGES = "stages"  # of a distillation: the student as it was between them
LAST = "# As it was called last; each run's own folder says what that run was asked."
NOT_OPTIONS = {"warmup_ratio", "weight_decay", "max_steps"}  # of a fine-tuning: left at their defaults


@dataclass(frozen=True)
class Standing:
    """How far a grid has come.

    Args:
        total: Runs of the plan.
        done: Those finished, whether found so or done.
        running: The names of those at work.
        failures: Those that failed until now.
        best: What was last heard of, and its best score until now.
        seconds_left: An estimate from the runs done so far; None before the first.
    """

    total: int
    done: int
    running: tuple[str, ...]
    failures: tuple["Failure", ...]
    best: str
    seconds_left: float | None


@dataclass(frozen=True)
class Failure:
    """A run that failed, and why: the last lines it printed, or what it waited for."""

    name: str
    reason: str


@dataclass
class Outcome:
    """What came of a grid: the record of every finished run in its folder, and what failed."""

    records: list[Record]
    failures: list[Failure] = field(default_factory=list)


def reproduce(config: ReproduceConfig, recipe: str, watch: Callable[[Standing], None] | None = None) -> Outcome:
    """Do every run that is not finished, and write ``accuracy.jsonl``.

    Args:
        config: The grid.
        recipe: The file it was read from, for the records.
        watch: Is told whenever a run begins or ends.

    Raises:
        InhibitorError: Before any run: a model, a task's data, the student's recipe or its text cannot be read, the
            output is not a grid's, the executor is not there, another grid is at work in the output, or the
            ``accuracy.jsonl`` of an earlier one cannot be read.
        Interrupted: SIGTERM or Ctrl-C, after the runs at work have written their checkpoints.
    """
    folder = Run(config.output)
    _check(config)
    with closing(open_pool(config.executor, config.processes)) as pool, folder.held():
        own = config.output / CONFIG
        if own.is_file() and not own.read_text(encoding="utf-8").startswith(LAST):
            expected, got = "a new folder, or a grid's", "a run's"
            raise RunError(str(config.output), expected=expected, got=got, remedy="Choose another output.")
        records = accuracy.read(config.output / ACCURACY)
        with _signals(config.output):
            write_text(config.output / CONFIG, f"{LAST}\n{config.to_yaml()}")
            folder.write_json(VERSIONS, versions())
            grid = _Grid(config, recipe, pool, records, watch or (lambda standing: None))
            grid.complete()
        refused = submit(config) if config.submission else {}
    failures = [*grid.failures, *(Failure(name, str(error)) for name, error in refused.items())]
    return Outcome(accuracy.with_teachers(grid.records.values()), failures)


def _check(config: ReproduceConfig) -> None:
    """Look for all that the runs will read."""
    for model in filter(None, (config.teacher, config.student)):
        load_pretrained(AutoConfig, model)
    recipe = None if config.e1 is None else e1_recipe(config)
    if recipe is not None and recipe.text is not None and not Run(recipe.output).finished:
        corpus.check(recipe.text)
    if config.data is not None:
        for task in config.tasks:
            find_task(get_task(task), config.data, ("train",))


@contextmanager
def _signals(output: Path) -> Iterator[None]:
    """While entered, SIGTERM and SIGINT stop the grid."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number, f"that of each run in {output}")

    inside = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT) if inside}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Grid:
    """The grid while it goes on."""

    def __init__(
        self,
        config: ReproduceConfig,
        recipe: str,
        pool: Pool,
        records: list[Record],
        watch: Callable[[Standing], None],
    ) -> None:
        self.config, self.recipe, self.pool, self.watch = config, recipe, pool, watch
        self.records = {record.key: record for record in records}
        self.jobs = {job.name: job for job in plan(config)}
        self.graph = TopologicalSorter({job.name: job.after for job in self.jobs.values()})
        self.commit = accuracy.commit()
        self.results: dict[str, dict[str, Any]] = {}
        self.failures: list[Failure] = []
        self.running: dict[Future[Ended], tuple[Job, FinetuneConfig | DistillConfig, float]] = {}
        self.seconds: list[float] = []
        self.best: dict[str, float] = {}
        self.said = ""

    def complete(self) -> None:
        """Begin what can begin, until nothing can."""
        self.graph.prepare()
        order = {name: place for place, name in enumerate(self.jobs)}
        ready: list[str] = []
        while True:
            ready = sorted([*ready, *self.graph.get_ready()], key=order.__getitem__)
            if ready and len(self.running) < self.pool.capacity:
                self._begin(self.jobs[ready.pop(0)])
            elif self.running:
                for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                    self._ended(future)
            else:
                break
            self._tell()
        failed = {failure.name for failure in self.failures}
        for name, job in self.jobs.items():
            if name not in self.results and name not in failed:
                missing = next(other for other in job.after if other not in self.results)
                self.failures.append(Failure(name, f"not begun, for {missing} is missing."))

    def _begin(self, job: Job) -> None:
        try:
            asked = configuration(self.config, job, self.results)
            if Run(asked.output).finished:
                self._finished(job, asked, found=True)
                return
        except InhibitorError as error:
            self.failures.append(Failure(job.name, str(error)))
            return
        log = self._beside(job, "log")
        log.parent.mkdir(parents=True, exist_ok=True)
        child = Child(self._arguments(job, asked), asked.output, log, Path.cwd(), self.pool.threads)
        self.running[self.pool.submit(child)] = (job, asked, time.monotonic())

    def _ended(self, future: "Future[Ended]") -> None:
        job, asked, begun = self.running.pop(future)
        error = future.exception()
        if error is not None:  # Ray's: its workers died too often
            self.failures.append(Failure(job.name, str(error)))
            return
        ended = future.result()
        if not Run(asked.output).finished:
            how = f"ended by signal {-ended.status}" if ended.status < 0 else f"exit status {ended.status}"
            self.failures.append(Failure(job.name, f"{how}; {self._beside(job, 'log')} ends\n{ended.lines}"))
            return
        self.seconds.append(time.monotonic() - begun)
        try:
            self._finished(job, asked, found=False)
        except InhibitorError as other:
            self.failures.append(Failure(job.name, str(other)))

    def _finished(self, job: Job, asked: FinetuneConfig | DistillConfig, *, found: bool) -> None:
        """Read a finished run, if it is the one that is asked for, and let go those that wait for it."""
        metrics = Run.start(asked.output, asked).metrics()
        if job.experiment is not None:
            self._measured(job, asked, metrics, found=found)
        self.results[job.name] = metrics
        self.graph.done(job.name)

    def _measured(
        self, job: Job, asked: FinetuneConfig | DistillConfig, metrics: dict[str, Any], *, found: bool
    ) -> None:
        """Note what a run on a task measured; where it counts, in ``accuracy.jsonl``."""
        measured = accuracy.rows_and_scores(job.task, metrics)
        if job.choice is None:
            record = self._record(job, asked, measured, accuracy.stage_tokens(metrics))
            before = self.records.get(record.key)
            if found and before is not None:  # at that time, with that recipe
                record = record.model_copy(update={"recipe": before.recipe, "commit": before.commit})
            self.records[record.key] = record
            accuracy.write(self.config.output / ACCURACY, self.records.values())
        shutil.rmtree(asked.output / STAGES, ignore_errors=True)  # the last one is the model
        if job.choice is not None and job.experiment != "e0":  # E0's teach those of E2
            shutil.rmtree(asked.output / MODEL, ignore_errors=True)
        what = f"{job.experiment} on {job.task}{', held-out rows' if job.choice else ''}"
        self.best[what] = max(self.best.get(what, float("-inf")), measured["score"])
        self.said = f"{what}: {100 * self.best[what]:.1f}"

    def _record(
        self, job: Job, asked: FinetuneConfig | DistillConfig, measured: dict[str, Any], stage_tokens: int
    ) -> Record:
        from_student = job.experiment in ("e1", "e1e2")
        tokens = accuracy.tokens(student(self.config)) if from_student else 0
        trained: Any = asked.task if isinstance(asked, DistillConfig) else asked
        return Record.parse(
            {
                "experiment": job.experiment,
                "model": student(self.config) if from_student else self.config.teacher,
                "seed": job.seed,
                **measured,
                "learning_rate": trained.learning_rate,
                "epochs": trained.epochs,
                "distillation_tokens": None if tokens is None else tokens + stage_tokens,
                "recipe": self.recipe,
                "commit": self.commit,
            },
            source=job.name,
        )

    def _arguments(self, job: Job, asked: FinetuneConfig | DistillConfig) -> tuple[str, ...]:
        """The command that does a run; a distillation's recipe is written beside its folder."""
        if isinstance(asked, DistillConfig):
            recipe = self._beside(job, "yaml")
            write_text(recipe, asked.to_yaml())
            return "distill", str(recipe)
        values = asked.model_dump(mode="json", exclude_none=True, exclude=NOT_OPTIONS | {"bf16"})
        options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return "finetune", *options, *(["--bf16"] if asked.bf16 else [])

    def _beside(self, job: Job, suffix: str) -> Path:
        return self.config.output / f"{job.name}.{suffix}"

    def _tell(self) -> None:
        left = len(self.jobs) - len(self.results) - len(self.failures)
        seconds = statistics.fmean(self.seconds) * left / max(1, len(self.running)) if self.seconds else None
        names = tuple(job.name for job, _, _ in self.running.values())
        self.watch(Standing(len(self.jobs), len(self.results), names, tuple(self.failures), self.said, seconds))
