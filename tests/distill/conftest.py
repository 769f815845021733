"""A short text and a recipe on the tiny model."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

WORDS = ["the", "film", "is", "was", "a", "good", "bad", "great", "dull", "fine", "not", "plot", "and", "it", "i"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file of 400 short paragraphs, more than enough for a few blocks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = (
        " ".join(WORDS[(row * row + 7 * column + row * column) % len(WORDS)] for column in range(12))
        for row in range(400)
    )
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teacher(tiny_bert, tmp_path_factory):
    """The tiny model with weights large enough that its attention says something."""
    folder = tmp_path_factory.mktemp("teacher")
    model = AutoModel.from_pretrained(tiny_bert)
    with torch.no_grad():
        for layer in model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                projection.weight.mul_(15)
            layer.attention.output.dense.weight.mul_(15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(teacher, text, tmp_path):
    """Values of a recipe of two stages of four steps each."""
    return {
        "teacher": str(teacher),
        "output": str(tmp_path / "run"),
        "text": {"files": [str(text)], "max_length": 16},
        "inhibitor": {"delta": 0.0},
        "calibration": {"sequences": 2, "lengths": [8]},
        "stages": [
            {"kind": "layerwise", "tokens": 256, "batch_size": 4, "checkpoints": 2},
            {"kind": "full", "tokens": 256, "batch_size": 4, "checkpoints": 2},
        ],
        "validation_sequences": 4,
        "example": "the film is good",
    }
