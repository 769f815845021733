"""Children of this machine: side by side, each with its status, its last lines and its share of the cores."""

import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from inhibitor.reproduce import pools
from inhibitor.reproduce.pools import Child, Ended, LocalPool, open_pool, run
from inhibitor.runs import LOCK, METRICS


def child(folder, *arguments):
    return Child(arguments, folder / "run", folder / "run.log", Path.cwd(), 1)


def test_children_end_for_themselves(tmp_path):
    pool = open_pool("local", 2)
    for name in ("--help", "nonsense"):
        (tmp_path / name).mkdir()
    futures = [pool.submit(child(tmp_path / name, name)) for name in ("--help", "nonsense")]
    good, bad = (future.result() for future in futures)
    pool.close()
    assert good.status == 0
    assert bad.status == 2
    assert "No such command" in bad.lines


def test_closing_ends_children(tmp_path, monkeypatch):
    begun = threading.Event()
    pool = LocalPool(1, 1)
    note = pool._note

    def told(process):
        note(process)
        begun.set()

    monkeypatch.setattr(pool, "_note", told)
    future = pool.submit(child(tmp_path, "info"))
    waiting = pool.submit(child(tmp_path, "info"))
    assert begun.wait(20)
    pool.close()
    assert future.result().status in (-15, 143)
    assert waiting.cancelled()


@pytest.mark.parametrize(("asked", "processes", "threads"), [("6", 2, 3), ("6", 4, 1), ("2", 3, 1), ("1", 1, 1)])
def test_cores_are_shared_out(monkeypatch, asked, processes, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert open_pool("local", processes).threads == threads


def test_what_another_process_works_on_is_waited_for(tmp_path, monkeypatch):
    """First it holds the folder; when it lets go, it has finished the run, or has not."""
    started: list[Child] = []

    def start(child, begun):
        started.append(child)
        return Ended(0, "")

    monkeypatch.setattr(pools, "_start", start)
    asked = child(tmp_path, "finetune")
    asked.folder.mkdir()
    for finishes in (False, True):
        lock = FileLock(asked.folder / LOCK, thread_local=False)
        lock.acquire()

        def let_go(lock=lock, finishes=finishes):
            time.sleep(0.5)
            assert len(started) == int(finishes)
            if finishes:
                (asked.folder / METRICS).write_text("{}")
            lock.release()

        thread = threading.Thread(target=let_go)
        thread.start()
        assert run(asked).status == 0
        thread.join()
        assert len(started) == 1


def test_a_child_that_finds_another_one_at_work_is_repeated(tmp_path, monkeypatch):
    """The other one took the folder after we looked: it was starting."""
    asked = child(tmp_path, "finetune")
    asked.folder.mkdir()
    lock = FileLock(asked.folder / LOCK, thread_local=False)
    statuses = iter([2, 0])

    def start(child, begun):
        if lock.is_locked:
            lock.release()
        else:
            lock.acquire()
            threading.Timer(0.5, lock.release).start()
        return Ended(next(statuses), "")

    monkeypatch.setattr(pools, "_start", start)
    assert run(asked).status == 0
