"""The tile size as a fixture, and the largest errors of the sweep in pytest's summary."""

import pytest
import torch

from inhibitor.ops import blocked


@pytest.fixture
def cut(monkeypatch):
    """Set how many elements a tile of the PyTorch backend has, whatever the number of threads."""

    def set_size(elements: int) -> None:
        monkeypatch.setattr(blocked, "CPU_TILE", elements)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    return set_size


def pytest_terminal_summary(terminalreporter):
    largest: dict[str, float] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, error in report.user_properties:
            if name.startswith("error of "):
                largest[name] = max(largest.get(name, 0.0), error)
    for name, error in sorted(largest.items()):
        terminalreporter.write_line(f"largest {name}: {error:.1e}")
