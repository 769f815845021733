"""A run folder belongs to one run: new, the same again, or refused."""

import json
import os
import signal
from contextlib import contextmanager

import pytest

from inhibitor.config import Config
from inhibitor.errors import RunError
from inhibitor.runs import Run, write_text


class Stage(Config):
    tokens: int = 8


class Settings(Config):
    seed: int = 0
    stages: tuple[Stage, ...] = (Stage(),)


WRITTEN = "seed: 0\nstages:\n- tokens: 8\n"


@contextmanager
def at_work(folder):
    """Another process that has taken the folder; killed at the end. Gives its number."""
    ready, written = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Run.start(folder, Settings())
            os.write(written, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(written)
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)


def test_a_new_run_says_what_it_is(tmp_path):
    run = Run.start(tmp_path / "a" / "run", Settings())
    assert (run.path / "config.yaml").read_text() == WRITTEN
    assert {"python", "torch", "inhibitor-attention"} <= json.loads((run.path / "versions.json").read_text()).keys()
    assert not run.finished
    with pytest.raises(RunError, match="finished run"):
        run.metrics()


def test_the_same_run_goes_on_and_ends(tmp_path):
    Run.start(tmp_path, Settings())
    run = Run.start(tmp_path, Settings())
    run.write_json("metrics.json", {"score": 1.0})
    assert Run.start(tmp_path, Settings()).finished
    assert run.metrics() == {"score": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.json", "versions.json"]


def test_other_runs_and_other_files_are_refused(tmp_path):
    Run.start(tmp_path / "one", Settings())
    with pytest.raises(RunError, match="another run"):
        Run.start(tmp_path / "one", Settings(seed=1))
    with pytest.raises(RunError, match="holds 'one'"):
        Run.start(tmp_path, Settings())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a folder, got a file"):
        Run.start(tmp_path / "file", Settings())


def test_the_values_that_differ_are_named(tmp_path):
    Run.start(tmp_path, Settings())
    other = Settings(seed=1, stages=(Stage(tokens=9), Stage()))
    with pytest.raises(RunError, match=r"seed: 0 there, 1 here; stages\.0\.tokens: 8 there, 9 here; stages\.1\.tokens"):
        Run.start(tmp_path, other)
    (tmp_path / "config.yaml").write_text("# a note\nstages: [{tokens: 8}]\n")  # the same, and a default left out
    assert Run.start(tmp_path, Settings()).path == tmp_path
    (tmp_path / "config.yaml").write_text("sead: 0\n")
    with pytest.raises(RunError, match=r"that it cannot read .*sead"):
        Run.start(tmp_path, Settings())


def test_a_folder_has_one_process_at_a_time(tmp_path):
    with at_work(tmp_path) as child:
        with pytest.raises(RunError, match=f"got one held by process {child}\\. Wait for its end"):
            Run.start(tmp_path, Settings())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "1")  # torchrun's second process: the first one holds the folder for both
            Run.start(tmp_path, Settings())
    run = Run.start(tmp_path, Settings())  # it was killed, and its lock is gone with it
    assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
    run.write_json("metrics.json", {})
    assert not (tmp_path / "run.lock").exists()


def test_a_run_killed_at_any_moment_of_its_start_goes_on(tmp_path):
    with at_work(tmp_path):
        pass
    for kept in ([], ["run.lock"], ["run.lock", ".config.yaml.x.writing"], ["run.lock", "config.yaml"]):
        for path in tmp_path.iterdir():
            if path.name not in kept:
                path.unlink()
        for name in kept:
            (tmp_path / name).write_text(WRITTEN if name == "config.yaml" else "")
        run = Run.start(tmp_path, Settings())
        run._release()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "versions.json"]


def test_a_run_killed_at_its_very_end_is_tidied_up(tmp_path):
    with at_work(tmp_path):
        write_text(tmp_path / "metrics.json", "{}")
        (tmp_path / ".report.html.x.writing").write_text("half")
    assert Run.start(tmp_path, Settings()).finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.json", "versions.json"]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"{", "Expecting"),
        (b"", "Expecting value"),
        (b"\xff", "decode"),
        (b"[1]", "list"),
        (b"[" * 100_000, "recursion"),
    ],
    ids=["cut off", "empty", "other bytes", "no object", "deep"],
)
def test_damaged_metrics_are_named(tmp_path, content, got):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(RunError, match=f"expected a metrics.json of one JSON object, got .*{got}.*Delete that file"):
        Run(tmp_path).metrics()


def test_what_is_no_finished_run_is_told_apart(tmp_path):
    Run.start(tmp_path / "begun", Settings())
    for name, file in (("grid", "accuracy.jsonl"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    (tmp_path / "grid" / "config.yaml").write_text("")
    for name, message in (
        ("nowhere", r"got no folder\. Check the path"),
        ("begun", r"got one that is not finished\. Run the same command again"),
        ("grid", r"got a grid\. Its tables are in .*grid/results\.html; name the runs"),
        ("model", r"got a folder of something else\. Name a folder that distill, finetune or quantize wrote"),
    ):
        with pytest.raises(RunError, match=f"finished run with metrics.json, {message}"):
            Run(tmp_path / name).metrics()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(RunError, match=r"letter/a/b: expected a folder, got the file .*letter\. Choose another one"):
        Run.start(tmp_path / "letter" / "a" / "b", Settings())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for name in ("inhibitor.runs.FileLock.acquire", "pathlib.Path.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            with pytest.raises(
                RunError, match=r"expected a folder that can be written to, got Permission denied\. Choose"
            ):
                Run.start(tmp_path / "new", Settings())


def test_a_folder_is_held_while_entered(tmp_path):
    with Run(tmp_path).held():
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "run.lock").exists()
    with (
        at_work(tmp_path) as child,
        pytest.raises(RunError, match=f"one held by process {child}"),
        Run(tmp_path).held(),
    ):
        pytest.fail("entered")


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
