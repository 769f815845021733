"""The stages of a recipe: what is trained, on which losses; and the trainer that runs them."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from inhibitor.distill import losses
from inhibitor.distill.observe import LOGITS, observe, on_teacher
from inhibitor.distill.recipe import AnyStage, JointStage, LayerwiseStage, TaskStage, Tracker, WholeModel
from inhibitor.distill.rows import Rows
from inhibitor.distill.teacher import Teacher
from inhibitor.distill.trackers import following
from inhibitor.errors import ModelError
from inhibitor.models.attention import inhibitor_layers
from inhibitor.models.families import attention_modules, family_of, layer_modules, output_modules
from inhibitor.training import FiniteTrainer, fit, on_this_machine, processes

LOGGED = 50  # times in one training, if it has steps enough
TRACED = 4  # steps between two looks at the traces, at least: each takes a good part of a step


class Objective(nn.Module):
    """A student together with the losses it is trained on, as one module, so that data parallelism wraps both.

    The teacher is no part of the module: it is not trained, moved or saved with it. The student stays in evaluation
    mode unless the stage asks for dropout, which would be noise on a target that has none.

    Args:
        student: The model to train.
        teacher: What gives the targets.
        stage: The stage's kind decides what is trained, its losses what is compared.
        layers: The teacher's layer for each of the student's.
        layer: The one layer to train, in the layer-wise stage.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        stage: AnyStage,
        layers: Mapping[int, int],
        layer: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.stage, self.layers = student, teacher, stage, dict(layers)
        self.trained = list(inhibitor_layers(student)) if layer is None else [layer]
        self.forced = isinstance(stage, JointStage) or (isinstance(stage, LayerwiseStage) and stage.inputs == "teacher")
        names = {
            "context": [f"context-{index}" for index in self.trained],
            "output": [f"output-{index}" for index in self.trained],
            "hidden": [f"hidden-{index + 1}" for index in self.layers],
        }
        self.compared = {loss: names.get(loss.partition("_")[0], [LOGITS]) for loss in stage.losses}
        self.temperature: float = getattr(stage, "temperature", 1.0)
        self.names = {name for names in self.compared.values() for name in names}
        self.projections = nn.ModuleDict()
        ours, theirs = student.config.hidden_size, teacher.model.config.hidden_size
        if isinstance(stage, WholeModel) and stage.projection and ours != theirs:
            for name in self.names.intersection(names["hidden"]):
                projection = nn.Linear(ours, theirs, bias=False, device=student.device)
                nn.init.eye_(projection.weight)
                self.projections[name] = projection
        self.train()

    def train(self, mode: bool = True) -> "Objective":
        """Switch what the stage wants switched: nothing, or dropout, or gradient checkpointing."""
        super().train(mode)
        self.student.train(mode and isinstance(self.stage, TaskStage) and self.stage.dropout)
        if isinstance(self.stage, WholeModel) and self.stage.gradient_checkpointing:
            for layer in layer_modules(self.student):
                layer.training = mode  # of the layer itself, which decides on checkpointing, and of no dropout in it
        return self

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters to train."""
        if isinstance(self.stage, WholeModel):
            kept = set() if getattr(self.stage, "train_embeddings", True) else self._shared()
            yield from (parameter for parameter in self.parameters() if parameter not in kept)
            return
        modules = attention_modules(self.student)
        for layer in self.trained:
            for name in (*family_of(self.student).projections, "inhibitor"):
                yield from modules[layer].get_submodule(name).parameters()
            if any(loss.startswith("output") for loss in self.compared):
                yield from output_modules(self.student)[layer].parameters()

    def _shared(self) -> set[nn.Parameter]:
        """The embeddings that are the teacher's, to the last bit."""
        theirs = dict(self.teacher.model.base_model.embeddings.named_parameters())
        return {
            parameter
            for name, parameter in self.student.base_model.embeddings.named_parameters()
            if name in theirs and torch.equal(parameter, theirs[name])
        }

    def unfreeze(self) -> None:
        """Let gradients reach the parameters of this stage and no others."""
        self.student.requires_grad_(False)
        for parameter in self.parts():
            parameter.requires_grad_(True)

    def targets(self) -> set[str]:
        """What is needed of the teacher, in the teacher's names."""
        wanted = {on_teacher(name, self.layers) for name in self.names}
        return wanted | {f"input-{self.layers[layer]}" for layer in self.trained if self.forced}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The weighted sum of the stage's losses as ``{"loss": …}``.

        Args:
            **batch: The teacher's inputs, ``labels`` where there are any, and the rows' numbers for its cache.
        """
        targets = self.teacher.targets(batch, self.targets())
        forced = {layer: targets[f"input-{self.layers[layer]}"] for layer in self.trained if self.forced}
        found = observe(self.student, batch, self.names, forced=forced)
        terms = []
        for loss, weight in self.stage.losses.items():
            for name in self.compared[loss]:
                state = self.projections[name](found[name]) if name in self.projections else found[name]
                target = targets[on_teacher(name, self.layers)]
                terms.append(weight * self._loss(loss, state.float(), target.float(), batch))
        return {"loss": torch.stack(terms).sum()}

    def _loss(self, loss: str, student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        match loss:
            case "context_mse" | "output_mse" | "hidden_mse":
                return losses.mse(student, teacher, mask)
            case "context_relative" | "output_relative":
                return losses.relative(student, teacher, mask)
            case "hidden_cosine":
                return losses.cosine(student, teacher, mask)
            case "masked_lm":
                return losses.masked_lm(student, teacher, mask, self.temperature)
            case "soft_labels" if student.shape[-1] == 1:
                return losses.predictions_mse(student, teacher)
            case "soft_labels":
                return losses.soft_probabilities(student, teacher, self.temperature)
            case _:
                return losses.hard_labels(student, batch["labels"])


def units(stage: AnyStage, student: PreTrainedModel) -> list[int | None]:
    """What a stage trains one after another: each converted layer by its index, or None, all at once."""
    return list(inhibitor_layers(student)) if isinstance(stage, LayerwiseStage) else [None]


@torch.no_grad()
def rehearse(objective: Objective, batch: Mapping[str, Tensor]) -> None:
    """Compute every loss of a stage once, so that what does not fit is found before the first step.

    Raises:
        ModelError: Shapes differ, or a loss is not finite.
    """
    loss = objective.eval()(**batch)["loss"]
    if not torch.isfinite(loss):
        raise ModelError(
            f"the {objective.stage.kind} stage",
            expected="a finite loss on its first row",
            got=str(loss.item()),
            remedy="Look for NaN or infinity in the weights of teacher and student.",
        )


def train(
    objective: Objective,
    rows: Rows,
    *,
    seed: int,
    folder: Path,
    title: str,
    report_to: Sequence[Tracker] = (),
    trace: Callable[[], dict[str, float]] = dict,
) -> FiniteTrainer:
    """Train one objective to its end, or go on from the last checkpoint in ``folder``.

    Args:
        objective: The student is changed in place.
        rows: What to train on.
        seed: Of the order of the rows, and of dropout.
        folder: For checkpoints, two below the run's.
        title: What the progress bar says, and the trackers.
        report_to: Trackers that follow.
        trace: What to log beside the loss.

    Returns:
        The trainer, for what it has logged and counted.
    """
    stage = objective.stage
    steps = rows.steps(stage)
    length = {"num_train_epochs": stage.epochs} if isinstance(stage, TaskStage) else {"max_steps": steps}
    objective.unfreeze()
    parted = parse_flag_from_env("ACCELERATE_USE_FSDP")
    before = copy.deepcopy(objective.student) if parted else None

    def build(micro_batch: int, accumulation: int) -> FiniteTrainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=stage.warmup_ratio,
            weight_decay=stage.weight_decay,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            train_sampling_strategy="group_by_length" if rows.numbered else "random",
            accelerator_config={"dispatch_batches": False},  # batches of blocks need not have one shape
            logging_steps=max(1, steps // LOGGED),
            save_steps=max(1, -(-steps // stage.checkpoints)),
            **length,
            **on_this_machine(bf16=stage.bf16),
        )
        return DistillationTrainer(
            objective=objective,
            args=arguments,
            rows=rows,
            title=title,
            tokens_per_step=rows.tokens * micro_batch * accumulation * processes().num_processes,
            trace=trace,
            callbacks=following(report_to, folder.parents[1], title),
        )

    with _switched(objective):
        trainer = fit(build, folder, stage.batch_size, stage.gradient_accumulation)
    if before is not None:
        _join(objective.student, before)
    return trainer


def _join(student: PreTrainedModel, before: PreTrainedModel) -> None:
    """Make a student whole that FSDP parted: its weights, in the modules of a copy from before."""
    weights = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in student.state_dict().items()
    }
    before.load_state_dict(weights)
    student.__dict__ = before.__dict__


@contextmanager
def _switched(objective: Objective) -> Iterator[None]:
    """Gradient checkpointing and compiled layers, while the stage runs."""
    stage, student, teacher = objective.stage, objective.student, objective.teacher.model
    compiled = [*layer_modules(student), *layer_modules(teacher)] if getattr(stage, "compile", False) else []
    for layer in compiled:
        layer.compile()
    if getattr(stage, "gradient_checkpointing", False):
        student.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        student.activation_checkpointing_disable()
        for layer in compiled:
            layer._compiled_call_impl = None  # what compile() sets, and nothing public takes back


def is_traced(step: int, logging_steps: int) -> bool:
    """Whether the traces are taken at a step that is logged: at the first, and then at least ``TRACED`` steps apart."""
    return (step // logging_steps - 1) % math.ceil(TRACED / logging_steps) == 0


class DistillationTrainer(FiniteTrainer):
    """The trainer of a stage: γ, η, δ, ρ, τ and u have a learning rate of their own, and no weight decay.

    Args:
        objective: What to train.
        rows: On what.
        trace: What to log beside the loss.
        **kwargs: As for ``FiniteTrainer``.
    """

    def __init__(
        self, *, objective: Objective, rows: Rows, trace: Callable[[], dict[str, float]] = dict, **kwargs: Any
    ) -> None:
        self.stage, self.trace = objective.stage, trace
        super().__init__(model=objective, train_dataset=rows.dataset, data_collator=rows.collate, **kwargs)

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
            ],
            fused=True,
        )
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the traces to what is logged of a step, if the last ones are not too near."""
        if "loss" in logs and is_traced(self.state.global_step, self.args.logging_steps):
            if self.is_fsdp_enabled:  # the traces run the student alone, without what FSDP does around the objective
                self.model_wrapped.unshard()
            logs = {**logs, **self.trace()}
            if self.is_fsdp_enabled:
                self.model_wrapped.reshard()
        super().log(logs, *args, **kwargs)
