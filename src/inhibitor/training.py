"""Training to the end: from the last checkpoint, in smaller micro-batches where memory is short."""

import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from inhibitor.checkpoints import last_checkpoint
from inhibitor.errors import RunError, notice
from inhibitor.runs import write_text
from inhibitor.trainer import FiniteTrainer

MICRO_BATCH = "micro_batch.json"
BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")  # as torch.cpu.get_capabilities calls them


def fit(
    build: Callable[[int, int], FiniteTrainer], folder: Path, batch_size: int, gradient_accumulation: int = 1
) -> FiniteTrainer:
    """Train to the end: from the last checkpoint if there is one, in smaller micro-batches if memory is short.

    Each time memory runs out the micro-batch is divided by its smallest prime factor and the accumulation multiplied
    by it, so that an optimizer step still sees the same rows; ``folder`` remembers it for a run that is started again.

    Args:
        build: Makes a trainer that writes its checkpoints into ``folder``, of a micro-batch and an accumulation. It
            may return a trainer of the same model each time: weights are put back before it is trained again.
        folder: The trainer's ``output_dir``.
        batch_size: Rows of a micro-batch of one process, as asked for.
        gradient_accumulation: Micro-batches of one optimizer step, as asked for.

    Returns:
        The trainer that reached the end.

    Raises:
        RunError: As ``FiniteTrainer.train`` and ``last_checkpoint``; or memory is short for a single row; or for one
            of several processes, which have to be started again together.
        Interrupted: SIGTERM or Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    micro_batch, accumulation = _remembered(folder, batch_size, gradient_accumulation)
    start: dict[str, Tensor] = {}
    while True:
        with processes().main_process_first():
            checkpoint = last_checkpoint(folder)
        trainer = build(micro_batch, accumulation)
        trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
        if checkpoint is None and not start:
            start = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
        elif checkpoint is None:
            with torch.no_grad():
                for name, tensor in trained.items():
                    tensor.copy_(start[name])
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            return trainer
        trainer.model.zero_grad(set_to_none=True)
        trainer.accelerator.free_memory()
        del trainer, trained
        gc.collect()
        clear_device_cache()
        micro_batch, accumulation = _smaller(folder, micro_batch, accumulation, reason)


def _smaller(folder: Path, micro_batch: int, accumulation: int, reason: str) -> tuple[int, int]:
    """The next smaller micro-batch and its accumulation, remembered in ``folder``."""
    if micro_batch == 1:
        raise RunError(
            str(folder),
            expected="memory for a micro-batch of one row",
            got=reason,
            remedy="Shorten the rows (max_length), or use a machine with more memory.",
        )
    factor = next(number for number in range(2, micro_batch + 1) if micro_batch % number == 0)
    smaller = {"batch_size": micro_batch // factor, "gradient_accumulation": accumulation * factor}
    write_text(folder / MICRO_BATCH, json.dumps(smaller) + "\n")
    said = f"micro-batches of {smaller['batch_size']}, accumulation {smaller['gradient_accumulation']}"
    if processes().num_processes > 1:
        raise RunError(
            str(folder),
            expected=f"memory for a micro-batch of {micro_batch} rows in each process",
            got=reason,
            remedy=f"Give the same command again: it goes on with {said}.",
        )
    notice(f"out of memory ({reason}); going on with {said}: as many rows a step as before.")
    return smaller["batch_size"], smaller["gradient_accumulation"]


def _remembered(folder: Path, batch_size: int, gradient_accumulation: int) -> tuple[int, int]:
    """The micro-batch and accumulation that an earlier process got along with, else those asked for."""
    try:
        found = json.loads((folder / MICRO_BATCH).read_text(encoding="utf-8"))
        micro_batch, accumulation = int(found["batch_size"]), int(found["gradient_accumulation"])
    except (OSError, ValueError, TypeError, KeyError):
        return batch_size, gradient_accumulation
    if micro_batch < 1 or micro_batch * accumulation != batch_size * gradient_accumulation:
        return batch_size, gradient_accumulation
    return micro_batch, accumulation


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    said = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in said)


def processes() -> PartialState:
    """The processes of this run: one, or those that ``accelerate launch`` or ``torchrun`` started."""
    return PartialState(cpu=not torch.accelerator.is_available())


def on_this_machine(*, bf16: bool) -> dict[str, Any]:
    """Training arguments that depend on the machine; says where bfloat16 is asked of a CPU that can only imitate it."""
    accelerated = torch.accelerator.is_available()
    if bf16 and not accelerated:
        _tell_of_slow_bfloat16()
    return {
        "bf16": bf16,
        "use_cpu": not accelerated,  # bfloat16 is refused on a CPU that was not asked for
        "dataloader_pin_memory": accelerated,
        "dataloader_num_workers": int(accelerated),  # one, or a stream's order would depend on their number
        "disable_tqdm": False,  # or a quiet log level would take the bar away
        "report_to": "none",
    }


@functools.cache
def _tell_of_slow_bfloat16() -> None:
    """Say once that this processor has no instructions for bfloat16, if PyTorch knows it."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones do not tell
    if capabilities and not any(capabilities.get(name) for name in BFLOAT16):
        notice("this processor has no instructions for bfloat16: without bf16, training is faster.")
