"""Checkpoints that are whole or not there, as files: written aside, hashed, synced, renamed; read without pickle.

A checkpoint holds safetensors and JSON. Its ``manifest.json`` is written last and names every file with its size and
SHA-256; it carries a digest of itself. A folder of that name therefore holds what was written, or is found out.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inhibitor.errors import RunError, notice
from inhibitor.runs import sync_folder, versions, write_bytes

FORMAT = 1
MANIFEST, TRAINER = "manifest.json", "trainer_state.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
PREFIX, ASIDE, DAMAGED = "checkpoint-", ".writing", "damaged-"
KEPT = 2


def process_file(index: int) -> str:
    """The file with what each process has of its own: random states and the loss that is not logged yet."""
    return f"process-{index}.safetensors"


def publish(folder: Path, step: int, *, processes: int, sharded: bool, since: float) -> Path:
    """Turn what lies in ``folder/.writing/checkpoint-<step>`` into ``folder/checkpoint-<step>``, then rotate.

    Each file is synced before the manifest names it, the manifest before the rename, the rename before an older
    checkpoint goes: at every instant, also of a power loss, the newest whole checkpoint is on the disk.

    Args:
        folder: Where a trainer's checkpoints lie.
        step: The optimizer steps that were done.
        processes: How many wrote it; as many are needed to go on from it.
        sharded: Whether weights and optimizer are in the files of FSDP or DeepSpeed instead of ours.
        since: When writing began, by ``time.perf_counter``.

    Returns:
        The checkpoint.
    """
    aside, final = folder / ASIDE / f"{PREFIX}{step}", folder / f"{PREFIX}{step}"
    if final.exists():
        final.rename(folder / ASIDE / "replaced")
    seal(aside, final, {"step": step, "processes": processes, "sharded": sharded}, since=since)
    rotate(folder)
    sweep(folder)
    return final


def seal(aside: Path, final: Path, content: dict[str, Any], *, since: float | None = None) -> None:
    """Bring a folder's files to the disk, list them in its manifest, and give it its final name.

    Args:
        aside: The folder, on the file system of ``final``.
        final: A name that is free.
        content: What else the manifest is to say.
        since: When writing began; the manifest then says how many seconds it took.
    """
    files = {path.relative_to(aside).as_posix(): _seal(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    for path in aside.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    seconds = {} if since is None else {"seconds": time.perf_counter() - since}
    manifest = {"format": FORMAT, **content, **seconds, "versions": versions(), "files": files}
    write_bytes(aside / MANIFEST, _signed(manifest))
    aside.rename(final)
    sync_folder(final.parent)


def rotate(folder: Path) -> None:
    """Move away what is older than the two newest whole checkpoints; ``sweep`` deletes it. No hash is read again."""
    whole = 0
    for checkpoint in checkpoints(folder):
        if whole == KEPT:
            checkpoint.rename(folder / ASIDE / checkpoint.name)
            continue
        with contextlib.suppress(Damaged):
            verify(checkpoint, digests=False)
            whole += 1


def sweep(folder: Path) -> None:
    """Delete what was moved away, or left behind by an interrupted save."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a trainer's folder, or None where there never was one.

    A damaged one is named on standard error with the file at fault, kept as ``damaged-checkpoint-<step>``, and the
    one before it is taken. Left-overs of an interrupted save are deleted.

    Raises:
        RunError: There are checkpoints, but all are damaged; or one was made by another version of this package.
    """
    sweep(folder)
    for checkpoint in checkpoints(folder):
        try:
            verify(checkpoint)
        except Damaged as fault:
            kept = _set_aside(checkpoint)
            notice(f"{checkpoint} is damaged: {fault}. It is kept as {kept.name}; the one before it is tried.")
        else:
            return str(checkpoint)
    damaged = sorted(path.name for path in folder.glob(f"{DAMAGED}{PREFIX}*"))
    if damaged:
        raise RunError(
            str(folder),
            expected="a whole checkpoint",
            got=f"none but damaged ones: {', '.join(damaged)}",
            remedy="Delete them and start again: this part of the run then begins anew.",
        )
    return None


class Damaged(Exception):  # noqa: N818 - a finding, which no user meets
    """A checkpoint is not what was written; the text names the file and its fault."""


def verify(checkpoint: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as it says.

    Args:
        checkpoint: The folder.
        digests: Whether to read and hash the files too, or to compare their sizes only.

    Raises:
        Damaged: A file is missing, of another size or of other content; the first is named.
        RunError: The manifest is of a format that this version does not know.
    """
    manifest = check(checkpoint, digests=digests)
    required = {TRAINER, *(process_file(index) for index in range(manifest["processes"]))}
    if not manifest["sharded"]:
        required |= {WEIGHTS, OPTIMIZER}
    for name in sorted(required - manifest["files"].keys()):
        raise Damaged(f"{MANIFEST} does not list {name}")
    return manifest


