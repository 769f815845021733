"""A short text, a few labelled reviews, teachers of the tiny model, and recipes for them."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from inhibitor.data.labelled import SHIPPED

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


def save_loud(model, tokenizer, folder):
    """Save a tiny model with weights large enough that its attention says something."""
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                projection.weight.mul_(15)
            layer.attention.output.dense.weight.mul_(15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tiny_bert, tmp_path_factory):
    """The tiny model without a head."""
    return save_loud(
        AutoModel.from_pretrained(tiny_bert),
        AutoTokenizer.from_pretrained(tiny_bert),
        tmp_path_factory.mktemp("teacher"),
    )


@pytest.fixture(scope="session")
def classifier(tiny_bert, tmp_path_factory):
    """The tiny model with a head for reviews."""
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **names)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return save_loud(model, AutoTokenizer.from_pretrained(tiny_bert), tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def masked_lm(tiny_bert, tmp_path_factory):
    """The tiny model with a masked-language-model head, its decoder tied to its embeddings."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(tiny_bert)
    return save_loud(model, AutoTokenizer.from_pretrained(tiny_bert), tmp_path_factory.mktemp("masked_lm"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A folder with some of the shipped reviews: 48 to train on, 24 to measure on."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in (("train", 48), ("validation", 24)):
        lines = (SHIPPED / "reviews" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def task_recipe(classifier, reviews, tmp_path):
    """Values of an E2 recipe: two epochs of six steps."""
    return {
        "teacher": str(classifier),
        "output": str(tmp_path / "run"),
        "inhibitor": {"delta": 0.0},
        "calibration": {"sequences": 4},
        "stages": [
            {
                "kind": "task",
                "task": "reviews",
                "data": str(reviews),
                "epochs": 2,
                "batch_size": 8,
                "max_length": 32,
                "learning_rate": 1e-3,
                "checkpoints": 3,
            }
        ],
        "validation_sequences": 8,
        "example": "the film is good",
    }


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
