"""Beyond one process: the same steps, the same blocks, the same bits after a signal; other precision; trackers."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inhibitor.distill import stages, trackers
from inhibitor.distill.recipe import DistillConfig
from inhibitor.distill.run import distill
from inhibitor.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port=0", "--config_file"]
CONFIGS = ROOT / "recipes" / "accelerate"
INHIBITOR = ["-m", "inhibitor", "distill"]
GENTLE = {"learning_rate": 3e-4, "inhibitor_learning_rate": 3e-4}  # at which rounding grows slowly

# `inhibitor distill`, and a file for each process with the blocks it trained on, batch by batch. With a second
# argument, the launcher is asked to stop after so many batches.
RECORDER = """
import json, os, signal, sys, time
from inhibitor.cli import main
from inhibitor.distill.stages import Objective

forward, seen = Objective.forward, []
recipe, stop, rank = sys.argv[1], int((*sys.argv, 0)[2]), os.environ["RANK"]

def record(self, *args, **batch):
    if self.training:
        seen.append(batch["input_ids"].tolist())
        if len(seen) == stop and rank == "1":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # so that it comes in this step
    return forward(self, *args, **batch)

Objective.forward = record
sys.argv[1:] = ["distill", recipe]
try:
    main()
finally:
    with open(f"{recipe}.seen-{rank}.json", "w") as file:
        json.dump(seen, file)
