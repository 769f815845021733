"""A student on disk as its difference from the teacher: what is the same is left out, the rest takes two bytes each.

``difference.safetensors`` holds tensors of the base model, without a head:

=====================================  ======================================
where teacher and student have         the file has
=====================================  ======================================
a tensor of the same bits              nothing, but its name in the header
a tensor of the same shape             student − teacher in bfloat16
no such tensor (γ, η, δ, ρ, τ, u)      the student's, in its own dtype
=====================================  ======================================

The header names the teacher, its commit if it was on the hub, and the SHA-256 of the ``model.safetensors`` that was
subtracted. A difference is small,
so rounding it loses less than rounding the weights themselves would.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from inhibitor.errors import ModelError
from inhibitor.models.loading import DIFFERENCE, WEIGHTS, load_pretrained, weights_file
from inhibitor.runs import sha256

FORMAT = "1"
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
OF_A_MODEL = (*OF_THE_HUB, "revision", "subfolder")


def find_difference(name_or_path: str, **kwargs: Any) -> Path | None:
    """Where a published student's difference lies, in its folder or in the hub's cache; None for any other model.

    Args:
        name_or_path: A folder, in which weights that were saved later go before the difference, or a hub id.
        **kwargs: As for ``from_pretrained``, of which the hub's are read; a ``variant`` is always whole weights.
    """
    place = {name: kwargs[name] for name in OF_A_MODEL if name in kwargs}

    def find(file: str) -> str | None:
        found: str | None = cached_file(
            name_or_path,
            file,
            **place,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return found

    found = None if kwargs.get("variant") else find(DIFFERENCE)
    return None if found is None or any(find(name) for name in WEIGHTS) else Path(found)


def is_folder(name_or_path: str) -> bool:
    """Whether a teacher is known on this machine only."""
    return Path(name_or_path).expanduser().is_dir()


def write_difference(student: PreTrainedModel, teacher: str, folder: Path, **kwargs: Any) -> list[str]:
    """Write ``difference.safetensors``.

    Args:
        student: A base model in float32; with a head, only its base model is written.
        teacher: As ``load_pretrained`` takes it; it is looked for under this name again when the student is loaded,
            a folder under its whole path.
        folder: Where the file goes.
        **kwargs: As for ``from_pretrained``, of which the hub's are read for the teacher.

    Returns:
        The names of the tensors that the student shares with its teacher, which the file leaves out.

    Raises:
        ModelError: The teacher cannot be loaded, or its weights are not one ``model.safetensors``.
    """
    options = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
    file = weights_file(teacher, **options)
    commit = extract_commit_hash(str(file), None)
    theirs = _weights(teacher, **options, **_revision(commit))
    tensors, equal = {}, []
    for name, tensor in student.base_model.state_dict().items():
        ours = tensor.detach().cpu()
        if name not in theirs or theirs[name].shape != ours.shape:
            tensors[name] = ours.contiguous()
        elif torch.equal(ours, theirs[name]):
            equal.append(name)
        else:
            tensors[name] = (ours - theirs[name]).to(torch.bfloat16).contiguous()
    place = str(Path(teacher).expanduser().resolve()) if is_folder(teacher) else teacher
    header = {
        "format": FORMAT,
        "teacher": place,
        **_revision(commit),
        "sha256": sha256(file),
        "equal": json.dumps(equal),
    }
    save_file(tensors, folder / DIFFERENCE, metadata=header)
    return equal


def read_difference(path: Path, **kwargs: Any) -> dict[str, Tensor]:
    """The student's weights in float32: the teacher's, with the difference added.

    Args:
        path: A ``difference.safetensors``.
        **kwargs: As for ``from_pretrained``, of which the hub's are read for the teacher too, but not the student's
            revision and folder.

    Raises:
        ModelError: The file says nothing of a teacher, or the teacher cannot be loaded or has other weights.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    try:
        teacher, digest, equal = header["teacher"], header["sha256"], json.loads(header["equal"])
        known = header["format"] == FORMAT and isinstance(equal, list) and all(isinstance(name, str) for name in equal)
    except (KeyError, ValueError, RecursionError):
        known = False
    if not known:
        raise ModelError(
            str(path),
            expected=f"a difference of format {FORMAT}, with its teacher in the header",
            got=f"format {header.get('format', 'unknown')}",
            remedy="Publish the student anew, or update inhibitor.",
        )
    place = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs} | _revision(header.get("revision"))
    try:
        found = sha256(weights_file(teacher, **place))
    except ModelError as error:
        raise ModelError(
            f"{path}: its teacher {error.subject}", expected=error.expected, got=error.got, remedy=error.remedy
        ) from error
    if found != digest:
        raise ModelError(
            f"{path}: its teacher {teacher}",
            expected=f"weights with the SHA-256 {digest}",
            got=found,
            remedy="Get the teacher that the student was made from; another one gives another model.",
        )
    theirs = _weights(teacher, **place)
    lacking = sorted(name for name in equal if name not in theirs)
    if lacking:
        raise ModelError(
            f"{path}: its teacher {teacher}",
            expected=f"a tensor {lacking[0]}",
            got="none",
            remedy="Use the version of transformers that the student's config.json names.",
        )
    return {name: theirs[name] for name in equal} | {
        name: theirs[name] + tensor.float() if name in theirs and theirs[name].shape == tensor.shape else tensor
        for name, tensor in tensors.items()
    }


def _weights(teacher: str, **place: Any) -> dict[str, Tensor]:
    """The weights that a teacher's files hold, of its base model, in float32."""
    model, loading = load_pretrained(AutoModel, teacher, dtype=torch.float32, output_loading_info=True, **place)
    weights: dict[str, Tensor] = model.state_dict()
    return {name: tensor for name, tensor in weights.items() if name not in loading["missing_keys"]}


def _revision(commit: str | None) -> dict[str, str]:
    return {} if commit is None else {"revision": commit}
