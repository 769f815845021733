"""What transformers' ``Trainer`` leaves to be desired: a stop at the first NaN, and checkpoints that are whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from inhibitor.errors import RunError


class FiniteTrainer(Trainer):  # type: ignore[misc]
    """A trainer that stops at the first loss or gradient that is not finite, before it reaches the weights."""

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
