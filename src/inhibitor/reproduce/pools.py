"""Where runs are done: child processes of this machine, or of a Ray cluster's workers. Each ends for itself alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from inhibitor.errors import ConfigError
from inhibitor.runs import LOCK, Run

REFUSED = 2  # the exit status of an error of ours
SHOWN = 6  # last lines of a failed run
RETRIES = 3  # of a run whose Ray worker died
LOOK = 0.2  # seconds between two looks at a child
STOPPING = 120.0  # seconds for Ray's runs to write a checkpoint


@dataclass(frozen=True)
class Child:
    """An ``inhibitor`` command.

    Args:
        arguments: Of the command.
        folder: The run's.
        log: Gets what the command prints, at its end.
        working: The folder that relative paths begin at.
        threads: For computing.
    """

    arguments: tuple[str, ...]
    folder: Path
    log: Path
    working: Path
    threads: int


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal, and the last lines it printed."""

    status: int
    lines: str


class Pool(Protocol):
    """Does runs, each with so many threads; ``capacity`` of them are worth handing over at a time."""

    capacity: int
    threads: int

    def submit(self, child: Child) -> "Future[Ended]":
        """Begin a run, now or when there is room."""

    def close(self) -> None:
        """Let what still runs write a checkpoint and end."""


def open_pool(executor: str, processes: int) -> Pool:
    """The pool of an executor.

    Raises:
        ConfigError: It is not installed.
    """
    threads = max(1, _cores() // processes)
    return RayPool(threads) if executor == "ray" else LocalPool(processes, threads)


def _cores() -> int:
    """Threads to share out: OMP_NUM_THREADS, or one for each core this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return int(asked) if asked.isdecimal() and int(asked) else len(allowed)


def run(
    child: Child,
    begun: Callable[["subprocess.Popen[bytes]"], None] = lambda process: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Ended:
    """Do one run in a child process, and wait for its end.

    A grid or worker that was killed leaves its child behind, which goes on: its end is waited for, and what it left to
    do is done.

    Args:
        child: The run.
        begun: Is told of the process.
        stopped: Whether waiting is in vain.
    """
    while True:
        if _waited(child.folder / LOCK, stopped) and Run(child.folder).finished:
            return Ended(0, "")
        ended = _start(child, begun)
        if ended.status != REFUSED or not _held(child.folder / LOCK):
            return ended


def _start(child: Child, begun: Callable[["subprocess.Popen[bytes]"], None]) -> Ended:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(child.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    with child.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(  # noqa: S603 - our own program, without a shell
            [sys.executable, "-m", "inhibitor", *child.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=child.working,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the grid, which then ends its children itself
        )
        begun(process)
        try:
            while (status := process.poll()) is None:
                time.sleep(LOOK)  # not wait(): what Ray cancels with does not get through to it
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return Ended(status, _last_lines(child.log, start))


def _waited(path: Path, stopped: Callable[[], bool]) -> bool:
    """Wait until a run's folder is free; whether it was not."""
    held = False
    while _held(path) and not stopped():
        held = True
        time.sleep(1)
    return held


def _held(path: Path) -> bool:
    """Whether another process works in a run's folder."""
    if path.exists():
        try:
            with FileLock(path, blocking=False):
                pass
        except Timeout:
            return True
    return False


def _last_lines(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 10_000))
        text = file.read().decode("utf-8", "replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-SHOWN:])


class LocalPool:
    """Threads that each wait for a child process."""

    def __init__(self, processes: int, threads: int) -> None:
        self.capacity, self.threads = processes, threads
        self._pool = ThreadPoolExecutor(processes)
        self._lock = threading.Lock()
        self._begun: list[subprocess.Popen[bytes]] = []
        self._closing = False

    def submit(self, child: Child) -> "Future[Ended]":
        """Begin a run, now or when there is room."""
        return self._pool.submit(self._run, child)

    def close(self) -> None:
        """Let what still runs write a checkpoint and end."""
        with self._lock:
            self._closing = True
            for process in self._begun:
                process.terminate()  # nothing, if it has ended
        self._pool.shutdown(cancel_futures=True)

    def _run(self, child: Child) -> Ended:
        return run(child, self._note, lambda: self._closing)

    def _note(self, process: "subprocess.Popen[bytes]") -> None:
        with self._lock:
            self._begun.append(process)
            if self._closing:
                process.terminate()


class RayPool:
    """Tasks of Ray (docs.ray.io), on the cluster that RAY_ADDRESS names, or on one of this machine.

    A run is one task, and a worker that dies has its task repeated: the run goes on where it stopped. Every node needs
    this package, and the folders of data and output under the same names.
    """

    capacity = sys.maxsize

    def __init__(self, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "executor",
                expected="local, or ray where Ray is installed",
                got="ray",
                remedy="pip install 'inhibitor-attention[ray]'",
            ) from None
        self.threads, self._ray = threads, ray
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._task = ray.remote(_on_ray).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        self._submitted: list[Any] = []

    def submit(self, child: Child) -> "Future[Ended]":
        """Begin a run, now or when there is room."""
        reference = self._task.remote(child)
        self._submitted.append(reference)
        future: Future[Ended] = reference.future()
        return future

    def close(self) -> None:
        """Let what still runs write a checkpoint and end."""
        ray, left = self._ray, self._submitted
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=0)
        for reference in left:
            ray.cancel(reference)
        if left:
            ray.wait(left, num_returns=len(left), timeout=STOPPING)
        if self._own:
            ray.shutdown()


def _on_ray(child: Child) -> Ended:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels with it; a shell's background ignores it
    return run(child)
