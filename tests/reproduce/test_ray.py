"""On a local Ray of two workers: a grid is done, and a killed worker's run is taken up again where it stopped."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from inhibitor.reproduce.grid import reproduce
from inhibitor.reproduce.pools import Child, RayPool
from inhibitor.reproduce.recipe import ReproduceConfig

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'inhibitor-attention[ray]'")
psutil = pytest.importorskip("psutil")

EPOCHS = 60


@pytest.mark.parametrize("with_child", [True, False], ids=["the worker and its child", "the worker alone"])
def test_a_killed_workers_run_is_taken_up_again(values, monkeypatch, with_child):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    values |= {"experiments": ["e0"], "executor": "ray", "processes": 2}
    values["finetune"] = values["finetune"] | {"epochs": [EPOCHS]}
    output = Path(values["output"])
    killed: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # one for each

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.05)
            if list((output / "e0/reviews/seed-1/checkpoints").glob("checkpoint-*")):
                child = int((output / "e0/reviews/seed-1/run.lock").read_text())
                worker = psutil.Process(child).ppid()
                os.kill(worker, signal.SIGKILL)
                if with_child:
                    os.kill(child, signal.SIGKILL)
                killed.append(child)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        outcome = reproduce(ReproduceConfig.parse(values), "grid.yaml")
    finally:
        thread.join()
        ray.shutdown()
    assert killed
    assert outcome.failures == []
    assert len(outcome.records) == 2
    for seed in (0, 1):
        metrics = json.loads((output / f"e0/reviews/seed-{seed}/metrics.json").read_text())
        assert [entry["epoch"] for entry in metrics["evaluations"]] == list(range(1, EPOCHS + 1))


def test_closing_lets_a_run_write_its_checkpoint(values, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run, log = Path(values["output"]), Path(values["output"]).with_suffix(".log")
    options = {"model": values["teacher"], "task": "reviews", "data": values["data"], "output": run, "epochs": 1000}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    pool = RayPool(1)
    future = pool.submit(Child(("finetune", *arguments, "--max-length", "32"), run, log, Path.cwd(), 1))
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("checkpoint-*")):
        assert not future.done()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pool.close()
    assert "stopped by SIGTERM" in log.read_text()
