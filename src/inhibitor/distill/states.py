"""The student between stages, on disk: weights and progress together, sealed, so that a run goes on from the newest."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.checkpoints import ASIDE, DAMAGED, Damaged, check, seal, sweep
from inhibitor.errors import RunError, notice
from inhibitor.runs import write_text

PROGRESS, WEIGHTS = "progress.json", "model.safetensors"


class States:
    """The folder ``stages`` of a run: one folder for each state, which gets its name when it is whole and on the disk.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        name: str,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Mapping[str, Any],
        keep: Collection[str],
    ) -> None:
        """Write a state, then delete all others but those to keep; ``RunError`` where it cannot be written."""
        sweep(self.folder)
        aside = self.folder / ASIDE
        try:
            student.save_pretrained(aside / name)
            tokenizer.save_pretrained(aside / name)
            write_text(aside / name / PROGRESS, json.dumps(progress, indent=1))
            seal(aside / name, self.folder / name, {"state": name})
        except (OSError, SafetensorError) as error:
            sweep(self.folder)
            raise RunError(
                str(self.folder),
                expected=f"room for the state {name!r}",
                got=f"{type(error).__name__}: {error}",
                remedy="Free some space, then give the same command again: it goes on from the state before.",
            ) from error
        for other in self._states():
            if other.name not in (name, *keep):
                shutil.rmtree(other)
        sweep(self.folder)

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """The name and progress of the newest whole state; a damaged one is named and kept as ``damaged-…``."""
        whole: dict[str, dict[str, Any]] = {}
        damaged: list[str] = []
        for path in self._states():
            try:
                check(path)
            except Damaged as fault:
                kept = path.with_name(DAMAGED + path.name)
                shutil.rmtree(kept, ignore_errors=True)
                path.rename(kept)
                damaged.append(f"{path} is damaged: {fault}. It is kept as {kept.name}")
            else:
                whole[path.name] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        newest = max(whole.items(), key=lambda state: state[1]["saves"], default=None)
        for said in damaged:
            notice(f"{said}; the run {f'goes on from {newest[0]!r}' if newest else 'begins anew'}.")
        return newest

    def _states(self) -> list[Path]:
        """The folders of states, whole or not."""
        found = sorted(self.folder.glob("*"))
        return [path for path in found if path.is_dir() and not path.name.startswith((ASIDE, DAMAGED))]

    def load(self, name: str, student: PreTrainedModel) -> None:
        """Put the weights of a state into a student."""
        load_model(student, self.folder / name / WEIGHTS)

    def publish(self, name: str, folder: Path) -> None:
        """Copy a state's model to ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / name, folder, ignore=shutil.ignore_patterns(PROGRESS, "manifest.json"))
