"""The machine that figures belong to."""

import platform
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """What the figures belong to: platform, processor, versions, threads."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line for line in lines if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
