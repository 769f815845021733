"""What transformers' ``Trainer`` leaves to be desired: whole checkpoints, exact resumption, an end said aloud."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import find_batch_size
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from inhibitor import checkpoints
from inhibitor.errors import Interrupted, RunError, notice

BROKEN_BATCH = "broken-batch"
SLACK = 1 << 20  # bytes of a checkpoint beside its tensors


class FiniteTrainer(Trainer):  # type: ignore[misc]
    """A trainer that stops at the first number that is not finite and whose checkpoints are whole or not there.

    A run that goes on from a checkpoint ends with the same bits as one that was never interrupted, also inside an
    epoch, as long as a collator that draws random numbers has a generator of its own. SIGTERM and Ctrl-C end training
    after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    A model's loss is a mean over the rows of its micro-batch; the step's is the mean over all of its rows. It does
    not evaluate: scores and errors are measured by ``inhibitor.evaluate`` and ``inhibitor.distill.measure``.

    Args:
        title: What its progress bar says.
        tokens_per_step: Tokens of one optimizer step over all processes, about, for the bar.
        **kwargs: As for ``Trainer``. The two newest checkpoints are kept, whatever ``save_total_limit`` says.

    Attributes:
        trained_seconds: Spent in steps and in waiting for their data, over all interruptions; without checkpoints and
            the first batch of an epoch.
        checkpoint_seconds: Spent in writing checkpoints, over all interruptions.
        checkpoint_count: How many these were.
    """

    def __init__(self, *, title: str, tokens_per_step: float | None = None, **kwargs: Any) -> None:
        arguments: Arguments = kwargs["args"]
        count = arguments.n_gpu
        if count > 1:  # Trainer would take them all by nn.DataParallel, with as many rows for each
            notice(f"one of {count} GPUs is used; torchrun --nproc_per_node {count} would use all of them.")
            arguments._n_gpu = 1
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # or Trainer takes each loss for a sum that the model has divided
        self.trained_seconds = self.checkpoint_seconds = 0.0
        self.checkpoint_count = 0
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Clock(self))
        self._bar = _Bar(title, tokens_per_step, self)
        if not self.args.disable_tqdm:
            self.add_callback(self._bar)
        self._folder = Path(self.args.output_dir)
        self._resumed: dict[str, Any] = {}  # what this process kept in the checkpoint that training goes on from
        self._epoch_random: dict[str, Any] = {}
        self._micro_batch = 0  # of the current step
        self._shares: list[float] = []  # of its rows in each micro-batch, relative to equal ones
        self._epoch_over = self._save_later = self._aside = False
        self._signals = _Signals(forgiving=self.args.world_size > 1)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train to the end.

        Args:
            resume_from_checkpoint: What ``last_checkpoint`` returned.
            **kwargs: As for ``Trainer.train``.

        Raises:
            RunError: A loss, gradient or weight is not finite, a checkpoint cannot be written, or it needs another
                number of processes.
            Interrupted: SIGTERM or Ctrl-C; the checkpoint is written.
        """
        if resume_from_checkpoint is not None:
            manifest, self._resumed = self._own_state(Path(resume_from_checkpoint))
            self.trained_seconds = self._resumed["trained_seconds"]
            self.checkpoint_seconds = self._resumed["checkpoint_seconds"] + manifest["seconds"]
            self.checkpoint_count = self._resumed["checkpoint_count"] + 1
        with self._signals:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self._bar.close()

    # Losses and what is not finite

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step; notes their rows."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [find_batch_size(batch) for batch in batches]
        self._shares = [count * len(rows) / sum(rows) for count in rows]
        return batches, items

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The micro-batch's loss, weighted such that each row of the step counts the same."""
        return super().compute_loss(model, inputs, *args, **kwargs) * self._shares[self._micro_batch - 1]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; raises ``RunError`` naming the step and the tensor."""
        self._micro_batch += 1
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        if not torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients.values())):
            broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            raise RunError(
                f"{self._process()}micro-batch {self._micro_batch} of step {self.state.global_step + 1}",
                expected="a finite loss and finite gradients",
                got=f"the loss {loss.item()}"
                + (f" and a gradient of {broken[0]} that is not finite" if broken else ""),
                remedy=f"Lower the learning rate, or train without bf16. {self._keep(inputs)}{self._last_good()}",
            )
        return loss

    def _check_weights(self) -> None:
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise RunError(
                    f"{self._process()}step {self.state.global_step}",
                    expected="finite weights",
                    got=f"{name} with NaN or infinity",
                    remedy=f"Lower the learning rate, or train without bf16. {self._last_good()}",
                )

    def _process(self) -> str:
        return f"process {self.args.process_index}, " if self.args.world_size > 1 else ""

    def _keep(self, inputs: dict[str, Any]) -> str:
        """Write a batch down to be looked at, and say where."""
        number = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        path = self._folder / f"{BROKEN_BATCH}{number}.safetensors"
        tensors = {name: value.detach().cpu().clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
        except (OSError, SafetensorError):
            return ""
        return f"The batch is in {path}. "

    def _last_good(self) -> str:
        last = next(iter(checkpoints.checkpoints(self._folder)), None)
        return f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder / checkpoints.ASIDE) if self._aside else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        self._check_weights()
        try:
            if self.args.should_save:
                checkpoints.sweep(self._folder)
                (self._folder / checkpoints.ASIDE).mkdir(parents=True)
                if not self._sharded:
                    self._check_space()
            self.accelerator.wait_for_everyone()
            self._aside = True
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(
                    self._folder,
                    self.state.global_step,
                    processes=self.args.world_size,
                    sharded=self._sharded,
                    since=started,
                )
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError) as error:
            checkpoints.sweep(self._folder)
            raise RunError(
                str(self._folder),
                expected=f"room for a checkpoint of step {self.state.global_step}",
                got=f"{type(error).__name__}: {error}",
                remedy=f"Make the folder writable, then give the same command again. {self._last_good()}",
            ) from error
        finally:
            self._aside = False
        self.checkpoint_seconds += time.perf_counter() - started
        self.checkpoint_count += 1

    @property
    def _sharded(self) -> bool:
        """Whether FSDP or DeepSpeed writes weights and optimizer in files of its own."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _check_space(self) -> None:
        states = (value for state in self.optimizer.state_dict()["state"].values() for value in state.values())
        tensors = [*self.model.state_dict().values(), *(value for value in states if isinstance(value, Tensor))]
        needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) + SLACK
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            checkpoints.sweep(self._folder)
            raise RunError(
                str(self._folder),
                expected=f"{needed} free bytes for a checkpoint of step {self.state.global_step}",
                got=f"{free}",
                remedy=f"Free some space, then give the same command again. {self._last_good()}",
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights alone: no pickled arguments; tensors that are shared once."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if state_dict is None:
                save_model(self._unwrapped(), str(folder / checkpoints.WEIGHTS))
            else:  # gathered by FSDP or DeepSpeed
                tensors = {name: tensor.contiguous().clone() for name, tensor in state_dict.items()}
                save_file(tensors, folder / checkpoints.WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(self._unwrapped(), Path(resume_from_checkpoint) / checkpoints.WEIGHTS)

    def _unwrapped(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            states = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            checkpoints.save_state(Path(output_dir) / checkpoints.OPTIMIZER, states)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            states = checkpoints.load_state(Path(checkpoint) / checkpoints.OPTIMIZER)
            self.optimizer.load_state_dict(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what each process has of its own: its random states, its part of the loss to be logged, its clock."""
        os.makedirs(output_dir, exist_ok=True)
        state = {
            "random": checkpoints.random_state(),
            "epoch_random": self._epoch_random,
            "loss": self._tr_loss,
            "logged_step": self._globalstep_last_logged,
            "trained_seconds": self.trained_seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "checkpoint_count": self.checkpoint_count,
        }
        checkpoints.save_state(Path(output_dir) / checkpoints.process_file(self.args.process_index), state)

    def _own_state(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint's manifest, and what this process kept in it."""
        manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text(encoding="utf-8"))
        if manifest["processes"] != self.args.world_size:
            raise RunError(
                str(checkpoint),
                expected=f"{manifest['processes']} processes, as those that wrote it",
                got=str(self.args.world_size),
                remedy="Start as many, or delete the checkpoints to begin this part of the run anew.",
            )
        own = checkpoints.load_state(checkpoint / checkpoints.process_file(self.args.process_index))
        return manifest, own

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on as the process went on: called when the batches that are skipped have been drawn."""
        if checkpoint is not None:
            checkpoints.set_random_state(self._resumed["random"])
            self._tr_loss.copy_(self._resumed["loss"])
            self._globalstep_last_logged = self._resumed["logged_step"]

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step, it would take one more
            self.control.should_training_stop = True
            return
        resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        if resumed:  # the order of an epoch is drawn at its beginning
            inside = kwargs["steps_trained_in_current_epoch"] > 0
            checkpoints.set_random_state(self._resumed["epoch_random" if inside else "random"])
        self._epoch_random = checkpoints.random_state()
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(
        self, loss: Tensor, norm: Any, model: nn.Module, trial: Any, epoch: int, *args: Any, **kwargs: Any
    ) -> None:
        """Called after each step and each epoch. After an epoch's last step, what is to be saved waits for its end.

        A checkpoint between two epochs so holds all that the end of an epoch adds to the log.
        """
        received = self._received()
        ends = self.control.should_training_stop or self.control.should_epoch_stop or self.state.epoch == epoch + 1
        save = bool(self.control.should_save or self._save_later or received)
        self._save_later = save and ends and not self._epoch_over
        self.control.should_save = save and not self._save_later
        super()._maybe_log_save_evaluate(loss, norm, model, trial, epoch, *args, **kwargs)
        if received and not self._save_later:
            raise Interrupted(received, str(self._folder / f"{checkpoints.PREFIX}{self.state.global_step}"))

    def _received(self) -> int:
        """The signal that ends training, 0 if none: one answer for all processes, which get it at different times."""
        if self.args.world_size == 1:
            return self._signals.received
        flag = torch.tensor(self._signals.received, device=self.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)


class _Signals:
    """While entered, SIGTERM and SIGINT are noted instead of obeyed; outside the main thread nothing changes.

    Args:
        forgiving: Whether a second SIGINT is noted too: of several processes each gets one from the terminal and
            another one from ``torchrun``.
    """

    def __init__(self, *, forgiving: bool) -> None:
        self.received = 0
        self._forgiving = forgiving
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT and not self._forgiving:
            raise KeyboardInterrupt
        if not self.received:
            self.received = int(number)
            name = signal.Signals(number).name
            said = f"\ninhibitor: {name}: a checkpoint is written after this step, then the run stops.\n"
            os.write(2, said.encode())  # sys.stderr may be in the middle of a write


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Counts the trainer's seconds and micro-batches, and knows whether an epoch is over."""

    def __init__(self, trainer: FiniteTrainer) -> None:
        self.trainer = trainer
        self.since: float | None = None

    def on_epoch_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = None
        self.trainer._epoch_over = False

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.since is None:
            self.since = time.perf_counter()
        self.trainer._micro_batch = 0

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, self.since = self.since, time.perf_counter()
        if before is not None:
            self.trainer.trained_seconds += self.since - before

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = None

    def on_epoch_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._epoch_over = True


class _Bar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar with a title, the loss and tokens a second on it; rates are those of this process's steps."""

    def __init__(self, title: str, tokens_per_step: float | None, trainer: FiniteTrainer) -> None:
        super().__init__()
        self.title, self.tokens_per_step, self.trainer = title, tokens_per_step, trainer
        self.training_bar: Any

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = self.first_step = state.global_step
        self.first_second = self.trainer.trained_seconds
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.set_description(self.title)

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4g}"}
            seconds = self.trainer.trained_seconds - self.first_second
            if self.tokens_per_step is not None and seconds:
                rate = (state.global_step - self.first_step) * self.tokens_per_step / seconds
                shown["tokens/s"] = f"{rate:,.0f}"
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """End the bar's line, however training ended."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
