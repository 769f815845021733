import json
import math
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from inhibitor.energy import Meter, add, unmeasured

NO_ZEUS = "zeus is not installed (pip install 'inhibitor-attention[energy]')"


@dataclass
class Measurement:
    """What ``end_window`` returns: https://ml.energy/zeus/reference/monitor/energy/."""

    time: float
    gpu_energy: dict[int, float]
    cpu_energy: dict[int, float] | None = None
    dram_energy: dict[int, float] | None = None


class Monitor:
    """Stands in for ``zeus.monitor.ZeusMonitor``.

    The machines of the tests have neither an NVIDIA GPU nor RAPL counters that a user may read, so the measured path
    can only be tested against zeus's documented interface: windows that begin, end, and return a ``Measurement``.
    """

    windows: list[Measurement]

    def __init__(self, gpu_indices: list[int] | None = None) -> None:
        self.gpus = gpu_indices
        self.open: set[str] = set()
        self.left = iter(self.windows)

    def begin_window(self, key: str, sync_execution: bool = True) -> None:
        assert key not in self.open
        self.open.add(key)

    def end_window(self, key: str, sync_execution: bool = True, cancel: bool = False) -> Measurement:
        self.open.remove(key)
        return next(self.left)


def zeus(monkeypatch: pytest.MonkeyPatch, *windows: Measurement, monitor: type = Monitor) -> None:
    module = types.ModuleType("zeus.monitor")
    module.ZeusMonitor = type("ZeusMonitor", (monitor,), {"windows": windows})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", types.ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


def test_this_machine_is_measured_or_says_why_not(capfd: pytest.CaptureFixture[str]) -> None:
    with Meter() as meter:
        sum(range(10**6))
    result = meter.read()
    if result["joules"] is None:
        assert set(result) == {"joules", "reason"}
        assert result["reason"] == NO_ZEUS or result["reason"].startswith(("zeus found no", "the run was shorter"))
    else:
        assert result["joules"] == pytest.approx(sum(result["by_device"].values()))
    assert json.loads(json.dumps(result)) == result
    assert capfd.readouterr() == ("", "")


def test_without_zeus_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    with Meter(carbon_intensity=25.0) as meter:
        pass
    assert meter.read() == {"joules": None, "reason": NO_ZEUS}
    assert Meter().read()["reason"] == "the meter was not started"


def test_devices_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    zeus(monkeypatch, Measurement(10.0, {0: 1000.0, 1: 500.0}, {0: 200.0}, {0: 100.0}))
    with Meter(carbon_intensity=36.0) as meter:
        pass
    assert meter.read() == {
        "joules": 1800.0,
        "by_device": {"gpu 0": 1000.0, "gpu 1": 500.0, "cpu 0": 200.0, "dram 0": 100.0},
        "seconds": 10.0,
        "source": "zeus (RAPL, NVML)",
        "co2_grams": pytest.approx(0.018),
    }


def test_reading_meanwhile_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    zeus(monkeypatch, *(Measurement(1.0, {0: joules}) for joules in (5.0, 0.0, 7.0)))
    with Meter() as meter:
        assert meter.read()["joules"] == 5.0
        assert meter.read()["joules"] == 5.0
    assert meter.read() == {"joules": 12.0, "by_device": {"gpu 0": 12.0}, "seconds": 3.0, "source": "zeus (NVML)"}


def test_an_interrupted_run_is_measured_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    zeus(monkeypatch, Measurement(1.0, {}, {0: 5.0}))
    meter = Meter()
    with pytest.raises(KeyboardInterrupt), meter:
        raise KeyboardInterrupt
    assert meter.read()["joules"] == 5.0


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (Measurement(1.0, {}), "zeus found no GPU and no processor whose meter this user may read"),
        (Measurement(1.0, {0: 3.0, 1: 0.0}), "the run was shorter than a meter takes to move"),
        (Measurement(1.0, {}, {0: -3.0}), "zeus: the meter of cpu 0 ran backwards"),
        (Measurement(1.0, {0: math.nan}), "zeus: the meter of gpu 0 ran backwards"),
    ],
)
def test_what_is_no_measurement_is_not_reported_as_one(
    monkeypatch: pytest.MonkeyPatch, window: Measurement, reason: str
) -> None:
    zeus(monkeypatch, window)
    with Meter() as meter:
        pass
    assert meter.read() == {"joules": None, "reason": reason}


@pytest.mark.parametrize("broken", ["__init__", "begin_window", "end_window"])
def test_a_meter_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("GPU is\nlost")

    zeus(monkeypatch, Measurement(1.0, {0: 5.0}), monitor=type("Broken", (Monitor,), {broken: fail}))
    with Meter() as meter:
        pass
    assert meter.read() == {"joules": None, "reason": "zeus: GPU is lost"}


def test_a_script_without_a_guard_is_run_once(tmp_path: Path) -> None:
    """zeus follows RAPL from a process that it spawns, and a spawned process imports the main script again."""
    (tmp_path / "zeus").mkdir()
    (tmp_path / "zeus" / "__init__.py").touch()
    (tmp_path / "zeus" / "monitor.py").write_text(
        "import multiprocessing\n"
        "class ZeusMonitor:\n"
        "    def __init__(self, gpu_indices):\n"
        "        process = multiprocessing.get_context('spawn').Process(target=print, args=['followed'])\n"
        "        process.start()\n"
        "        process.join()\n"
        "    def begin_window(self, key, sync_execution): ...\n"
    )
    script = tmp_path / "script.py"
    script.write_text("from inhibitor.energy import Meter\nwith Meter():\n    print('run', __name__)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["followed", "run __main__", ""]
    assert result.stderr == ""


PART = {"joules": 10.0, "by_device": {"cpu 0": 10.0}, "seconds": 2.0, "source": "zeus (RAPL)", "co2_grams": 0.5}
OTHER = {"joules": 6.0, "by_device": {"cpu 0": 1.0, "gpu 0": 5.0}, "seconds": 3.0, "source": "zeus (RAPL, NVML)"}


def test_the_parts_of_a_resumed_run_add_up() -> None:
    both = {"joules": 16.0, "by_device": {"cpu 0": 11.0, "gpu 0": 5.0}, "seconds": 5.0, "source": "zeus (RAPL, NVML)"}
    assert add(None, PART) == PART
    assert add(PART, PART)["co2_grams"] == 1.0
    assert add(PART, OTHER) == add(OTHER, PART) == both


def test_a_run_of_which_a_part_was_not_measured_was_not_measured() -> None:
    partly = {"joules": None, "reason": "part of the run: no meter"}
    assert add(unmeasured("no meter"), PART) == add(PART, unmeasured("no meter")) == partly
    assert add(partly, PART) == partly
    assert add(unmeasured("no meter"), unmeasured("no meter")) == unmeasured("no meter")
    assert add(None, unmeasured("no meter")) == unmeasured("no meter")
