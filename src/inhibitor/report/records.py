"""What run folders say: ``metrics.json`` read and checked once, so that tables and plots can trust it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from inhibitor.errors import RunError
from inhibitor.runs import CONFIG, METRICS, VERSIONS, Run

Matrix: TypeAlias = list[list[float]]
Scores: TypeAlias = Annotated[  # split, metric, value; the first metric on the first split is the headline
    dict[str, Annotated[dict[str, float], Field(min_length=1)]], Field(min_length=1)
]


class _Record(BaseModel):
    """Immutable; keys that the report does not show are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Heads(_Record):
    """The student's attention by converted layer and head, beside the teacher's; see ``distill.diagnosis``."""

    context_error: Matrix = []
    output_error: Matrix = []
    inhibited: Matrix = []
    keys: Matrix = []
    teacher_keys: Matrix = []

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for name in type(self).model_fields:
            if len({len(row) for row in getattr(self, name)}) > 1 or [] in getattr(self, name):
                raise ValueError(f"{name} has not the same number of heads in every layer")
        return self


class _Intervals(_Record):
    """An error by layer and interval, each named by the first number in it; intervals double in length."""

    first: list[int] = []

    @model_validator(mode="after")
    def _one_for_each_interval(self) -> Self:
        for name in set(type(self).model_fields) - {"first"}:
            if any(len(errors) != len(self.first) for errors in getattr(self, name)):
                raise ValueError(f"{name} has not one value for each of {len(self.first)} intervals")
        return self


class Positions(_Intervals):
    """The context error by converted layer and position in the sequence."""

    context_error: Matrix = []


class Lengths(_Intervals):
    """The hidden states' error by layer and length of the sequence."""

    hidden_error: Matrix = []


class State(_Record):
    """The student at one point of the recipe: relative squared errors against the teacher, per layer.

    What has another shape in the student than in the teacher has no error. A distillation on a task knows scores too.
    """

    name: str
    context_error: list[float] = []
    output_error: list[float] = []
    hidden_error: list[float] = []
    heads: Heads | None = None
    positions: Positions | None = None
    lengths: Lengths | None = None
    scores: Scores | None = None


class Traces(_Record):
    """What was seen inside the traced layers at one step, a value for each: heads and positions averaged."""

    layers: list[int]
    context_error: list[float] = []
    inhibited: list[float] = []
    gamma: list[float] = []
    eta: list[float] = []
    delta: list[float] = []
    length_exponent: list[float] = []
    reach: list[float] = []

    @model_validator(mode="after")
    def _one_for_each_layer(self) -> Self:
        for name in type(self).model_fields:
            if len(getattr(self, name)) not in (0, len(self.layers)):
                raise ValueError(f"{name} has not one value for each of {len(self.layers)} layers")
        return self


class Step(_Record):
    """One logged training step; ``layer`` where a single layer was trained."""

    step: float
    loss: float
    layer: int | None = None
    grad_norm: float | None = None
    traces: Traces | None = None


class Checkpoints(_Record):
    """How often a stage was saved, and how long that took."""

    count: int
    seconds: float


class Stage(_Record):
    """One distillation stage, its losses with their weights, and what it cost."""

    name: str
    tokens: int
    seconds: float
    tokens_per_second: float
    losses: dict[str, float] = {}
    checkpoints: Checkpoints | None = None
    history: list[Step] = []


class Student(_Record):
    """Which layers carry inhibitor attention."""

    layers: list[int] = []


class Attention(_Record):
    """One head on one text: the teacher's weights and the student's inhibition, query × key."""

    text: str
    tokens: list[str] = Field(min_length=1)
    layer: int
    head: int
    softmax: Matrix
    inhibition: Matrix

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.tokens)
        for name, matrix in (("softmax", self.softmax), ("inhibition", self.inhibition)):
            if [len(row) for row in matrix] != [size] * size:
                raise ValueError(f"{name} is not {size} x {size}, one row and column per token")
        return self


class Energy(_Record):
    """What the run took in energy, as its meters said, or why they did not."""

    joules: float | None = None
    reason: str = "no reason given"
    by_device: dict[str, float] = {}
    seconds: float = 0.0
    source: str = "unknown"
    co2_grams: float | None = None


class Scored(_Record):
    """A model's scores on one task, and by what the rows are: how many, how many cut, how many that train has too."""

    task: str
    scores: Scores
    rows: dict[str, int] = {}
    truncated: dict[str, int] = {}
    overlap: dict[str, int] = {}

    @property
    def split(self) -> str:
        """The headline's."""
        return next(iter(self.scores))

    @property
    def metric(self) -> str:
        """The headline's."""
        return next(iter(self.scores[self.split]))

    @property
    def headline(self) -> float:
        """The first metric on the first split."""
        return self.scores[self.split][self.metric]

    @property
    def measured(self) -> tuple[str, int | None]:
        """The rows behind the headline: their name, and how many."""
        return self.split, self.rows.get(self.split)


