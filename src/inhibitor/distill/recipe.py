"""What a distillation run is asked: a teacher, text, and stages in order."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from inhibitor.config import Config
from inhibitor.data.corpus import TextConfig
from inhibitor.errors import ConfigError
from inhibitor.models.config import InhibitorConfig


class CalibrationConfig(Config):
    """How γ, η, δ and ρ are fitted before any training.

    Args:
        sequences: Blocks of text to fit on.
        lengths: Each block is also cut to these lengths, so that ρ can be told from η; those of the text's
            max_length and above are left out.
    """

    sequences: int = Field(default=8, gt=0)
    lengths: tuple[int, ...] = (16, 48)


class StageConfig(Config):
    """What every stage is asked.

    Args:
        tokens: Tokens of text to train on; in the layer-wise stage, for each layer.
        batch_size: Blocks per step and device.
        gradient_accumulation: Steps whose gradients are added up before the weights change.
        learning_rate: The peak of the cosine schedule.
        inhibitor_learning_rate: That of γ, η, δ and ρ, which are few and of order one.
        warmup_ratio: Share of the steps in which the rate rises.
        weight_decay: AdamW's, on projection and feed-forward matrices.
        bf16: Whether matrix products run in bfloat16; the operator accumulates in float32 all the same.
        checkpoints: How often the stage's state is saved, so that a killed run goes on from there.
    """

    tokens: int = Field(gt=0)
    batch_size: int = Field(default=16, gt=0)
    gradient_accumulation: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    inhibitor_learning_rate: float = Field(default=5e-3, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    bf16: bool = False
    checkpoints: int = Field(default=5, ge=1)


class LayerwiseStage(StageConfig):
    """Bottom-up, one layer at a time: its Q, K, V and inhibitor parameters, MSE of the context (METHOD, E1 stage 1)."""

    kind: Literal["layerwise"] = "layerwise"


class FullStage(StageConfig):
    """Everything unfrozen, MSE of the hidden states of all layers (METHOD, E1 stage 2)."""

    kind: Literal["full"] = "full"
    learning_rate: float = Field(default=3e-4, gt=0)


Stage = Annotated[LayerwiseStage | FullStage, Field(discriminator="kind")]


class DistillConfig(Config):
    """A task-agnostic distillation (E1).

    Args:
        teacher: A local folder, a hub id or ``"minilm"``.
        output: The run's folder.
        text: Unlabelled text.
        inhibitor: The attention that the student gets.
        calibration: How its parameters are fitted first; None leaves them at their initial values.
        stages: Training, in order.
        validation_sequences: Blocks of held-out text on which every state of the student is measured.
        example: The sentence of the report's attention picture.
        seed: Of the order of the text.
    """

    teacher: str
    output: Path
    text: TextConfig
    inhibitor: InhibitorConfig = InhibitorConfig()
    calibration: CalibrationConfig | None = CalibrationConfig()
    stages: tuple[Stage, ...] = Field(min_length=1)
    validation_sequences: int = Field(default=64, gt=0)
    example: str = "The old lighthouse keeper, who had never left the island, wrote a letter to his sister."
    seed: int = 0

    @model_validator(mode="after")
    def _enough_tokens(self) -> "DistillConfig":
        for stage in self.stages:
            step = stage.batch_size * stage.gradient_accumulation * self.text.max_length
            if stage.tokens < step:
                raise ConfigError(
                    f"tokens of the {stage.kind} stage",
                    expected=f"at least {step}, those of one step",
                    got=str(stage.tokens),
                    remedy="Give it more tokens, or a smaller batch_size.",
                )
        return self
