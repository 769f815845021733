"""The student between stages, on disk: weights and progress together, sealed, so that a run goes on from the newest."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.checkpoints import ASIDE, DAMAGED, Damaged, check, seal
from inhibitor.errors import notice
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
        """Write a state, then delete all others but those to keep."""
        aside = self.folder / ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        student.save_pretrained(aside / name)
        tokenizer.save_pretrained(aside / name)
        write_text(aside / name / PROGRESS, json.dumps(progress, indent=1))
        if (self.folder / name).exists():
            (self.folder / name).rename(aside / "replaced")
        seal(aside / name, self.folder / name, {"state": name})
        for other in self.folder.iterdir():
            if other.name not in (name, *keep):
                shutil.rmtree(other)

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """The name and progress of the newest whole state; a damaged one is named and kept as ``damaged-…``."""
        whole: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*")):
            if path.name == ASIDE or path.name.startswith(DAMAGED):
                continue
            try:
                check(path)
            except Damaged as fault:
                kept = path.with_name(DAMAGED + path.name)
                shutil.rmtree(kept, ignore_errors=True)
                notice(f"{path} is damaged: {fault}. It is kept as {kept.name}; the run goes on from the state before.")
                path.rename(kept)
            else:
                whole[path.name] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        return max(whole.items(), key=lambda state: state[1]["saves"], default=None)

    def load(self, name: str, student: PreTrainedModel) -> None:
        """Put the weights of a state into a student."""
        load_model(student, self.folder / name / WEIGHTS)

    def publish(self, name: str, folder: Path) -> None:
        """Copy a state's model to ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / name, folder, ignore=shutil.ignore_patterns(PROGRESS, "manifest.json"))