class Distill(_Record):
    """Metrics of a distillation; of one on a task, its name, its rows and the teacher's scores too."""

    kind: Literal["distill"]
    teacher: str
    task: str | None = None
    student: Student = Student()
    seed: int
    states: list[State] = Field(min_length=1)
    stages: list[Stage] = []
    parameters: dict[str, dict[str, Matrix]] = {}
    attention: Attention | None = None
    energy: Energy | None = None
    teacher_scores: Scores | None = None
    rows: dict[str, int] = {}
    truncated: dict[str, int] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("context_error", "output_error", "hidden_error"):
            if len({len(getattr(state, name)) for state in self.states}) > 1:
                raise ValueError(f"{name} has not the same number of layers in every state")
        if len({state.name for state in self.states}) < len(self.states):
            raise ValueError("two states have one name")
        return self

    def scored(self, scores: Scores | None) -> list[Scored]:
        """The teacher's scores or a state's, with the task and its rows; none where there are none."""
        if self.task is None or scores is None:
            return []
        return [Scored(task=self.task, scores=scores, rows=self.rows, truncated=self.truncated)]


class Evaluation(_Record):
    """Scores after one epoch: split, metric, value."""

    epoch: float
    scores: dict[str, dict[str, float]]


class _Model(Scored):
    """What was scored, and with which seed."""

    model: str = Field(pattern=r"^[^\x00]+$")
    seed: int


class Finetune(_Model):
    """Metrics of fine-tuning one model on one task."""

    kind: Literal["finetune"]
    attention: Literal["inhibitor", "softmax"]
    history: list[Step] = []
    evaluations: list[Evaluation] = []

    def headline_by_epoch(self) -> list[tuple[float, float]]:
        """Epoch and headline."""
        found = [(each.epoch, each.scores.get(self.split, {}).get(self.metric)) for each in self.evaluations]
        return [(epoch, score) for epoch, score in found if score is not None]


class Int8(_Record):
    """What became integers: bits of attention and of weights, and the form of the parts, "int8" or "float"."""

    attention: int
    linear: str
    weights: int = 8
    embeddings: str


class Bytes(_Record):
    """The weights of the float model, and those of the quantised one."""

    before: int
    after: int


class Seconds(_Record):
    """One call: the median, and the interquartile range."""

    median: float
    spread: float


class Latency(_Record):
    """One call of the float model and of the quantised one, and the median of the rounds' ratios."""

    batch: int
    length: int
    before: Seconds
    after: Seconds
    ratio: float


class Part(_Record):
    """One part in integers, all others in float: the headline score, and the logits over their change in decibels."""

    part: str
    score: float
    sqnr: float


class Clipped(_Record):
    """The share of a layer's codes that lie beyond their grid."""

    layer: int
    query_key: float
    value: float


class Machine(_Record):
    """What times were measured on."""

    cpu: str
    threads: int


class Quantize(_Model):
    """Metrics of turning one fine-tuned model into integers."""

    kind: Literal["quantize"]
    int8: Int8
    scores_before: Scores
    sqnr: float
    bytes: Bytes
    latency: list[Latency] = []
    parts: list[Part] = []
    clipped: list[Clipped] = []
    machine: Machine

    @model_validator(mode="after")
    def _same_scores(self) -> Self:
        before, after = (
            {name: list(split) for name, split in side.items()} for side in (self.scores_before, self.scores)
        )
        if before != after:
            raise ValueError("scores_before has not the splits and metrics of scores")
        return self

    @property
    def headline_before(self) -> float:
        """The float model's headline."""
        return self.scores_before[self.split][self.metric]


AnyMetrics: TypeAlias = Distill | Finetune | Quantize
Metrics = TypeVar("Metrics", bound=AnyMetrics, covariant=True)
_METRICS: TypeAdapter[AnyMetrics] = TypeAdapter(Annotated[AnyMetrics, Field(discriminator="kind")])


@dataclass(frozen=True)
class Folder(Generic[Metrics]):
    """A finished run: where it lies, what it measured, what it was asked and with which versions."""

    path: Path
    metrics: Metrics
    config: str
    versions: str


@dataclass(frozen=True)
class Runs:
    """Finished runs by kind, each in the order in which they were named."""

    distillations: list[Folder[Distill]]
    finetunings: list[Folder[Finetune]]
    quantizations: list[Folder[Quantize]]


def read_runs(paths: Sequence[str | Path]) -> Runs:
    """Read finished run folders; one that is named twice counts once.

    Raises:
        RunError: No folder at all, or one without a whole ``metrics.json`` of one of the three kinds.
    """
    if not paths:
        raise RunError("runs", expected="at least one run folder", got="none", remedy="Name a finished run.")
    runs = Runs([], [], [])
    for path in {Path(path).resolve(): Path(path) for path in paths}.values():
        metrics, config, versions = _metrics(path), _text(path / CONFIG), _text(path / VERSIONS)
        if isinstance(metrics, Distill):
            runs.distillations.append(Folder(path, metrics, config, versions))
        elif isinstance(metrics, Finetune):
            runs.finetunings.append(Folder(path, metrics, config, versions))
        else:
            runs.quantizations.append(Folder(path, metrics, config, versions))
    return runs


def _metrics(path: Path) -> AnyMetrics:
    try:
        return _METRICS.validate_python(Run(path).metrics())
    except ValidationError as error:
        first = error.errors()[0]
        fault = ": ".join(filter(None, (".".join(str(part) for part in first["loc"][1:]), first["msg"])))
    raise RunError(
        str(path),
        expected=f"a {METRICS} of kind 'distill', 'finetune' or 'quantize'",
        got=fault,
        remedy="Repeat the run, or leave this folder out.",
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "not recorded"
