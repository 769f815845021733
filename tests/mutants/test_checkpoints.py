"""Defects that checkpoints and resumption could have, and a compact suite that finds each one.

A mutant is the source of a module with one text replaced, run as a fresh module, and everything above it anew. A text
that is no longer in the source is an error: the catalogue follows the code.
"""

import inspect
import json
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inhibitor import checkpoints, trainer, training
from inhibitor.errors import Interrupted, RunError
from tests.faults import disk
from tests.faults.tiny import STEPS, At, Net, Rows, Stream, build, ending, kill_with, steps, swift  # noqa: F401
from tests.mutants import mutated

# module, defect, text, what stands there instead
CATALOGUE = [
    (checkpoints, "hashes not compared", 'hexdigest() != entry["sha256"]', 'hexdigest() == ""'),
    (checkpoints, "sizes not compared", 'if size != entry["bytes"]:', "if size < 0:"),
    (checkpoints, "missing files accepted", "if name not in present:", "if name == MANIFEST:"),
    (checkpoints, "the manifest's own digest not compared", "if content != signed:", "if not content:"),
    (
        checkpoints,
        "a checkpoint without optimizer accepted",
        "required |= {WEIGHTS, OPTIMIZER}",
        "required |= {WEIGHTS}",
    ),
    (
        checkpoints,
        "a checkpoint without random states accepted",
        '*(process_file(index) for index in range(manifest["processes"]))',
        "",
    ),
    (
        checkpoints,
        "the newest taken unseen",
        "            verify(checkpoint)\n        except",
        "            pass\n        except",
    ),
    (checkpoints, "begins anew where all are damaged", "    if damaged:\n", "    if not folder:\n"),
    (checkpoints, "files not synced", "        os.fsync(file.fileno())\n        return", "        return"),
    (checkpoints, "the rename not synced", "    sync_folder(final.parent)\n", ""),
    (
        checkpoints,
        "rotated before the rename",
        "    seal(aside, final,",
        "    for older in checkpoints(folder)[1:]:\n        shutil.rmtree(older)\n    seal(aside, final,",
    ),
    (checkpoints, "one checkpoint kept", "KEPT = 2", "KEPT = 1"),
    (checkpoints, "none rotated away", "if whole == KEPT:", "if whole < 0:"),
    (
        checkpoints,
        "written in place",
        'PREFIX, ASIDE, DAMAGED = "checkpoint-", ".writing"',
        'PREFIX, ASIDE, DAMAGED = "checkpoint-", "."',
    ),
    (checkpoints, "PyTorch's generator not put back", '    torch.set_rng_state(state["torch"])\n', ""),
    (checkpoints, "left-overs not swept", "    sweep(folder)\n    for checkpoint in", "    for checkpoint in"),
    (trainer, "the optimizer not put back", '            self.optimizer.load_state_dict(states["optimizer"])\n', ""),
    (trainer, "the scheduler not put back", '            self.lr_scheduler.load_state_dict(states["scheduler"])\n', ""),
    (
        trainer,
        "the weights not put back",
        "            load_model(self._unwrapped()",
        "            str(self._unwrapped()",
    ),
    (trainer, "random states not put back", '            checkpoints.set_random_state(self._resumed["random"])\n', ""),
    (
        trainer,
        "the epoch's order drawn anew",
        '"epoch_random" if inside else "random"',
        '"random" if inside else "random"',
    ),
    (trainer, "the loss to be logged forgotten", '            self._tr_loss.copy_(self._resumed["loss"])\n', ""),
    (
        trainer,
        "one step too many after the end",
        "if self.state.global_step >= self.state.max_steps:",
        "if not self.state:",
    ),
    (trainer, "weights not looked at", "        self._check_weights()\n", ""),
    (trainer, "losses not looked at", "        if not torch.isfinite(loss +", "        if torch.isneginf(loss +"),
    (trainer, "no checkpoint at a signal", "self._save_later or received)", "self._save_later)"),
    (trainer, "a signal ends the program", "        with self._signals:\n", "        with contextlib.nullcontext():\n"),
    (trainer, "a signal is not said", "if received and not self._save_later:", "if False:"),
    (trainer, "space not looked at", "                    self._check_space()\n", "                    pass\n"),
    (
        trainer,
        "pickled arguments beside the weights",
        "if state_dict is None:\n",
        "if [torch.save(self.args, folder / 'training_args.bin')]:\n",
    ),
    (trainer, "rows of a short micro-batch count more", " * self._shares[self._micro_batch - 1]", ""),
    (training, "fewer rows a step after a lack of memory", "accumulation * factor}", "accumulation}"),
    (
        training,
        "other errors taken for a lack of memory",
        "            if not _out_of_memory(error):\n                raise\n",
        "",
    ),
    (training, "weights kept after a lack of memory", "tensor.copy_(start[name])", "tensor"),
    (
        training,
        "the smaller micro-batch forgotten",
        "    write_text(folder / MICRO_BATCH",
        "    str(folder / MICRO_BATCH",
    ),
]


