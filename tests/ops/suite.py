"""Runs a compact suite on builds of the native kernels, for mutants and for sanitizers."""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

Check = Callable[[], None]


@dataclass(frozen=True)
class Suite:
    """What a build is put through.

    Args:
        modules: Those that get the build in the place of the installed one; the last is tested.
        checks: Run for each of its instruction sets.
        sweep: One more, which takes long.
        prepare: Computes what builds are compared with, once for all.
    """

    modules: tuple[Any, ...]
    checks: list[Check]
    sweep: Check
    prepare: Check

    def main(self, paths: list[str]) -> None:
        """Each build in a child of its own; a single one with ``--here`` in this process, with a part of the sweep."""
        torch.set_num_threads(1)
        if paths[0] == "--here":
            self._load(paths[1])
            print(self._failing([*self.checks, self.sweep], verbose=True))
            return
        self.prepare()
        for path in paths:
            print(path, self._in_a_child(path), flush=True)

    def _load(self, path: str) -> None:
        with mock.patch.object(importlib.util, "find_spec", return_value=SimpleNamespace(origin=path)):
            for module in self.modules:
                module._LIBRARY, module.INSTALLED = module._load(), True

    def _failing(self, checks: list[Check], verbose: bool = False) -> str:
        """The name of the first check that fails for some instruction set, or "survives"."""
        tested = self.modules[-1]
        for name in tested.instruction_sets():
            with tested.using(name):
                for check in checks:
                    try:
                        check()
                    except Exception as error:
                        if verbose:
                            print(f"{name}: {error!r}"[:300], file=sys.stderr)
                        return str(check.__name__)
        return "survives"

    def _in_a_child(self, path: str) -> str:
        """The same of a build that may crash or hang."""
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            signal.alarm(40)
            self._load(path)
            os.write(writable, self._failing(self.checks).encode())
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as answer:
            found = answer.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return found if code == 0 else f"crash {-code}"
