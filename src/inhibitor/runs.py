"""The folder that one run owns: what it was asked, with which versions, and what came out."""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inhibitor.config import Config
from inhibitor.errors import InhibitorError, RunError

CONFIG, VERSIONS, METRICS, MODEL, REPORT = "config.yaml", "versions.json", "metrics.json", "model", "report.html"
DATA = "data.json"
LOCK, WRITING = "run.lock", ".writing"
ACCURACY = "accuracy.jsonl"  # of a grid of runs
NO_RESULT = {"output", "report_to", "carbon_intensity", "example"}  # of a configuration: what may change on the way
PACKAGES = ("inhibitor-attention", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")


class Run:
    """A run folder: ``config.yaml``, ``versions.json``, ``metrics.json``, ``model/``, pictures and ``report.html``.

    While it goes on there is ``data.json``, which tells its data from others. ``metrics.json`` is written last, so a
    folder that has it holds a finished run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def start(cls, path: str | Path, config: Config) -> "Run":
        """Take ``path`` for a run of ``config``: a new or empty folder, or one where that same run was interrupted.

        This process holds the folder until ``metrics.json`` is written or the process ends, however it ends. Of
        several processes of one run (``torchrun``) the first holds it. What a killed one left half-written is deleted.

        Raises:
            RunError: As ``check``, or another process is at work in the folder, or it cannot be written to.
        """
        run = cls(path)
        run.check(config)
        with _writable(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            if os.environ.get("RANK", "0") == "0":
                run._take(config)
        return run

    def check(self, config: Config) -> None:
        """Refuse a folder that ``start`` would refuse, before what ``config`` asks for is loaded; nothing is taken.

        Raises:
            RunError: The folder holds another run, or files that are no run's; or a file is in its way.
        """
        check_folder(self.path)
        foreign = sorted(p.name for p in self.path.glob("*") if p.name != LOCK and not p.name.endswith(WRITING))
        if foreign and not (self.path / CONFIG).is_file():
            raise RunError(
                str(self.path),
                expected="a new or empty folder",
                got=f"one that holds {foreign[0]!r}",
                remedy="Choose another output.",
            )
        if foreign:
            self._check_same(config)

    def hold_to(self, data: Mapping[str, str | int]) -> None:
        """Note what the run reads, by name a digest or a number of rows; the same must be there when it goes on.

        Raises:
            RunError: It began with other data.
        """
        path = self.path / DATA
        before: dict[str, Any] = read_json(path) if path.is_file() else {**data}
        different = [name for name in {**before, **data} if before.get(name) != data.get(name)]
        if different:
            raise RunError(
                str(self.path),
                expected="the data that this run began with",
                got=f"other contents of {different[0]}",
                remedy="Put the old data back, or choose another output.",
            )
        if not path.is_file():
            self.write_json(DATA, data)

    def _take(self, config: Config) -> None:
        self._hold()
        for remnant in self.path.glob(f".*{WRITING}"):
            remnant.unlink()
        if not (self.path / CONFIG).is_file():
            write_text(self.path / CONFIG, config.to_yaml())
        if not (self.path / VERSIONS).is_file():
            self.write_json(VERSIONS, versions())
        if self.finished:  # nothing left to do but to tidy up after a kill
            self._release()

    def _check_same(self, config: Config) -> None:
        try:
            before = _flat(type(config).load(self.path / CONFIG))
        except InhibitorError as error:
            raise RunError(
                str(self.path),
                expected="a run that this version can go on with",
                got=f"a {CONFIG} that it cannot read ({error})",
                remedy="Choose another output, or go on with the version of that run.",
            ) from None
        now = _flat(config)
        compared = [key for key in before | now if key.partition(".")[0] not in NO_RESULT]
        different = [key for key in compared if before.get(key) != now.get(key)]
        if different:
            listed = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in different[:10])
            raise RunError(
                str(self.path),
                expected="a new folder, or an interrupted run of the same configuration",
                got=f"another run ({listed})",
                remedy="Choose another output, or delete that folder.",
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, which is made where there is none, while entered.

        Raises:
            RunError: Another process is at work in it, or it cannot be written to.
        """
        check_folder(self.path)
        with _writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
        try:
            yield
        finally:
            self._release()

    def _hold(self) -> None:
        """Take the folder's lock for as long as this process lives; the system takes it back from a dead one."""
        path = (self.path / LOCK).resolve()
        if path in _locks:
            return
        holder = ""
        with contextlib.suppress(OSError):  # Windows lets no other process read it
            holder = path.read_text(encoding="utf-8").strip()
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                str(self.path),
                expected="a folder that no other process is working in",
                got=f"one held by process {holder or 'of unknown number'}",
                remedy="Wait for its end, or stop it; the same command then goes on from there.",
            ) from None
        with contextlib.suppress(OSError):
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        _locks[path] = lock

    def _release(self) -> None:
        """Give the folder back."""
        lock = _locks.pop((self.path / LOCK).resolve(), None)
        if lock is not None:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return (self.path / METRICS).is_file()

    @property
    def model(self) -> Path:
        """Where the trained model lies."""
        return self.path / MODEL

    def metrics(self) -> dict[str, Any]:
        """What a finished run measured.

        Raises:
            RunError: The folder holds no finished run, or its ``metrics.json`` is damaged.
        """
        if self.finished:
            return read_json(self.path / METRICS)
        if not self.path.is_dir():
            got, remedy = "no folder", "Check the path."
        elif (self.path / ACCURACY).is_file():
            got, remedy = "a grid", f"Its tables are in {self.path / 'results.html'}; name the runs in its folders."
        elif (self.path / CONFIG).is_file():
            got, remedy = "one that is not finished", "Run the same command again: it goes on where it stopped."
        else:
            got, remedy = "a folder of something else", "Name a folder that distill, finetune or quantize wrote."
        raise RunError(str(self.path), expected=f"a finished run with {METRICS}", got=got, remedy=remedy)

    def write_json(self, name: str, values: Any) -> None:
        """Write ``values`` into the folder, whole or not at all. ``metrics.json`` ends the run."""
        write_text(self.path / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if name == METRICS:
            (self.path / DATA).unlink(missing_ok=True)
            self._release()


_locks: dict[Path, FileLock] = {}  # those that this process holds


def _flat(config: Config) -> dict[str, Any]:
    """A configuration's values by their dotted keys."""

    def walk(value: Any, key: str) -> dict[str, Any]:
        if isinstance(value, dict | list) and value:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {path: leaf for name, item in items for path, leaf in walk(item, f"{key}.{name}").items()}
        return {key[1:]: value}

    return walk(config.model_dump(mode="json"), "")


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be one, before any work is done for it.

    Raises:
        RunError: It is a file, or in one.
    """
    found = next(place for place in (path, *path.parents) if place.exists())
    if not found.is_dir():
        got = "a file" if found == path else f"the file {found}"
        raise RunError(str(path), expected="a folder", got=got, remedy="Choose another one.")


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Name the folder in which something cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            str(folder),
            expected="a folder that can be written to",
            got=str(error.strerror or error),
            remedy="Choose another output.",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        RunError: The file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        got = " ".join(str(error).split())[:200]
    else:
        if isinstance(found, dict):
            return found
        got = type(found).__name__
    raise RunError(
        str(path.parent),
        expected=f"a {path.name} of one JSON object",
        got=got,
        remedy="Delete that file, and run the same command again.",
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, as the hub shows it beside it; it is read once until it changes."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Read again when the file's size or time has changed, and else once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically: aside, synced, then renamed over ``path``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically: aside, synced, then renamed over ``path``, and the rename synced."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=WRITING)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, so that a rename survives a power loss."""
    if os.name == "nt":  # folders cannot be opened there; NTFS keeps a journal of renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
