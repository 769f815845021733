"""The tile size, the instruction set and the backend as fixtures; the largest errors of the sweep in the summary."""

import pytest
import torch

from inhibitor.ops import blocked, cpu


@pytest.fixture
def cut(monkeypatch):
    """Set how many elements a tile of the PyTorch backend has, whatever the number of threads."""

    def set_size(elements: int) -> None:
        monkeypatch.setattr(blocked, "CPU_TILE", elements)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    return set_size


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request):
    """Each instruction set of this build and processor in turn."""
    with cpu.using(request.param):
        yield request.param


@pytest.fixture
def backend(request):
    """A backend by its name; "cpu-avx2" is the native kernels for AVX2."""
    name, _, chosen = request.param.partition("-")
    if chosen:
        with cpu.using(chosen):
            yield name
    else:
        yield name


def pytest_terminal_summary(terminalreporter):
    largest: dict[str, float] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, error in report.user_properties:
            if name.startswith("error of "):
                largest[name] = max(largest.get(name, 0.0), error)
    for name, error in sorted(largest.items()):
        terminalreporter.write_line(f"largest {name}: {error:.1e}")
