"""How large the blocks are on which device: a table, not a search.

A search would time kernels while a model runs, could not do so under CUDA graphs, and would let the order of summation,
hence the last bits of a result, depend on what else the device did. ``make gpu`` measures the candidates.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Configuration:
    """One launch: the tile of scores, the warps that share it, programs for each core and registers for each thread."""

    rows: int
    keys: int
    warps: int
    programs: int
    registers: int | None = None  # None: as many as the compiler likes

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


@dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    kind: str  # "cuda" (ROCm calls itself so too), "xpu", or "cpu" under Triton's interpreter
    cores: int  # multiprocessors
    capability: tuple[int, int] | None  # None where it is not NVIDIA's


@functools.cache
def device_of(device: torch.device) -> Device:
    """The device in these words."""
    if device.type == "cpu":
        return Device("cpu", 2, None)
    properties = torch.get_device_module(device).get_device_properties(device)
    cores = getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count // 8
    nvidia = device.type == "cuda" and torch.version.hip is None
    return Device(device.type, cores, (properties.major, properties.minor) if nvidia else None)


@functools.cache
def choose(device: Device, width: int, backward: bool) -> Configuration:
    """The configuration for the wider of head_dim and value_dim, as a power of two.

    Registers decide: a thread of four warps holds 32 scores and, for 64 features, as many sums; 168 registers let three
    programs share a core of Ampere or Hopper. Wider heads take more warps. Cards for consumers have half of the
    first-level cache, in which the scratch tiles of all programs of a core should fit.
    """
    if device.kind == "cpu":
        return Configuration(rows=16, keys=16, warps=1, programs=1)
    warps = 4 if width <= 64 else 8 if width == 128 else 16
    if device.capability is None:
        return Configuration(rows=64, keys=64, warps=warps, programs=2)
    large_cache = device.capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    if warps > 4:
        return Configuration(rows=64, keys=64, warps=warps, programs=1)
    if backward:
        return Configuration(rows=64, keys=64, warps=warps, programs=2 if large_cache else 1)
    return Configuration(rows=64, keys=64, warps=warps, programs=3 if large_cache else 2, registers=168)
