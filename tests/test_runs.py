"""A run folder belongs to one run: new, the same again, or refused."""

import json

import pytest

from inhibitor.config import Config
from inhibitor.errors import RunError
from inhibitor.runs import Run, write_text


class Settings(Config):
    seed: int = 0


def test_a_new_run_says_what_it_is(tmp_path):
    run = Run.start(tmp_path / "a" / "run", Settings())
    assert (run.path / "config.yaml").read_text() == "seed: 0\n"
    assert {"python", "torch", "inhibitor"} <= json.loads((run.path / "versions.json").read_text()).keys()
    assert not run.finished
    with pytest.raises(RunError, match="finished run"):
        run.metrics()


def test_the_same_run_goes_on_and_ends(tmp_path):
    Run.start(tmp_path, Settings())
    run = Run.start(tmp_path, Settings())
    run.write_json("metrics.json", {"score": 1.0})
    assert Run.start(tmp_path, Settings()).finished
    assert run.metrics() == {"score": 1.0}


def test_other_runs_and_other_files_are_refused(tmp_path):
    Run.start(tmp_path / "one", Settings())
    with pytest.raises(RunError, match="another run"):
        Run.start(tmp_path / "one", Settings(seed=1))
    with pytest.raises(RunError, match="holds 'one'"):
        Run.start(tmp_path, Settings())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a folder, got a file"):
        Run.start(tmp_path / "file", Settings())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