@dataclass(frozen=True)
class Mutant:
    """Checkpoints, trainer and loop with one text replaced in one of them."""

    checkpoints: ModuleType
    trainer: ModuleType
    training: ModuleType

    def build(self, folder, **options):
        return build(folder, kind=self.trainer.FiniteTrainer, **options)

    def fit(self, folder, *, batch=(2, 2), **options):
        def made(micro_batch, accumulation):
            return self.build(folder, micro_batch=micro_batch, accumulation=accumulation, **options)

        return self.training.fit(made, folder, *batch)


def mutate(changed: ModuleType | None = None, old: str = "", new: str = "") -> Mutant:
    def fresh(module: ModuleType) -> ModuleType:
        source = mutated(module, old, new) if module is changed else inspect.getsource(module)
        copy = ModuleType(f"mutant.{module.__name__}")
        exec(compile("import contextlib\n" + source, module.__name__, "exec"), copy.__dict__)  # noqa: S102
        return copy

    below, middle, above = fresh(checkpoints), fresh(trainer), fresh(training)
    middle.checkpoints = below  # type: ignore[attr-defined]
    above.FiniteTrainer, above.last_checkpoint = middle.FiniteTrainer, below.last_checkpoint  # type: ignore[attr-defined]
    return Mutant(below, middle, above)


class Enough(Exception):
    pass


def enough():
    raise Enough


def begin(mutant, folder, until):
    """Train to a step, with a checkpoint at every second one."""
    with pytest.raises(Enough):
        mutant.fit(folder, save_steps=2, callbacks=[At(until, enough)])


def resumed(mutant: Mutant, place: Path) -> None:
    options = {"train_sampling_strategy": "group_by_length"}
    whole = mutant.fit(place / "whole", **options)
    for step in (1, 3, 5):
        folder = place / f"{step}"
        with pytest.raises(BaseException, match="checkpoint"):
            mutant.fit(folder, callbacks=[At(step, kill_with(signal.SIGTERM))], **options)
        trainer = mutant.fit(folder, **options)
        assert ending(folder) == ending(place / "whole")
        assert steps(trainer) == steps(whole)


def signalled(mutant: Mutant, place: Path) -> None:
    with pytest.raises(Interrupted):
        mutant.fit(place, callbacks=[At(1, kill_with(signal.SIGTERM))])
    assert disk.whole(place) == [2]


def found_out(mutant: Mutant, place: Path) -> None:
    begin(mutant, place / "sound", 4)
    names = sorted(path.name for path in (place / "sound" / "checkpoint-4").iterdir())
    for name in names:
        for number, damage in enumerate((flipped, cut, os.unlink)):
            folder = shutil.copytree(place / "sound", place / f"{name}-{number}")
            damage(folder / "checkpoint-4" / name)
            assert mutant.checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-2")
            damage(folder / "checkpoint-2" / name)
            with pytest.raises(RunError):
                mutant.checkpoints.last_checkpoint(folder)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    """A shorter file of the same digest, as far as one knows who does not compare sizes: the digests agree."""
    manifest = path.parent / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    if path != manifest:
        content = json.loads(manifest.read_text())
        content["files"][path.name]["sha256"] = checkpoints._seal(path)["sha256"]
        del content["sha256"]
        manifest.write_bytes(checkpoints._signed(content))


def lacking(mutant: Mutant, place: Path) -> None:
    begin(mutant, place / "sound", 4)
    for name in ("model.safetensors", "optimizer.safetensors", "process-0.safetensors", "trainer_state.json"):
        folder = shutil.copytree(place / "sound", place / name)
        manifest = folder / "checkpoint-4" / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["files"][name], content["sha256"]
        manifest.write_bytes(checkpoints._signed(content))
        assert mutant.checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-2")


