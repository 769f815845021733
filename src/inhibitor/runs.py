"""The folder that one run owns: what it was asked, with which versions, and what came out."""

import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from inhibitor.config import Config
from inhibitor.errors import RunError

CONFIG, VERSIONS, METRICS, MODEL, REPORT = "config.yaml", "versions.json", "metrics.json", "model", "report.html"
PACKAGES = ("inhibitor", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")


class Run:
    """A run folder: ``config.yaml``, ``versions.json``, ``metrics.json``, ``model/``, pictures and ``report.html``.

    ``metrics.json`` is written last, so a folder that has it holds a finished run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def start(cls, path: str | Path, config: Config) -> "Run":
        """Take ``path`` for a run of ``config``: a new or empty folder, or one where that same run was interrupted.

        Raises:
            RunError: The folder holds another run, or files that are no run's.
        """
        run = cls(path)
        entries = sorted(run.path.iterdir()) if run.path.is_dir() else []
        if run.path.exists() and not run.path.is_dir():
            raise RunError(str(path), expected="a folder", got="a file", remedy="Choose another output.")
        if not entries:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(run.path / CONFIG, config.to_yaml())
            run.write_json(VERSIONS, versions())
        elif not (run.path / CONFIG).is_file():
            raise RunError(
                str(path),
                expected="a new or empty folder",
                got=f"one that holds {entries[0].name!r}",
                remedy="Choose another output.",
            )
        elif (run.path / CONFIG).read_text(encoding="utf-8") != config.to_yaml():
            raise RunError(
                str(path),
                expected="a new folder, or an interrupted run of the same configuration",
                got=f"another run (its {CONFIG} differs)",
                remedy="Choose another output, or delete that folder.",
            )
        return run

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return (self.path / METRICS).is_file()

    @property
    def model(self) -> Path:
        """Where the trained model lies."""
        return self.path / MODEL

    def metrics(self) -> dict[str, Any]:
        """What a finished run measured."""
        if not self.finished:
            raise RunError(
                str(self.path),
                expected=f"a finished run with {METRICS}",
                got="no such file",
                remedy="Run the same command again: it goes on where it stopped.",
            )
        result: dict[str, Any] = json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        return result

    def write_json(self, name: str, values: Any) -> None:
        """Write ``values`` into the folder, whole or not at all."""
        write_text(self.path / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically: aside, synced, then renamed over ``path``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically: aside, synced, then renamed over ``path``."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
