"""A checkpoint is whole or not there: whatever is cut, flipped, filled up or switched off."""

import contextlib
import copy
import errno
import json
import os
import random
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from inhibitor import checkpoints
from inhibitor.checkpoints import (
    Damaged,
    last_checkpoint,
    load_state,
    random_state,
    save_state,
    set_random_state,
    verify,
)
from inhibitor.errors import RunError
from tests.faults import LONG, record
from tests.faults.disk import Disk, PowerLoss, whole
from tests.faults.tiny import At, build, swift  # noqa: F401

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "process-0.safetensors", "trainer_state.json"]


class Enough(Exception):
    pass


def go_on(folder, until=6):
    """Train from the last checkpoint to a step, with a checkpoint at every second one."""

    def enough():
        raise Enough

    trainer = build(folder, save_steps=2, callbacks=[At(until, enough)])
    with contextlib.suppress(Enough):
        trainer.train(last_checkpoint(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    go_on(folder, until=4)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(trained, tmp_path / "checkpoints")


def test_it_holds_safetensors_and_json_and_says_what_it_needs(trained):
    for step in (2, 4):
        checkpoint = trained / f"checkpoint-{step}"
        assert sorted(path.name for path in checkpoint.iterdir()) == FILES
        manifest = verify(checkpoint)
        assert {"format": 1, "step": step, "processes": 1, "sharded": False}.items() <= manifest.items()
        assert {"torch", "transformers", "inhibitor-attention"} <= manifest["versions"].keys()
        assert sorted(manifest["files"]) == FILES[1:]
        for name in FILES[1:4]:
            with safe_open(checkpoint / name, framework="pt") as file:
                assert file.keys() or name == "process-0.safetensors"


STATE = {
    "tensors": {number: torch.full((2, 1), number).to(kind) for number, kind in enumerate(
        (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    )},
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(6.0).view(2, 3).mT,
    "not a number": torch.tensor([0x7FC12345, -0x80000000], dtype=torch.int32).view(torch.float32),
    "pair": (1, [None, True, 0.1, "ü", float("inf")]),
    "nothing": [{}, (), []],
    2: {"1": "text", 1: "number"},
}  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        bits = [
            tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
            for tensor in (a, b)
        ]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_states_come_back_bit_for_bit(tmp_path):
    save_state(tmp_path / "x.safetensors", STATE)
    found = load_state(tmp_path / "x.safetensors")
    assert same(found, STATE)
    os.truncate(tmp_path / "x.safetensors", 0)  # the tensors do not live in the file
    assert same(found, STATE)
    with pytest.raises(TypeError, match=r"\.a\.0: a set cannot be saved without pickle"):
        save_state(tmp_path / "y.safetensors", {"a": [{1}]})


def test_an_optimizer_comes_back_bit_for_bit(trained):
    trainer = build(trained, save_steps=100)
    before = load_state(trained / "checkpoint-4" / "optimizer.safetensors")
    found = []
    trainer.add_callback(At(4, lambda: found.append(copy.deepcopy(trainer.optimizer.state_dict()))))
    trainer.add_callback(type("Stop", (At,), {})(5, lambda: setattr(trainer.control, "should_training_stop", True)))
    trainer.train(str(trained / "checkpoint-4"))
    assert same(found[0]["state"], before["optimizer"]["state"])
    steps = [state["step"] for state in found[0]["state"].values()]
    assert all(step.dtype == torch.float32 and step.shape == () and step == 4 for step in steps)


def test_every_generator_goes_back(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), random.gauss(0, 1), torch.rand(1).item()

    draw()
    state = random_state()
    first = draw()
    assert draw() != first
    save_state(tmp_path / "x.safetensors", state)
    set_random_state(load_state(tmp_path / "x.safetensors"))
    assert draw() == first


def test_a_training_that_goes_on_on_other_devices_says_so(monkeypatch, capsys):
    state = random_state()
    devices = SimpleNamespace(get_rng_state_all=lambda: [torch.zeros(1)] * 2, set_rng_state_all=None)
    monkeypatch.setattr(checkpoints, "_accelerator", lambda: devices)
    set_random_state(state)
    assert "goes on on other accelerators" in capsys.readouterr().err


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    """As in an objective that holds a language model, whose head shares its matrix with the embeddings."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = BertForMaskedLM(
                BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
            )

        def forward(self, x, **unused):
            return {"loss": self.student(x.abs().long().clamp(max=8)).logits.square().mean()}

    trainer = build(tmp_path, max_steps=2)
    trainer.model = trainer.model_wrapped = Holder()
    trainer.train()
    trained = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trained["student.cls.predictions.decoder.weight"].equal(
        trained["student.bert.embeddings.word_embeddings.weight"]
    )
    again = build(tmp_path, max_steps=2)
    again.model = again.model_wrapped = Holder()
    again.train(last_checkpoint(tmp_path))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.model.state_dict().items())
    student = again.model.student
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) < len(trained)


def test_each_file_is_on_the_disk_before_its_name_counts(folder):
    with Disk(folder).watched() as disk:
        go_on(folder)
    aside, log = ".writing/checkpoint-6", disk.log
    named = log.index(("rename", "checkpoint-6"))
    sealed = next(i for i, (what, path) in enumerate(log) if what == "replace" and path == f"{aside}/manifest.json")
    for name in FILES[1:]:
        assert log.index(("write", f"{aside}/{name}")) < log.index(("fsync", f"{aside}/{name}")) < sealed
    manifest = [i for i, (what, path) in enumerate(log) if what == "fsync" and path.startswith(f"{aside}/.manifest")]
    assert len(manifest) == 1
    assert manifest[0] < sealed < log.index(("fsync", aside)) < named
    parent = next(i for i in range(named, len(log)) if log[i] == ("fsync", ""))
    moved = log.index(("rename", ".writing/checkpoint-2"))
    assert named < parent < moved
    deleted = [i for i, (what, path) in enumerate(log) if what in ("unlink", "rmdir") and "checkpoint-2" in path]
    assert deleted
    assert moved < min(deleted)
    assert all(path.startswith(".writing") for what, path in log if what in ("unlink", "rmdir", "write", "mkdir"))
    assert whole(folder) == [6, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_at_every_instant_two_whole_checkpoints_are_there(folder):
    seen = []
    with Disk(folder, each=lambda: seen.append(whole(folder))).watched():
        go_on(folder)
    assert all(len(steps) >= 2 for steps in seen)
    assert [4, 2] in seen
    assert [6, 4, 2] in seen


def test_the_power_may_go_at_any_operation(trained, folder, tmp_path):
    with Disk(folder).watched() as disk:
        go_on(folder)
    assert len(disk.log) > 20
    expected = (folder / "checkpoint-6" / "model.safetensors").read_bytes()
    newest = []
    for number in range(len(disk.log)):
        place = tmp_path / f"{number}"
        shutil.copytree(trained, place)
        with Disk(place, fails_at=number, error=PowerLoss()).watched(), pytest.raises(PowerLoss):
            go_on(place)
        newest.append(whole(place)[0])
        if number % 5 == 0:
            go_on(place)
            assert (place / "checkpoint-6" / "model.safetensors").read_bytes() == expected
            assert whole(place)[:2] == [6, 4]
            assert all(path.name.startswith("checkpoint-") for path in place.iterdir())
    assert newest == sorted(newest)
    assert set(newest) == {4, 6}


def test_a_full_disk_at_any_write_leaves_the_last_checkpoint(trained, folder, tmp_path):
    with Disk(folder).watched() as disk:
        go_on(folder)
    last = next(i for i, operation in enumerate(disk.log) if operation == ("rename", "checkpoint-6"))
    for number in range(last + 1):
        what, _ = disk.log[number]
        if what in ("unlink", "rmdir"):
            continue
        place = tmp_path / f"{number}"
        shutil.copytree(trained, place)
        full = OSError(errno.ENOSPC, "No space left on device")
        with Disk(place, fails_at=number, error=full).watched(), pytest.raises(RunError) as error:
            build(place, save_steps=2).train(str(place / "checkpoint-4"))
        assert f"{place}: expected room for a checkpoint of step 6" in str(error.value)
        assert "No space left on device" in str(error.value)
        assert "checkpoint-4" in error.value.remedy
        assert sorted(path.name for path in place.iterdir()) == ["checkpoint-2", "checkpoint-4"]
        assert whole(place) == [4, 2]


@pytest.mark.parametrize("limit", [0, 100, 1000, 5000])
def test_a_limit_to_the_size_of_files_leaves_the_last_checkpoint(folder, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match=r"checkpoint of step 6.*File too large"):
            go_on(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert whole(folder) == [4, 2]


def test_a_folder_that_cannot_be_written_is_named(folder):
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(RunError, match="Permission denied"):
            go_on(folder)
        assert whole(folder) == [4, 2]
    finally:
        folder.chmod(0o755)


def test_something_else_in_the_way_is_named(folder):
    (folder / ".writing").write_text("")
    with pytest.raises(RunError, match="FileExistsError"):
        go_on(folder)
    assert whole(folder) == [4, 2]


def test_space_is_compared_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12345))
    with pytest.raises(RunError, match=r"expected (\d+) free bytes for a checkpoint of step 6, got 12345\.") as error:
        go_on(folder)
    needed = int(error.value.expected.split()[0])
    written = sum(path.stat().st_size for path in (folder / "checkpoint-4").iterdir())
    assert written <= needed <= written + (1 << 20)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, name, damage, capsys):
    DAMAGE[damage](folder / "checkpoint-4" / name)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"checkpoint-4 is damaged: {name}" in said
    assert "kept as damaged-checkpoint-4" in said
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]
    go_on(folder)
    assert whole(folder) == [6, 4]


@pytest.mark.parametrize("name", FILES[1:])
def test_a_checkpoint_that_lacks_a_state_is_not_used_in_part(folder, name):
    """Even if its manifest agrees: a file that is not listed is missed."""
    checkpoint = folder / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][name], manifest["sha256"]
    (checkpoint / "manifest.json").write_bytes(checkpoints._signed(manifest))
    (checkpoint / name).unlink()
    with pytest.raises(Damaged, match=f"does not list {name}"):
        verify(checkpoint)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_where_all_are_damaged_nothing_is_begun_anew(folder, capsys):
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "optimizer.safetensors").unlink()
    for _ in range(2):  # nor at the next start
        with pytest.raises(RunError, match="none but damaged ones: damaged-checkpoint-2, damaged-checkpoint-4"):
            last_checkpoint(folder)
    assert capsys.readouterr().err.count("optimizer.safetensors is missing") == 2
    assert last_checkpoint(folder / "nowhere") is None


def test_damaged_ones_of_the_same_step_are_all_kept(folder):
    for kept in ("damaged-checkpoint-4", "damaged-checkpoint-4-2"):
        shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4", dirs_exist_ok=True)
        (folder / "checkpoint-4" / "manifest.json").write_text("")
        last_checkpoint(folder)
        assert (folder / kept).is_dir()


def test_every_flipped_bit_is_noticed(trained, tmp_path):
    flips, generator = 1000 if LONG else 60, random.Random(0)
    place = shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    noticed = 0
    for flip in range(flips):
        path = place / FILES[flip % len(FILES)]
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        original = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises((Damaged, RunError), match=rf"{path.name}|format"):
            verify(place)
        noticed += 1
        path.write_bytes(original)
    verify(place)
    record(flipped=flips, noticed=noticed)


def test_a_manifest_leads_to_no_other_file(folder):
    secret = folder / "secret"
    secret.write_text("")
    checkpoint = folder / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../secret"] = checkpoints._seal(secret)
    del manifest["sha256"]
    (checkpoint / "manifest.json").write_bytes(checkpoints._signed(manifest))
    with pytest.raises(Damaged, match=r"\.\./secret is missing"):
        verify(checkpoint)


def test_another_format_is_refused_with_the_way_out(folder):
    checkpoint = folder / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    (checkpoint / "manifest.json").write_bytes(checkpoints._signed(manifest | {"format": 2}))
    with pytest.raises(RunError, match=r"format 1, got format 2, of inhibitor .* Go on with that version"):
        last_checkpoint(folder)


def test_what_an_interrupted_save_left_is_swept(folder):
    (folder / ".writing" / "checkpoint-6").mkdir(parents=True)
    (folder / ".writing" / "checkpoint-6" / "model.safetensors").write_text("half")
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_the_same_step_may_be_saved_again(folder):
    trainer = build(folder, save_steps=2)
    trainer.add_callback(At(4, lambda: trainer._save_checkpoint(trainer.model, None)))
    trainer.add_callback(type("Stop", (At,), {})(5, lambda: setattr(trainer.control, "should_training_stop", True)))
    trainer.train(str(folder / "checkpoint-4"))
    assert 4 in whole(folder)
    assert not (folder / ".writing").exists()
