"""What transformers' ``Trainer`` leaves to be desired: one quiet bar, a stop at the first NaN, whole checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from inhibitor.errors import RunError


class FiniteTrainer(Trainer):  # type: ignore[misc]
    """A trainer that stops at the first loss or gradient that is not finite, before it reaches the weights.

    Args:
        title: What its progress bar says.
        **kwargs: As for ``Trainer``.
    """

    def __init__(self, *, title: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(_Bar(title))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; raises ``RunError`` naming the step and the tensor."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        if not torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients.values())):
            broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            raise RunError(
                f"step {self.state.global_step + 1}",
                expected="a finite loss and finite gradients",
                got=f"the loss {loss.item()}"
                + (f" and a gradient of {broken[0]} that is not finite" if broken else ""),
                remedy="Lower the learning rate, or train without bf16. The last checkpoint is kept.",
            )
        return loss


class _Bar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar with a title, and the loss on it instead of a line per log."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


def processes() -> PartialState:
    """The processes of this run: one, or those that ``accelerate launch`` or ``torchrun`` started."""
    return PartialState(cpu=not torch.accelerator.is_available())


def on_this_machine() -> dict[str, Any]:
    """Training arguments that depend on the machine and on nothing a user asked for."""
    accelerated = torch.accelerator.is_available()
    return {
        "use_cpu": not accelerated,  # bfloat16 is refused on a CPU that was not asked for
        "dataloader_pin_memory": accelerated,
        "disable_tqdm": False,  # or a quiet log level would take the bar away
        "report_to": "none",
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a trainer's folder; those whose saving was interrupted are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the trainer writes it last
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None
