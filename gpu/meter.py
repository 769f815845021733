"""What the scripts beside this one measure with: time, memory, energy, the device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Gauge:
    """Time and energy of calls on one device; energy where NVIDIA's management library counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds = 9 if device.type != "cpu" else 1
        self._library: Any = None
        if device.type == "cuda" and torch.version.hip is None:
            import pynvml

            pynvml.nvmlInit()
            self._library, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def joules(self) -> float | None:
        """Energy that the device has counted so far."""
        if self._library is None:
            return None
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def measure(self, call: Callable[[], Any], seconds: float) -> dict[str, float | int | None]:
        """Median time of a call over several rounds of about so many seconds in all, its energy, the memory it adds."""
        call()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        calls = max(1, int(seconds / self.rounds / max(time.perf_counter() - start, 1e-6)))
        rounds, before = [], self.joules()
        for _ in range(self.rounds):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.synchronize()
            rounds.append((time.perf_counter() - start) / calls)
        after = self.joules()
        used = None if before is None or after is None else (after - before) / (self.rounds * calls)
        return {
            "ms": 1000 * statistics.median(rounds),
            "calls": self.rounds * calls,
            "joules": used,
            "bytes": self.added(call),
        }

    def added(self, call: Callable[[], Any]) -> int | None:
        """Bytes at the peak of a call beyond what is there before it, what it returns included."""
        if self.device.type == "cpu":
            return None
        module = torch.get_device_module(self.device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = int(module.memory_allocated())
        call()
        return int(module.max_memory_allocated()) - before

    def describe(self) -> dict[str, Any]:
        """The device that the figures belong to."""
        found: dict[str, Any] = {"torch": torch.__version__, "device": self.device.type}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        if self._library is not None:
            clock = self._library.nvmlDeviceGetMaxClockInfo(self._handle, self._library.NVML_CLOCK_SM)
            lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
            found |= {"MHz": clock, "additions per second": 1e6 * lanes * clock * found["multiprocessors"]}
        return found