"""

# accelerate starts FSDP2 on accelerators alone, and without a word trains data-parallel on a CPU: here it is told that
# these processes are GPUs.
STAND_IN = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from inhibitor.cli import main

made = PartialState.__init__

def make(self, *args, **kwargs):
    made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = make
sys.argv[1:] = ["distill", sys.argv[1]]
main()
"""


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def launch(launcher, program, values, *arguments):
    file = Path(values["output"]).with_suffix(".yaml")
    file.write_text(DistillConfig.parse(values).to_yaml())
    command = [sys.executable, *launcher, *program, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def launched(launcher, program, values):
    """The metrics of a run on two processes."""
    process = launch(launcher, program, values)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads((Path(values["output"]) / "metrics.json").read_text())


def losses(metrics):
    return [[step["loss"] for step in stage["history"]] for stage in metrics["stages"]]


def same_steps(found, expected):
    """The losses of two runs, within 1e-5 in 16 steps: gradients are added up in another order, and it grows."""
    for ours, theirs in zip(losses(found), losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
    for ours, theirs in zip(found["states"], expected["states"], strict=True):
        assert ours["hidden_error"] == pytest.approx(theirs["hidden_error"], rel=1e-4)


@dataclass
class Double:
    """A run of two processes on a stream."""

    values: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self):
        return Path(self.values["output"])

    @property
    def recorder(self):
        return str(self.output.parent / "recorder.py")


def seen_by(output, rank):
    return json.loads(Path(output).with_suffix(f".yaml.seen-{rank}.json").read_text())


@pytest.fixture(scope="module")
def double(teacher, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("double")
    (folder / "recorder.py").write_text(RECORDER)
    stage = {"tokens": 1024, "batch_size": 2, **GENTLE}  # of each process
    run = Double(
        {
            "teacher": str(teacher),
            "output": str(folder / "run"),
            "text": {"files": [str(text)], "max_length": 16},
            "inhibitor": {"delta": 0.0},
            "calibration": {"sequences": 2, "lengths": [8]},
            "stages": [{"kind": kind, **stage} for kind in ("joint", "layerwise", "full")],
            "validation_sequences": 4,
            "example": "the film is good",
        }
    )
    run.metrics = launched(TORCHRUN, [run.recorder], run.values)
    return run


def test_two_processes_take_the_steps_of_one_and_share_its_blocks(double, monkeypatch, tmp_path):
    """On a stream: each block is seen by one process, once, and in the step in which one process alone sees it."""
    seen: list[Any] = []
    forward = stages.Objective.forward

    def record(self, *args, **batch):
        if self.training:
            seen.append(batch["input_ids"].tolist())
        return forward(self, *args, **batch)

    monkeypatch.setattr(stages.Objective, "forward", record)
    values = double.values | {"output": str(tmp_path / "single")}
    values["stages"] = [stage | {"batch_size": 4} for stage in values["stages"]]
    same_steps(double.metrics, distill(DistillConfig.parse(values)))
    assert [
        first + second for first, second in zip(*(seen_by(double.output, rank) for rank in (0, 1)), strict=True)
    ] == seen
    steps = len(double.metrics["stages"][0]["history"])
    blocks = [str(block) for batch in seen[:steps] for block in batch]
    assert len(set(blocks)) == len(blocks) == 4 * steps


def test_two_processes_that_are_stopped_go_on_to_the_same_bits(double, tmp_path):
    """SIGTERM to torchrun in the middle of the third training, between two checkpoints."""
    values = double.values | {"output": str(tmp_path / "stopped")}
    before = sum(len(history) for history in losses(double.metrics)[:2])  # each step is logged
    stopped = launch(TORCHRUN, [double.recorder], values, str(before + 6))
    assert stopped.returncode != 0
    assert "SIGTERM: a checkpoint is written after this step" in stopped.stderr
    assert {len(seen_by(values["output"], rank)) for rank in (0, 1)} == {before + 6}
    assert (tmp_path / "stopped" / "checkpoints" / "2-0" / "checkpoint-6").is_dir()
    found = launched(TORCHRUN, INHIBITOR, values)
    assert losses(found) == losses(double.metrics)
    assert found["states"] == double.metrics["states"]
    ours, theirs = (Path(run) / "model" / "model.safetensors" for run in (tmp_path / "stopped", double.output))
    assert ours.read_bytes() == theirs.read_bytes()


def test_fsdp2_takes_the_steps_of_data_parallelism(double, tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    values = double.values | {"output": str(tmp_path / "parted")}
    launcher = [*ACCELERATE, str(CONFIGS / "fsdp2.yaml")]
    same_steps(launched(launcher, [str(tmp_path / "stand_in.py")], values), double.metrics)


def test_accelerate_launch_takes_the_steps_of_one_process(recipe, tmp_path):
    """On a fixed set of blocks, with a cache that two processes fill together."""
    recipe["text"]["blocks"] = 24
    recipe["cache"] = str(tmp_path / "cache")
    recipe["stages"] = [
        {"kind": kind, "tokens": 1024, "batch_size": 4, **GENTLE} for kind in ("joint", "layerwise", "full")
    ]
    expected = distill(DistillConfig.parse(recipe))
    recipe |= {"output": str(tmp_path / "double"), "cache": str(tmp_path / "cache-of-two")}
    for stage in recipe["stages"]:
        stage["batch_size"] //= 2
    same_steps(launched([*ACCELERATE, str(CONFIGS / "two_cpus.yaml"), "--module"], INHIBITOR[1:], recipe), expected)


def test_two_processes_share_a_task(task_recipe, tmp_path):
    task_recipe["stages"][0] |= {"dropout": False, "learning_rate": 3e-5}
    expected = distill(DistillConfig.parse(task_recipe))
    task_recipe["output"] = str(tmp_path / "double")
    task_recipe["stages"][0]["batch_size"] //= 2
    same_steps(launched(TORCHRUN, INHIBITOR, task_recipe), expected)


def test_bfloat16_stays_near_float32(recipe, tmp_path):
    """Within 3 %: a bfloat16 has 8 significant bits, so each activation is rounded by up to 0.4 %."""
    recipe["stages"] = [
        {"kind": kind, "tokens": 1024, "batch_size": 4, "learning_rate": 1e-3} for kind in ("joint", "full")
    ]
    expected = distill(DistillConfig.parse(recipe))
    recipe |= {"output": str(tmp_path / "bf16"), "stages": [stage | {"bf16": True} for stage in recipe["stages"]]}
    found = distill(DistillConfig.parse(recipe))
    for ours, theirs in zip(losses(found), losses(expected), strict=True):
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.03)


class Died(Exception):
    pass


def dies_at(monkeypatch, at):
    """The power goes in a step of the first training."""
    step = stages.FiniteTrainer.training_step

    def training_step(self, *args):
        if self.state.global_step == at:
            raise Died
        return step(self, *args)

    monkeypatch.setattr(stages.FiniteTrainer, "training_step", training_step)


def test_tensorboard_shows_a_resumed_run_as_one_curve(recipe, monkeypatch):
    recipe["stages"] = [{"kind": "full", "tokens": 512, "batch_size": 4, "checkpoints": 2}]
    config = DistillConfig.parse(recipe | {"report_to": ["tensorboard"]})
    with monkeypatch.context() as patch:
        dies_at(patch, 6)  # the checkpoint is of step 4
        with pytest.raises(Died):
            distill(config)
    history = distill(config)["stages"][0]["history"]
    assert not (config.output / "checkpoints").exists()
    events = EventAccumulator(str(config.output / "tensorboard" / "full")).Reload()
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [step["step"] for step in history] == list(range(1, 9))
    assert [event.value for event in curve] == pytest.approx([step["loss"] for step in history])
    tags = {f"train/{name}" for name in ("grad_norm", "learning_rate", "gamma/0", "gamma/1", "eta/0", "inhibited/1")}
    assert tags <= set(events.Tags()["scalars"])
    assert all(math.isfinite(event.value) for tag in tags for event in events.Scalars(tag))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_service_is_told_where_a_curve_goes_on(recipe, monkeypatch, name):
    begun: list[dict[str, Any]] = []
    logged: list[int] = []
    service = SimpleNamespace(
        init=lambda **options: begun.append(options),
        log=lambda values, step: logged.append(step) if "train/loss" in values else None,
        finish=lambda: logged.append(-1),
    )
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setattr(trackers, "check", lambda _: None)
    recipe["stages"] = [{"kind": "full", "tokens": 512, "batch_size": 4, "checkpoints": 2}]
    config = DistillConfig.parse(recipe | {"report_to": [name]})
    with monkeypatch.context() as patch:
        dies_at(patch, 6)
        with pytest.raises(Died):
            distill(config)
    distill(config)
    assert logged == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, -1]
    first, second = begun
    assert (first["project"], first["name"]) == (second["project"], second["name"]) == ("inhibitor", "run full")
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert first.get("id") == second.get("id")


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"got {tracker}\. pip install 'inhibitor-attention\[{tracker}\]'"):
        trackers.check([tracker])
    trackers.check([])
