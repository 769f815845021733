"""States on disk: whole or not there, and the newest whole one is taken."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import inhibitor
from inhibitor.distill.states import States


@pytest.fixture
def kept(teacher, tmp_path):
    """Two states, the second with other weights."""
    student = inhibitor.convert(AutoModel.from_pretrained(teacher))
    tokenizer, states = AutoTokenizer.from_pretrained(teacher), States(tmp_path / "stages")
    for saves, name in enumerate(("first", "second"), start=1):
        with torch.no_grad():
            next(student.parameters()).fill_(float(saves))
        states.save(name, student, tokenizer, {"saves": saves}, keep=["first"])
    return states, student


def test_the_newest_is_taken(kept, teacher):
    (states, student), tokenizer = kept, AutoTokenizer.from_pretrained(teacher)
    name, progress = states.newest()
    assert (name, progress) == ("second", {"saves": 2})
    states.load("first", student)
    assert next(student.parameters()).flatten()[0] == 1.0
    states.save("a third", student, tokenizer, {"saves": 3}, keep=["second"])
    assert states.newest() == ("a third", {"saves": 3})


def test_what_no_state_names_goes(kept, teacher):
    states, student = kept
    states.save("third", student, AutoTokenizer.from_pretrained(teacher), {"saves": 3}, keep=["first"])
    assert {path.name for path in states.folder.iterdir()} == {"first", "third"}


@pytest.mark.parametrize("file", ["model.safetensors", "progress.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_a_damaged_one_is_named_and_passed_over(kept, file, fault, teacher, capsys):
    states, student = kept
    path = states.folder / "second" / file
    content = path.read_bytes()
    middle = len(content) // 2
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert states.newest() == ("first", {"saves": 1})
    said = capsys.readouterr().err
    assert "second is damaged" in said
    assert file in said
    assert "goes on from 'first'" in said
    assert (states.folder / "damaged-second").is_dir()
    assert states.newest() == ("first", {"saves": 1})
    assert not capsys.readouterr().err  # said once
    states.save("third", student, AutoTokenizer.from_pretrained(teacher), {"saves": 3}, keep=["first"])
    assert {path.name for path in states.folder.iterdir()} == {"damaged-second", "first", "third"}


def test_where_all_are_damaged_the_run_begins_anew(kept, capsys):
    states, _ = kept
    for name in ("first", "second"):
        (states.folder / name / "config.json").unlink()
    assert states.newest() is None
    assert capsys.readouterr().err.count("begins anew") == 2


def test_a_strangers_file_is_left_alone(kept, teacher):
    states, student = kept
    (states.folder / ".DS_Store").touch()
    assert states.newest() == ("second", {"saves": 2})
    states.save("third", student, AutoTokenizer.from_pretrained(teacher), {"saves": 3}, keep=[])
    assert {path.name for path in states.folder.iterdir()} == {".DS_Store", "third"}


def test_a_state_half_written_is_none(kept):
    states, _ = kept
    (states.folder / "second").rename(states.folder / ".writing")
    assert states.newest() == ("first", {"saves": 1})


def test_the_published_model_is_a_model(kept, tmp_path):
    states, _ = kept
    states.publish("second", tmp_path / "model")
    assert next(AutoModel.from_pretrained(tmp_path / "model").parameters()).flatten()[0] == 2.0
    assert {"manifest.json", "progress.json"}.isdisjoint(path.name for path in (tmp_path / "model").iterdir())