def ordered(mutant: Mutant, place: Path) -> None:
    begin(mutant, place, 4)
    instants = []
    watched = disk.Disk(
        place, each=lambda: instants.append(disk.whole(place)), modules=(mutant.checkpoints, mutant.trainer)
    )
    with watched.watched():
        begin(mutant, place, 6)
    assert all(len(steps) >= 2 for steps in instants)
    assert disk.whole(place) == [6, 4]
    named = watched.log.index(("rename", "checkpoint-6"))
    for name in ("model.safetensors", "optimizer.safetensors", "process-0.safetensors", "trainer_state.json"):
        assert ("fsync", f".writing/checkpoint-6/{name}") in watched.log[:named]
    assert watched.log[named + 1] == ("fsync", "")


def swept(mutant: Mutant, place: Path) -> None:
    begin(mutant, place, 2)
    (place / ".writing" / "checkpoint-4").mkdir(parents=True)
    mutant.checkpoints.last_checkpoint(place)
    assert [path.name for path in place.iterdir()] == ["checkpoint-2"]


def ended(mutant: Mutant, place: Path) -> None:
    mutant.fit(place, rows=Stream())
    assert mutant.fit(place, rows=Stream()).state.global_step == STEPS


def finite(mutant: Mutant, place: Path) -> None:
    rows = Rows()
    rows.rows[7]["x"][2] = float("nan")
    with pytest.raises(RunError, match="micro-batch"):
        mutant.fit(place / "rows", rows=rows)
    trainer = mutant.build(place / "weights", save_steps=2)
    trainer.add_callback(At(4, lambda: trainer.model.last.bias.data.fill_(float("inf")), "on_step_end"))
    with pytest.raises(RunError, match=r"last\.bias"):
        trainer.train()
    assert disk.whole(place / "weights") == [2]


def spacious(mutant: Mutant, place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5})())
        with pytest.raises(RunError, match="free bytes"):
            mutant.fit(place)


def without_pickle(mutant: Mutant, place: Path) -> None:
    begin(mutant, place, 2)
    assert {path.suffix for path in (place / "checkpoint-2").iterdir()} == {".json", ".safetensors"}


def short_of_memory(mutant: Mutant, place: Path) -> None:
    real, model = Net.forward, build(place / "model", dropout=0).model
    now: list[Any] = []

    def made(folder):
        def make(micro_batch, accumulation):
            now[:] = [
                mutant.build(folder, micro_batch=micro_batch, accumulation=accumulation, dropout=0, logging_steps=1)
            ]
            now[0].model = now[0].model_wrapped = model
            return now[0]

        return make

    def forward(self, x, y, **unused):
        if len(x) > 2 and now[0].state.global_step == 5:
            raise error
        return real(self, x, y)

    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = steps(mutant.training.fit(made(place / "whole"), place / "whole", 4))
    model.load_state_dict(start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "forward", forward)
        error = MemoryError()
        found = steps(mutant.training.fit(made(place / "run"), place / "run", 4))
        assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], abs=1e-6)
        assert json.loads((place / "run" / "micro_batch.json").read_text())["batch_size"] == 2
        error = RuntimeError("another")  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="another"):
            mutant.training.fit(made(place / "other"), place / "other", 4)


CHECKS = [
    resumed,
    signalled,
    found_out,
    lacking,
    ordered,
    swept,
    ended,
    finite,
    spacious,
    without_pickle,
    short_of_memory,
]


@pytest.fixture(autouse=True)
def _survives_signals(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def obeyed(number, frame):
        raise RuntimeError("the program would have ended")

    before = signal.signal(signal.SIGTERM, obeyed)
    yield
    signal.signal(signal.SIGTERM, before)


def killer(mutant: Mutant) -> str | None:
    """The first check that the mutant fails, by a wrong result or by an error; None if it survives."""
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(mutant, Path(folder) / "place")
            except (Exception, Interrupted, pytest.fail.Exception):
                return check.__name__
    return None


def test_the_code_itself_survives(tmp_path):
    mutant = mutate()
    for check in CHECKS:
        check(mutant, tmp_path / check.__name__)


@pytest.mark.parametrize(("module", "defect", "old", "new"), CATALOGUE, ids=[row[1] for row in CATALOGUE])
def test_the_defect_is_found(module, defect, old, new, record_property):
    found_by = killer(mutate(module, old, new))
    assert found_by is not None, f"{defect}: survives"
    record_property("found by", found_by)
