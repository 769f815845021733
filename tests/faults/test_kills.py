"""``inhibitor distill`` killed at random, over and over: it ends with the same bits and leaves nothing behind."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from inhibitor.checkpoints import verify
from tests.faults import LONG, record
from tests.faults.zygote import Zygote

KILLS = 200 if LONG else 8
TERMINATIONS = 20 if LONG else 2  # SIGTERM and SIGINT in turn
TIMED = ("second", "energy", "checkpoints")  # what a metrics file may say differently


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


@dataclass
class Runs:
    """A recipe, and the folders it was run in."""

    zygote: Zygote
    recipe: dict[str, Any]
    folder: Path
    number: int = 0
    log: Path = field(init=False)

    def __post_init__(self):
        self.log = self.folder / "log.txt"

    def new(self):
        """A recipe file for another folder; gives the file and the folder."""
        self.number += 1
        output = self.folder / f"run-{self.number}"
        file = self.folder / f"recipe-{self.number}.yaml"
        file.write_text(yaml.safe_dump(self.recipe | {"output": str(output)}))
        return file, output

    def start(self, file):
        return self.zygote.start("distill", str(file), log=self.log)

    def finish(self, file):
        status = self.start(file).wait()
        assert status == 0, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def runs(zygote, teacher, text, tmp_path_factory):
    """Two stages, three units, 40 steps, or 264 for many kills; a checkpoint after each second step."""
    steps = 256 if LONG else 32
    recipe = {
        "teacher": str(teacher),
        "text": {"files": [str(text)], "max_length": 16},
        "inhibitor": {"delta": 0.0},
        "calibration": {"sequences": 2, "lengths": [8]},
        "stages": [
            {"kind": "layerwise", "tokens": 256, "batch_size": 4, "checkpoints": 2},
            {"kind": "full", "tokens": steps * 64, "batch_size": 4, "checkpoints": steps // 2},
        ],
        "validation_sequences": 4,
        "example": "the film is good",
    }
    return Runs(zygote, recipe, tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(runs):
    """What a run that nobody disturbed leaves, and how long it took."""
    file, output = runs.new()
    started = time.monotonic()
    runs.finish(file)
    return left(output), time.monotonic() - started


def left(output):
    """All that counts of a finished run: its files' names, the bytes of its weights, its metrics but for times."""
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*"))
    weights = {name: (output / name).read_bytes() for name in names if name.endswith("model.safetensors")}
    return names, weights, timeless(json.loads((output / "metrics.json").read_text()))


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not any(word in key for word in TIMED)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def trains(child, output, seconds):
    """Whether the child has written a checkpoint of its own before it ends."""
    before, until = set(output.glob("checkpoints/*/checkpoint-*")), time.monotonic() + seconds
    while not set(output.glob("checkpoints/*/checkpoint-*")) - before and time.monotonic() < until:
        if child.ended(0.002):
            return False
    return True


def test_killed_over_and_over_it_ends_with_the_same_bits(runs, undisturbed):
    expected, seconds = undisturbed
    assert len(expected[1]) >= 4
    generator = random.Random(1)
    kills = finished = 0
    while kills < KILLS or not finished:
        file, output = runs.new()
        over = False
        while not over and kills < KILLS:
            child = runs.start(file)
            if generator.random() < 0.3:  # at any time, also before and after training
                over = child.ended(generator.uniform(0, min(2, seconds)))
            else:
                over = not trains(child, output, seconds) or child.ended(generator.expovariate(20))
            child.kill(signal.SIGKILL)
            status = child.wait()
            assert status in (-signal.SIGKILL, 0), runs.log.read_text()[-3000:]
            kills += status != 0
        runs.finish(file)
        finished += 1
        for ours, theirs, what in zip(left(output), expected, ("files", "weights", "metrics"), strict=True):
            assert ours == theirs, f"{what}, run {finished} after {kills} kills"
        record(trials=kills, survived=kills, runs=finished)


def test_terminated_it_leaves_a_checkpoint_and_says_so(runs, undisturbed):
    expected, seconds = undisturbed
    generator = random.Random(2)
    taken: list[float] = []
    while len(taken) < TERMINATIONS:
        file, output = runs.new()
        over = False
        while not over and len(taken) < TERMINATIONS:
            child = runs.start(file)
            over = not trains(child, output, seconds) or child.ended(generator.uniform(0, 0.1))
            number = (signal.SIGTERM, signal.SIGINT)[len(taken) % 2]
            said, sent = len(runs.log.read_text()), time.monotonic()
            child.kill(number)
            status, now = child.wait(), time.monotonic()
            words = runs.log.read_text()[said:]
            if "the same command goes on from there" in words:
                assert "Traceback" not in words
                assert status == 128 + number
                taken.append(now - sent)
                verify(Path(words.rpartition("The checkpoint is ")[2].partition(";")[0]))
            else:  # between two trainings nothing is lost: the process ends where it is
                assert status in (-signal.SIGTERM, 128 + signal.SIGINT, 0), words
        runs.finish(file)
        assert left(output) == expected
    assert max(taken) < 10
    record(terminated=len(taken), longest_sigterm_seconds=round(max(taken), 3))


@pytest.mark.skipif(not LONG, reason="two processes take their time: make faults")
def test_two_processes_stop_after_the_same_step(runs):
    """SIGTERM reaches them at different times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "inhibitor"]
    environment = os.environ | {"TQDM_DISABLE": "1"}

    def start(file):
        return subprocess.Popen([*command, "distill", str(file)], env=environment, stderr=subprocess.PIPE, text=True)

    (whole, expected), (file, output) = runs.new(), runs.new()
    assert start(whole).wait() == 0
    process = start(file)
    while not list(output.glob("checkpoints/1-0/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    words = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert words.count("the same command goes on from there") == 2
    named = set(re.findall(r"The checkpoint is (\S+);", words))
    assert len(named) == 1
    assert verify(Path(named.pop()))["processes"] == 2
    assert start(file).wait() == 0
    assert left(output) == left(expected)
    record(processes_stopped_together=2)
