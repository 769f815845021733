"""Trackers that follow a run: TensorBoard in the run's folder, Trackio and Weights & Biases where they keep theirs."""

import importlib
import importlib.util
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.integrations import TensorBoardCallback

from inhibitor.errors import ConfigError
from inhibitor.runs import write_text

PROJECT = "inhibitor"
TENSORBOARD = "tensorboard"


def check(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: With the command that installs the first of them.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                "report_to",
                expected="trackers that are installed",
                got=tracker,
                remedy=f"pip install 'inhibitor-attention[{tracker}]', or leave it out.",
            )


def following(trackers: Sequence[str], run: Path, title: str) -> list[TrainerCallback]:
    """What a trainer calls for each tracker; of several processes only the first is followed.

    Args:
        trackers: Installed ones.
        run: The run's folder.
        title: What of the run is trained; its curve has this name, and goes on where training does.
    """
    return [
        _TensorBoard(run / TENSORBOARD / title) if name == TENSORBOARD else _Service(name, run, title)
        for name in trackers
    ]


class _TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """Events in a folder that stays when the checkpoints go."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # steps that were logged after the last checkpoint are taken back
            self.tb_writer = self._SummaryWriter(str(self.folder), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class _Service(TrainerCallback):  # type: ignore[misc]
    """Trackio or Weights & Biases, which share their calls; settings of the user's own environment hold."""

    def __init__(self, name: str, run: Path, title: str) -> None:
        self.name, self.run, self.title = name, run, title
        self.service: Any = importlib.import_module(name)

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        known = Path(args.output_dir) / f"{self.name}.id"  # lives as long as the checkpoints
        resumed = known.is_file()
        if not resumed:
            write_text(known, secrets.token_hex(8))
        options: dict[str, Any] = {"resume": "allow" if resumed else "never"}
        if self.name == "wandb":
            options |= {"id": known.read_text(encoding="utf-8"), "dir": str(self.run), "reinit": "finish_previous"}
        self.service.init(
            project=PROJECT, name=f"{self.run.resolve().name} {self.title}", config=args.to_dict(), **options
        )

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.service.log({f"train/{key}": value for key, value in logs.items()}, step=state.global_step)

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.service.finish()
