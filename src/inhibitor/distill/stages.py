"""The stages of a recipe: what is trained, on which loss; and the trainer that runs them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from inhibitor.distill.losses import context_mse, hidden_states_mse
from inhibitor.distill.recipe import FullStage, LayerwiseStage, StageConfig
from inhibitor.models.attention import contexts, inhibitor_layers
from inhibitor.models.families import attention_modules, family_of
from inhibitor.training import FiniteTrainer, last_checkpoint, on_this_machine, processes


class Objective(nn.Module):
    """A student together with the loss it is trained on, as one module, so that data parallelism wraps both.

    The teacher is no part of the module: it is not trained, moved or saved with it. The student stays in evaluation
    mode: dropout would be noise on a target that has none.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student = student.eval()
        self._teacher = (teacher.eval(),)

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen model that sets the targets."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> "Objective":
        """Leave the student in evaluation mode."""
        return self

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters to train."""
        raise NotImplementedError

    def unfreeze(self) -> None:
        """Let gradients reach the parameters of this stage and no others."""
        self.student.requires_grad_(False)
        for parameter in self.parts():
            parameter.requires_grad_(True)


class LayerObjective(Objective):
    """One layer of the layer-wise stage. No layer above it is computed, in student or teacher."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, layer: int) -> None:
        super().__init__(student, teacher)
        self.layer = layer

    def parts(self) -> Iterator[nn.Parameter]:
        """The query, key and value projections and γ, η, δ, ρ of the layer."""
        module = attention_modules(self.student)[self.layer]
        for name in (*family_of(self.student).projections, "inhibitor"):
            yield from module.get_submodule(name).parameters()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """``{"loss": context_mse}``."""
        with torch.no_grad():
            target = contexts(self.teacher, inputs, last=self.layer)[-1].context
        context = contexts(self.student, inputs, last=self.layer)[-1].context
        return {"loss": context_mse(context.float(), target.float(), inputs["attention_mask"])}


class FullObjective(Objective):
    """The full-layer stage."""

    def parts(self) -> Iterator[nn.Parameter]:
        """All of them."""
        yield from self.student.parameters()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """``{"loss": hidden_states_mse}``, embeddings excluded."""
        with torch.no_grad():
            target = self.teacher(**inputs, output_hidden_states=True).hidden_states[1:]
        found = self.student(**inputs, output_hidden_states=True).hidden_states[1:]
        student, teacher = ([state.float() for state in states] for states in (found, target))
        return {"loss": hidden_states_mse(student, teacher, inputs["attention_mask"])}


def objectives(
    stage: LayerwiseStage | FullStage, student: PreTrainedModel, teacher: PreTrainedModel
) -> Iterator[tuple[int | None, Objective]]:
    """What a stage trains, in order: a layer's index and objective, or None and that of the whole model."""
    if isinstance(stage, LayerwiseStage):
        for layer in inhibitor_layers(student):
            yield layer, LayerObjective(student, teacher, layer)
    else:
        yield None, FullObjective(student, teacher)


def train(
    objective: Objective, stage: StageConfig, blocks: Any, block_length: int, seed: int, folder: Path, title: str
) -> list[dict[str, float]]:
    """Train one objective, or go on from the last checkpoint in ``folder``.

    Args:
        objective: The student is changed in place.
        stage: How long and how fast.
        blocks: A ``datasets.IterableDataset`` of ``input_ids`` and ``attention_mask``.
        block_length: Tokens of a block.
        seed: Of the trainer.
        folder: For checkpoints.
        title: What the progress bar says.

    Returns:
        The logged steps: ``{"step", "loss"}``.
    """
    objective.unfreeze()
    blocks_per_step = stage.batch_size * stage.gradient_accumulation * processes().num_processes
    steps = max(1, stage.tokens // (blocks_per_step * block_length))
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        bf16=stage.bf16,
        remove_unused_columns=False,
        logging_steps=max(1, steps // 50),
        save_steps=max(1, -(-steps // stage.checkpoints)),
        save_total_limit=1,
        **on_this_machine(),
    )
    trainer = DistillationTrainer(
        model=objective, args=arguments, train_dataset=blocks.with_format("torch"), stage=stage, title=title
    )
    objective.teacher.to(arguments.device)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]


class DistillationTrainer(FiniteTrainer):
    """The trainer of a stage: γ, η, δ and ρ have a learning rate of their own, and no weight decay."""

    def __init__(self, *, stage: StageConfig, **kwargs: Any) -> None:
        self.stage = stage
        super().__init__(**kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three groups: matrices, vectors, inhibitor parameters."""
        groups: Mapping[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "inhibitor": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = "inhibitor" if ".inhibitor." in name else "matrices" if parameter.dim() > 1 else "vectors"
                groups[kind].append(parameter)
        rate, decay = self.stage.learning_rate, self.stage.weight_decay
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups["matrices"], "lr": rate, "weight_decay": decay},
                {"params": groups["vectors"], "lr": rate, "weight_decay": 0.0},
                {"params": groups["inhibitor"], "lr": self.stage.inhibitor_learning_rate, "weight_decay": 0.0},
            ]
        )
        return self.optimizer
