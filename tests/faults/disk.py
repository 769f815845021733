"""A disk that writes a log, fills up, or loses its power, at the operation one chooses."""

import builtins
import io
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch

from inhibitor import checkpoints, trainer


class PowerLoss(BaseException):
    """Nothing after it reaches the disk."""


class Disk:
    """While ``watched``, each operation that changes the disk is logged as ``(what, path)``, or fails.

    Args:
        folder: Changes elsewhere do not count.
        fails_at: The number of the first operation that fails, from 0; none if None.
        error: What it raises. After a ``PowerLoss`` all others fail too.
        each: Called before each operation.
        modules: Those that write tensors.
    """

    def __init__(self, folder, *, fails_at=None, error=None, each=None, modules=(checkpoints, trainer)):
        self.modules = modules
        self.folder, self.fails_at, self.error, self.each = str(folder), fails_at, error, each
        self.log: list[tuple[str, str]] = []
        self._within = False

    def _operation(self, what, path):
        path = os.fspath(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
        if self._within or not path.startswith(self.folder):
            return
        self._within = True
        try:
            if self.each is not None:
                self.each()
        finally:
            self._within = False
        self.log.append((what, path[len(self.folder) + 1 :]))
        if self.fails_at is not None:
            number = len(self.log) - 1
            if number == self.fails_at or (number > self.fails_at and isinstance(self.error, PowerLoss)):
                raise self.error

    @contextmanager
    def watched(self):
        def guard(name, function, argument=0):
            def guarded(*args, **kwargs):
                path = args[argument]
                within = kwargs.get("dir_fd")
                if within is not None:
                    path = f"{os.readlink(f'/proc/self/fd/{within}')}/{path}"
                if not (name == "mkdir" and os.path.isdir(path)):
                    self._operation(name, path)
                return function(*args, **kwargs)

            return guarded

        def guard_open(function):
            def guarded(file, mode="r", *args, **kwargs):
                if set(mode) & set("wax") and not isinstance(file, int):
                    self._operation("write", file)
                return function(file, mode, *args, **kwargs)

            return guarded

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, guard(name, getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, guard(name, getattr(os, name), 1))
            for module in (builtins, io):
                patch.setattr(module, "open", guard_open(open))
            for module, name in zip(self.modules, ("save_file", "save_model"), strict=True):
                patch.setattr(module, name, guard("write", getattr(safetensors.torch, name), 1))
            yield self


def whole(folder):
    """The steps of the checkpoints that verify."""
    found = []
    for checkpoint in checkpoints.checkpoints(Path(folder)):
        try:
            checkpoints.verify(checkpoint)
        except checkpoints.Damaged:
            continue
        found.append(int(checkpoint.name.rpartition("-")[2]))
    return found
