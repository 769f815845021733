"""The energy a run takes, read from the machine's own meters through zeus; where there is none, it says so."""

import importlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any, Self, TypeAlias

Result: TypeAlias = dict[str, Any]

WINDOW = "inhibitor"
METERS = {"cpu": "RAPL", "dram": "RAPL", "gpu": "NVML"}
JOULES_PER_KWH = 3.6e6
PART = "part of the run: "


class Meter:
    """The energy of what happens inside ``with``: NVIDIA GPUs through NVML, processors and memory through RAPL.

    It is what the devices of this machine drew meanwhile, whoever used them; never an estimate.

    Args:
        gpus: Which of the visible GPUs; None for all, empty for none.
        carbon_intensity: Grams of CO2 per kWh of the electricity used; None leaves CO2 out.

    Example:
        >>> with Meter() as meter:
        ...     total = sum(range(1000))
        >>> "joules" in meter.read()
        True
    """

    def __init__(self, gpus: Sequence[int] | None = None, carbon_intensity: float | None = None) -> None:
        self._gpus = None if gpus is None else list(gpus)
        self._carbon_intensity = carbon_intensity
        self._monitor: Any = None
        self._reason: str | None = "the meter was not started"
        self._joules: dict[str, float] = {}
        self._seconds = 0.0

    def __enter__(self) -> Self:
        with _quiet(), _without_main():
            try:
                self._monitor = importlib.import_module("zeus.monitor").ZeusMonitor(gpu_indices=self._gpus)
                self._monitor.begin_window(WINDOW, sync_execution=False)
                self._reason = None
            except ImportError:
                self._fail("zeus is not installed (pip install 'inhibitor-attention[energy]')")
            except Exception as error:  # a meter must not end the run that it measures
                self._fail(f"zeus: {error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._take()
        self._monitor = None

    def read(self) -> Result:
        """The energy since ``with`` began, up to now or to its end.

        Returns:
            ``joules``, ``by_device`` (their parts), ``seconds``, ``source`` and, with a carbon intensity,
            ``co2_grams``; or ``joules`` None and the ``reason``.
        """
        self._take()
        if self._reason is not None:
            return unmeasured(self._reason)
        if not self._joules:
            return unmeasured("zeus found no GPU and no processor whose meter this user may read")
        if not all(self._joules.values()):
            return unmeasured("the run was shorter than a meter takes to move")
        result = _measured(self._joules, self._seconds)
        if self._carbon_intensity is not None:
            result["co2_grams"] = result["joules"] / JOULES_PER_KWH * self._carbon_intensity
        return result

    def _take(self) -> None:
        """Add what was drawn since the last time."""
        if self._monitor is None:
            return
        with _quiet():
            try:
                window = self._monitor.end_window(WINDOW, sync_execution=False)
                self._monitor.begin_window(WINDOW, sync_execution=False)
                self._seconds += window.time
                for kind in ("gpu", "cpu", "dram"):
                    for index, joules in (getattr(window, f"{kind}_energy") or {}).items():
                        device = f"{kind} {index}"
                        if not 0 <= joules < math.inf:
                            raise ValueError(f"the meter of {device} ran backwards")
                        self._joules[device] = self._joules.get(device, 0.0) + joules
            except Exception as error:
                self._fail(f"zeus: {error}")

    def _fail(self, reason: str) -> None:
        self._monitor, self._reason = None, " ".join(reason.split())


def unmeasured(reason: str) -> Result:
    """The result of a run that was not measured."""
    return {"joules": None, "reason": reason}


def add(previous: Result | None, this: Result) -> Result:
    """The energy of a run that was interrupted: the sum of its parts, or unmeasured where one of them is.

    Args:
        previous: The parts so far; None where this is the first.
        this: The part that follows.
    """
    if previous is None:
        return this
    missing = [part["reason"].removeprefix(PART) for part in (previous, this) if part["joules"] is None]
    if missing:
        return unmeasured(missing[-1] if len(missing) > 1 else PART + missing[0])
    devices = dict(previous["by_device"])
    for device, joules in this["by_device"].items():
        devices[device] = devices.get(device, 0.0) + joules
    result = _measured(devices, previous["seconds"] + this["seconds"])
    if "co2_grams" in previous and "co2_grams" in this:
        result["co2_grams"] = previous["co2_grams"] + this["co2_grams"]
    return result


def _measured(by_device: dict[str, float], seconds: float) -> Result:
    meters = dict.fromkeys(METERS[kind] for kind in METERS if any(name.startswith(kind) for name in by_device))
    source = f"zeus ({', '.join(meters)})"
    return {"joules": sum(by_device.values()), "by_device": dict(by_device), "seconds": seconds, "source": source}


@contextmanager
def _quiet() -> Iterator[None]:
    """What zeus has to say is in the result."""
    log = logging.getLogger("zeus")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _without_main() -> Iterator[None]:
    """The processes in which zeus follows RAPL would import the main script again, and with it begin its run anew."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
