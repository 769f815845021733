"""What a distillation run is asked: a teacher, a student, data, and stages in order."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from inhibitor.config import Config, ModelName, Seed, UserPath
from inhibitor.data.corpus import TextConfig
from inhibitor.data.files import OnBadRow
from inhibitor.errors import ConfigError
from inhibitor.models.config import InhibitorConfig

Tracker = Literal["tensorboard", "trackio", "wandb"]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ContextLoss = Literal["context_mse", "context_relative", "output_mse", "output_relative"]
HiddenLoss = Literal["hidden_mse", "hidden_cosine"]
TaskLoss = Literal["soft_labels", "hard_labels"]


class CalibrationConfig(Config):
    """How γ, η, δ, ρ and τ are fitted before any training.

    Args:
        sequences: Blocks of text, or rows of the task, to fit on.
        lengths: Each block is also cut to these lengths, so that ρ can be told from η; those of the text's
            max_length and above are left out.
    """

    sequences: int = Field(default=8, gt=0)
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = (16, 48)


class IntegersConfig(Config):
    """How a stage puts the student on integers and trains it for them.

    The student's attention becomes the integer operator, with gradients straight through its roundings, and its steps
    are learned. Once in integers, it stays so in the stages that follow.

    Args:
        attention: Bits of query, key, value and inhibition.
        linear: Whether the linear layers round their inputs to 8 bits too, and their weights.
        weights: Bits of those weights, 8 or 7.
        embeddings: Whether embedding tables are rounded to 8 bits too.
        sequences: Blocks of text, or rows of the task, that the first steps are found on.
    """

    attention: Literal[8, 6, 4] = 8
    linear: bool = True
    weights: Literal[8, 7] = 8
    embeddings: bool = True
    sequences: int = Field(default=256, gt=0)


class StageConfig(Config):
    """What every stage is asked.

    Args:
        batch_size: Blocks or rows per step and process.
        gradient_accumulation: Steps whose gradients are added up before the weights change.
        learning_rate: The peak of the cosine schedule.
        inhibitor_learning_rate: That of γ, η, δ, ρ, τ and u, which are few and of order one.
        warmup_ratio: Share of the steps in which the rate rises.
        weight_decay: AdamW's, on every matrix that is trained, embeddings too.
        bf16: Whether matrix products run in bfloat16; the operator accumulates in float32 all the same.
        checkpoints: How often the stage's state is saved, so that a killed run goes on from there.
    """

    kind: str
    batch_size: int = Field(default=16, gt=0)
    gradient_accumulation: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    inhibitor_learning_rate: float = Field(default=5e-3, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    bf16: bool = False
    checkpoints: int = Field(default=5, ge=1)


class TextStage(StageConfig):
    """A stage on the recipe's text, or, where it has none, on the rows of its task.

    Args:
        tokens: How many to train on; in the layer-wise stage, for each layer.
        min_length: Tokens of the shortest blocks, as in the text, for this stage alone; the text's own where None.
    """

    tokens: int = Field(gt=0)
    min_length: int | None = Field(default=None, ge=8)


class WholeModel(StageConfig):
    """A stage that trains everything.

    Args:
        projection: Whether hidden states of another size than the teacher's are projected to it, by a learned matrix
            for each layer that is thrown away afterwards.
        gradient_checkpointing: Whether the backward pass computes each layer anew instead of keeping it in memory.
        compile: Whether the layers of teacher and student go through ``torch.compile``.
        integers: Quantisation-aware training; None leaves the student's numbers as they are.
    """

    projection: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    integers: IntegersConfig | None = None


class LayerwiseStage(TextStage):
    """One converted layer after another, bottom-up: its Q, K, V and γ, η, δ, ρ, τ, u (METHOD, E1 stage 1).

    Where outputs are compared instead of contexts, the output projection is trained with them.

    Args:
        inputs: Whether the layer is fed by the student's own lower layers, as in the paper, or by the teacher's.
        losses: Weight of each loss.
    """

    kind: Literal["layerwise"] = "layerwise"
    inputs: Literal["student", "teacher"] = "student"
    losses: dict[ContextLoss, Weight] = Field(default={"context_mse": 1.0}, min_length=1)


class JointStage(TextStage):
    """Attention transfer of all converted layers in one pass: each is fed by the teacher's lower layers.

    The teacher runs once up to the last converted layer; of the student, only the attention runs.

    Args:
        losses: Weight of each loss; summed over layers.
    """

    kind: Literal["joint"] = "joint"
    losses: dict[ContextLoss, Weight] = Field(default={"context_mse": 1.0}, min_length=1)


class FullStage(TextStage, WholeModel):
    """The whole student, compared with the teacher layer by layer (METHOD, E1 stage 2).

    Args:
        train_embeddings: Whether embeddings that are the teacher's, to the last bit, are trained too, as in the paper.
            They need not change, and little text would move rare words by noise.
        losses: Weight of each loss; summed over layers.
    """

    kind: Literal["full"] = "full"
    train_embeddings: bool = False
    learning_rate: float = Field(default=3e-4, gt=0)
    losses: dict[ContextLoss | HiddenLoss, Weight] = Field(default={"hidden_mse": 1.0}, min_length=1)


class LogitsStage(TextStage, WholeModel):
    """The whole student, on masked text, compared with the teacher's masked-language-model head.

    Args:
        train_embeddings: As in the ``full`` stage.
        losses: Weight of each loss; ``masked_lm`` is the KL divergence over the vocabulary at every real token.
        temperature: Of ``masked_lm``.
        mask_probability: Share of the tokens that are masked, by BERT's rule; the same ones whenever a block comes by.
    """

    kind: Literal["logits"] = "logits"
    train_embeddings: bool = False
    learning_rate: float = Field(default=3e-4, gt=0)
    losses: dict[ContextLoss | HiddenLoss | Literal["masked_lm"], Weight] = Field(
        default={"masked_lm": 1.0}, min_length=1
    )
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    mask_probability: float = Field(default=0.15, gt=0, lt=1)


class TaskStage(WholeModel):
    """Task-specific distillation from a teacher fine-tuned on the task (METHOD, E2).

    Args:
        task: The task's name.
        data: A folder with the data, or None for the Hugging Face hub.
        on_bad_row: Whether a bad row stops the run or is left out.
        held_out: Share of the training split that is kept from training and measured on, in the place of the
            evaluation splits, which are not even read; to choose hyper-parameters by.
        epochs: Passes over the training split.
        max_length: Tokens a row may have; the task's default where None.
        losses: Weight of each loss: ``soft_labels`` is the KL divergence of soft probabilities, or the squared error
            of the predictions where the task is a regression; ``hard_labels`` is the task's own loss.
        temperature: Of ``soft_labels``.
        floor: The least score of the teacher's, in points (0 to 100) of the task's first metric; below, nothing starts.
        dropout: Whether the student is trained with its dropout.
    """

    kind: Literal["task"] = "task"
    task: str
    data: UserPath | None = None
    on_bad_row: OnBadRow = "stop"
    held_out: float | None = Field(default=None, gt=0, lt=1)
    epochs: int = Field(default=3, gt=0)
    max_length: int | None = Field(default=None, ge=8)
    learning_rate: float = Field(default=5e-5, gt=0)
    losses: dict[ContextLoss | HiddenLoss | TaskLoss, Weight] = Field(
        default={"soft_labels": 0.5, "hidden_mse": 0.5}, min_length=1
    )
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    floor: float | None = Field(default=None, allow_inf_nan=False)
    dropout: bool = True


Stage = Annotated[LayerwiseStage | JointStage | FullStage | LogitsStage | TaskStage, Field(discriminator="kind")]
AnyStage = LayerwiseStage | JointStage | FullStage | LogitsStage | TaskStage


class DistillConfig(Config):
    """A distillation: E1 on text, E2 on a task, or one after the other.

    Args:
        teacher: A local folder, a hub id or ``"minilm"``: a softmax model, or a student that was made before. With a
            ``task`` stage, a classifier fine-tuned on it; with a ``logits`` stage, a masked language model.
        student: The model to start from: an inhibitor student, or a softmax model to convert. None takes the
            teacher's own weights.
        origin: With a ``task`` stage, the pretrained model that the teacher was fine-tuned from and ``student`` was
            distilled from. What fine-tuning changed in the teacher is added to the student before anything else (task
            vectors, arXiv 2212.04089). None leaves the student as it is.
        layer_map: The teacher's layer for each of the student's; None pairs them one to one. Where ``student`` is
            None, the student gets just these layers.
        output: The run's folder.
        text: Unlabelled text; where None, every stage reads the task's rows.
        inhibitor: The attention that a student to be converted gets, and in which layers.
        calibration: How its parameters are fitted first; None leaves them at their initial values.
        stages: Training, in order.
        cache: A folder for the teacher's outputs in bfloat16, so that a second epoch, layer, stage or student need
            not compute them. Text must then be a fixed number of blocks.
        validation_sequences: Blocks of held-out text, of all lengths that some stage trains on, or rows of the task's
            evaluation split, on which every state of the student is measured.
        example: The sentence of the report's attention picture.
        seed: Of the order of the data, the masking and the dropout.
        report_to: Trackers that follow the run, of those installed.
        carbon_intensity: Grams of CO₂ per kWh where the run takes place, to turn measured energy into CO₂.
    """

    teacher: ModelName
    student: ModelName | None = None
    origin: ModelName | None = None
    layer_map: tuple[int, ...] | None = Field(default=None, min_length=1)
    output: UserPath
    text: TextConfig | None = None
    inhibitor: InhibitorConfig = InhibitorConfig()
    calibration: CalibrationConfig | None = CalibrationConfig()
    stages: tuple[Stage, ...] = Field(min_length=1)
    cache: UserPath | None = None
    validation_sequences: int = Field(default=64, gt=0)
    example: str = "The old lighthouse keeper, who had never left the island, wrote a letter to his sister."
    seed: Seed = 0
    report_to: tuple[Tracker, ...] = ()
    carbon_intensity: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @property
    def task(self) -> TaskStage | None:
        """The first task stage."""
        return next((stage for stage in self.stages if isinstance(stage, TaskStage)), None)

    def text_of(self, stage: StageConfig) -> TextConfig | None:
        """The text in the blocks that a stage asks for; None for one that reads a task's rows."""
        if self.text is None or not isinstance(stage, TextStage):
            return None
        shortest = {} if stage.min_length is None else {"min_length": stage.min_length}
        return TextConfig(**self.text.model_dump() | shortest)

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillConfig":
        for stage in self.stages:
            if isinstance(stage, TextStage):
                self._check_text(stage)
        self._check_origin()
        self._check_integers()
        kinds = {stage.kind for stage in self.stages}
        if {"logits", "task"} <= kinds:
            raise ConfigError(
                "stages",
                expected="stages that one teacher can teach",
                got="logits, for a masked language model, and task, for a classifier",
                remedy="Make two recipes, the second with the first one's model as student.",
            )
        tasks = [stage for stage in self.stages if isinstance(stage, TaskStage)]
        if len({(stage.task, stage.data, stage.on_bad_row, stage.held_out, stage.max_length) for stage in tasks}) > 1:
            raise ConfigError(
                "stages",
                expected="task stages of the same task, data, on_bad_row, held_out and max_length",
                got=f"{len(tasks)} that differ",
                remedy="Make one recipe for each, the later one with the first one's model as student.",
            )
        if self.cache is not None and self.text is not None and self.text.blocks is None:
            raise ConfigError(
                "cache",
                expected="text of a fixed number of blocks",
                got="text that streams without end",
                remedy="Set text.blocks, or leave the cache out.",
            )
        return self

    def _check_origin(self) -> None:
        if self.origin is None or (self.student is not None and self.task is not None and self.layer_map is None):
            return
        if self.layer_map is not None:
            expected, got = "layers that are the teacher's, one to one", f"layer_map {list(self.layer_map)}"
        else:
            expected = "a student that was distilled from it, and a task stage"
            got = "no student" if self.student is None else f"a {self.stages[0].kind} stage"
        raise ConfigError("origin", expected=expected, got=got, remedy="Leave origin out.")

    def _check_integers(self) -> None:
        whole = [stage for stage in self.stages if isinstance(stage, WholeModel)]
        if any(stage.integers is not None and stage.compile for stage in whole):
            raise ConfigError(
                "integers", expected="a stage without compile", got="compile: true", remedy="Leave one of them out."
            )
        kinds = (stage.integers.model_dump(exclude={"sequences"}) for stage in whole if stage.integers is not None)
        if len({tuple(kind.values()) for kind in kinds}) > 1:
            raise ConfigError(
                "integers",
                expected="the same parts and bits in every stage",
                got="stages that differ",
                remedy="A student on integers stays on them: make two recipes.",
            )

    def _check_text(self, stage: TextStage) -> None:
        if self.text is None:
            if self.task is None:
                expected, remedy = f"text for the {stage.kind} stage, or a task stage", "Name files or a dataset."
                raise ConfigError("text", expected=expected, got="neither", remedy=remedy)
            if stage.min_length is not None:
                expected, got = "None, for the rows of a task are never cut", str(stage.min_length)
                raise ConfigError(
                    f"min_length of the {stage.kind} stage", expected=expected, got=got, remedy="Leave it out."
                )
            return
        self.text_of(stage)  # which is checked as it is made
        step = stage.batch_size * stage.gradient_accumulation * self.text.max_length
        if stage.tokens < step:
            raise ConfigError(
                f"tokens of the {stage.kind} stage",
                expected=f"at least {step}, those of one step",
                got=str(stage.tokens),
                remedy="Give it more tokens, or a smaller batch_size.",
            )
