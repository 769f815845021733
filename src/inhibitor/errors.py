"""The errors users meet: what was expected, what came, what to do."""

import difflib
import signal
import sys
from collections.abc import Iterable


class InhibitorError(ValueError):
    """An input that cannot be used, named before any work starts.

    Args:
        subject: The argument, key or file that is at fault, as the user wrote it.
        expected: What would have been accepted.
        got: What came instead.
        remedy: What to do about it.
    """

    def __init__(self, subject: str, *, expected: str, got: str, remedy: str) -> None:
        super().__init__(f"{subject}: expected {expected}, got {got}. {remedy}")
        self.subject = subject
        self.expected = expected
        self.got = got
        self.remedy = remedy


class OperatorError(InhibitorError):
    """A call of the attention operator with arguments it does not take."""


class ModelError(InhibitorError):
    """A model that cannot be loaded, converted or paired."""


class DataError(InhibitorError):
    """Text or labelled data that cannot be read as it stands."""


class ConfigError(InhibitorError):
    """A recipe or an option that says something unknown or impossible."""


class RunError(InhibitorError):
    """A run folder that cannot be used for the run that was asked for."""


class BenchmarkError(InhibitorError):
    """A result that is wrong and therefore not timed."""


class Interrupted(BaseException):  # not Exception: nothing may swallow it
    """Training that a signal ended after a whole step, with a checkpoint to go on from.

    Args:
        signal_number: The signal; a shell expects ``128 + signal_number`` as the exit status.
        checkpoint: The checkpoint's folder.
    """

    def __init__(self, signal_number: int, checkpoint: str) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}. The checkpoint is {checkpoint}; the same command goes on from there.")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


def notice(text: str) -> None:
    """Tell the user something in one line on standard error, and go on."""
    print(f"inhibitor: {text}", file=sys.stderr, flush=True)


def suggestion(word: str, known: Iterable[str]) -> str:
    """One sentence for a remedy: the nearest known word, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