def check(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of any sealed folder whose files are as it says; arguments and errors as of ``verify``."""
    manifest = _manifest(folder)
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, entry in manifest["files"].items():
        if name not in present:  # names are compared, never opened: "../x" leads nowhere
            raise Damaged(f"{name} is missing")
        size = present[name].stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{name} has {size} bytes instead of {entry['bytes']}")
        if digests:
            with present[name].open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise Damaged(f"{name} has other content than was written")
    return manifest


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise Damaged(f"{MANIFEST} is missing")
    content = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(content)
        found, signed = manifest["format"], _signed({key: manifest[key] for key in manifest if key != "sha256"})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Damaged(f"{MANIFEST} cannot be read") from None
    if content != signed:
        raise Damaged(f"{MANIFEST} has other content than was written")
    if found != FORMAT:
        raise RunError(
            str(checkpoint),
            expected=f"a checkpoint of format {FORMAT}",
            got=f"format {found}, of inhibitor {manifest['versions'].get('inhibitor-attention', 'unknown version')}",
            remedy="Go on with that version, or delete the checkpoints to begin this part of the run anew.",
        )
    return manifest


def _signed(content: dict[str, Any]) -> bytes:
    """The manifest's text, with the digest of the rest as its last entry."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, indent=1) + "\n").encode()


def _seal(path: Path) -> dict[str, Any]:
    """Bring a file to the disk and measure it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _set_aside(checkpoint: Path) -> Path:
    kept, number = checkpoint.with_name(DAMAGED + checkpoint.name), 1
    while kept.exists():
        number += 1
        kept = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    return checkpoint.rename(kept)


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, text and tensors as one safetensors file.

    The tensors keep their bits and dtypes; all else is JSON in the file's header.
    """
    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, "", tensors)
    save_file(tensors, path, metadata={"state": json.dumps(rest)})


def load_state(path: Path) -> Any:
    """What ``save_state`` wrote, tensors on the CPU and in memory of their own."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        return _with_tensors(json.loads(file.metadata()["state"]), tensors)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _without_tensors(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved without pickle")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_with_tensors(item, tensors) for item in content)
    return {key: _with_tensors(item, tensors) for key, item in content}


def random_state() -> dict[str, Any]:
    """The state of every global generator: Python's, NumPy's, PyTorch's on the CPU and on the accelerators."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    accelerator = _accelerator()
    if accelerator is not None:
        every = getattr(accelerator, "get_rng_state_all", lambda: [accelerator.get_rng_state()])
        state["accelerator"] = every()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what ``random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    accelerator = _accelerator()
    if accelerator is not None:
        states = state.get("accelerator", ())
        if len(states) != len(random_state()["accelerator"]):  # begun on other devices
            notice("this training goes on on other accelerators, with random numbers of its own.")
            return
        every = getattr(accelerator, "set_rng_state_all", lambda states: accelerator.set_rng_state(*states))
        every(states)


def _accelerator() -> Any:
    """``torch.cuda``, ``torch.xpu`` or their like; None where there is no accelerator."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())
